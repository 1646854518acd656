"""``stage=plan`` says what the stages need, before there is anything."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.folder import register_resolvers, remember_world
from lit_rlhf.pipeline.plan import distinct, write_plan
from lit_rlhf.pipeline.settings import check_settings, compose_settings

ROAD = ["pretrain", "sft", "preference", "reward", "ppo", "dpo", "evaluate"]


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """(*overrides) -> (stage -> need, plan) in an empty folder."""
    monkeypatch.chdir(tmp_path)
    register_resolvers()

    def plan(*overrides):
        cfg = compose_settings(["stage=plan", "debug=fast", *overrides])
        remember_world(cfg)
        check_settings(cfg)
        made = write_plan(cfg)
        return {need.stage: need for need in made.stages}, made

    return plan


def test_the_road_is_planned_before_anything_is_trained(planned, tmp_path, capsys):
    needs, plan = planned("model=micro", "run=new")
    assert list(needs) == ROAD and plan.unplanned == {}
    said = capsys.readouterr().out
    assert all(f"\n{stage} " in said for stage in ROAD)
    assert [f.name for f in (tmp_path / "runs" / "new").iterdir()] == ["plan.json"]
    written = json.loads((tmp_path / "runs" / "new" / "plan.json").read_text())
    assert [need["peak"] for need in written["stages"]] == [need.peak for need in plan.stages]
    for need in needs.values():
        assert 0 < need.weights < need.peak
        assert need.step_seconds > 0 and need.seconds > 0 and need.steps > 0
    sft, ppo = needs["sft"], needs["ppo"]
    assert sft.gradients == pytest.approx(sft.weights, rel=0.001)  # but for the angles of positions
    assert sft.optimizer == 2 * sft.gradients  # Adam in float32
    # Policy, reference, reward model and critic; the heads are small.
    assert ppo.weights == pytest.approx(4 * sft.weights, rel=0.01)
    assert ppo.gradients == pytest.approx(2 * sft.weights, rel=0.01)
    assert ppo.cache > 0 and sft.cache == 0
    assert (needs["pretrain"].steps, ppo.steps) == (12, 3)


def test_settings_reach_the_plan(planned):
    one = planned("model=pico", "run=one", "sft.data.limit=256")[0]
    two = planned("model=pico", "run=two", "sft.data.limit=256", "sft.data.batch_size=32", "ppo/critic=shared")[0]
    assert two["sft"].activations > 1.5 * one["sft"].activations
    assert two["sft"].steps == one["sft"].steps // 2
    assert two["ppo"].weights == pytest.approx(3 / 4 * one["ppo"].weights, rel=0.01)
    less = planned("model=pico", "run=less", "sft.data.limit=256", "trainer.activation_checkpointing=true")[0]
    assert less["sft"].activations < 0.8 * one["sft"].activations


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])  # some layers have one, or all
def test_sliding_windows_are_planned_and_keep_less(planned, kind, monkeypatch):
    monkeypatch.setattr("lit_rlhf.pipeline.plan.planned_stages", lambda cfg: ["pretrain", "preference"])
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    shape += "num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 256"
    caches = []
    for window in (8, 128):
        model = f"+model.config={{model_type: {kind}, {shape}, sliding_window: {window}}}"
        needs, plan = planned("model=pico", "~model.config", model, f"run=w{window}")
        assert plan.unplanned == {}
        caches.append(needs["preference"].cache)
    assert 0 < caches[0] < caches[1]


def test_a_checkpoint_and_a_file_that_is_not_there(planned, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart" / "sft" / "model", tmp_path / "mine")
    needs, plan = planned(
        "run=hf", "model=hf", "model.path=mine", "reward/data=jsonl", "reward.data.path=nowhere.jsonl"
    )
    assert list(plan.unplanned) == ["reward"]
    assert list(needs) == ["sft", "preference", "ppo", "dpo", "evaluate"]
    assert "nowhere.jsonl" in plan.unplanned["reward"]
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    assert needs["sft"].weights == pytest.approx(sum(w.nbytes for w in weights.values()), rel=0.001)


def test_a_finished_runs_checkpoints_are_as_large_as_planned(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    said = lit_rlhf("stage=plan").stdout
    plan = json.loads((tmp_path / "runs" / "quickstart" / "plan.json").read_text())
    for need in plan["stages"]:
        assert f"\n{need['stage']} " in said
        checkpoint = tmp_path / "runs" / "quickstart" / need["stage"] / "checkpoints" / "last.ckpt"
        if checkpoint.is_file():
            assert need["checkpoint"] == pytest.approx(checkpoint.stat().st_size, rel=0.05)


def test_a_mistake_ends_the_plan(planned):
    with pytest.raises(UserError, match=r"sft.data.batch_size=none: it should be a valid integer"):
        planned("sft.data.batch_size=none")


def test_a_mistake_in_one_stage_is_said_plainly_in_the_next(planned):
    with pytest.raises(UserError) as raised:
        planned("model=pico", "run=lost", "pretrain/data=text", "pretrain.data.path=nowhere.jsonl")
    assert "nowhere.jsonl" in str(raised.value) and "no tokenizer could be loaded" in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_a_gpu_that_is_not_there_can_be_planned_for(planned):
    needs, plan = planned("model=pico", "run=gpu", "trainer=gpu")
    assert (plan.device, plan.precision, plan.rates) == ("cuda", "bf16-mixed", None)
    pretrain = needs["pretrain"]
    assert pretrain.seconds is None
    assert pretrain.checkpoint == pytest.approx(pretrain.weights + pretrain.optimizer, rel=1e-3)  # on disk
    assert pretrain.weights + pretrain.gradients + pretrain.optimizer < pretrain.peak


def test_how_many_products_there_are_in_all():
    """Sets of what oneDNN meets in a step, drawn at random, are counted on from 8 of them to all that come."""
    draw = random.Random(0)
    few, many = range(40), range(10_000)
    for things, count, expected in ((few, 500, 40), (many, 8, 80), (many, 16, 160)):
        sets = [set(draw.sample(things, 10)) for _ in range(count)]
        assert len(set().union(*sets)) == pytest.approx(expected, rel=0.05)
        assert distinct(sets[:8], count) == pytest.approx(expected, rel=0.15)
    assert distinct([{1, 2}] * 8, 500) == 2
    assert distinct([], 5) == 0
    # By hand: 3 were met once, 2 twice; 5 + 3^2 / (2 * 2); and of one more step 5 + 3 / 3 * 1.
    samples = [{1, 2, 3}, {2, 3, 4}, {5}]
    assert (distinct(samples, 100), distinct(samples, 4)) == (5 + 2, 5 + 1)
