"""``stage=plan`` says what the stages need, before there is anything."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.plan import MARGIN, write_plan
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings

PIPELINE = ["pretrain", "sft", "preference", "reward", "ppo", "dpo", "evaluate"]


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


def test_the_pipeline_is_planned_before_anything_is_trained(planned, tmp_path, capsys):
    needs, plan = planned("model=micro", "run=new")
    assert list(needs) == PIPELINE and plan.unplanned == {}
    said = capsys.readouterr().out.split("MiB  weights")[1]
    assert [line.split()[0] for line in said.splitlines()[1:8]] == PIPELINE
    assert [f.name for f in (tmp_path / "runs" / "new").iterdir()] == ["plan.json"]
    written = json.loads((tmp_path / "runs" / "new" / "plan.json").read_text())
    assert [need["host"] for need in written["stages"]] == [need.host for need in plan.stages]
    for need in needs.values():
        assert 0 < need.weights < need.host - plan.process and need.gpu == 0 and need.advice == ""
    sft, ppo = needs["sft"], needs["ppo"]
    assert sft.gradients == pytest.approx(sft.weights, rel=0.001)  # but for the angles of positions
    assert sft.optimizer == 2 * sft.gradients  # Adam in float32
    # Policy, reference, reward model and critic; the heads are small.
    assert ppo.weights == pytest.approx(4 * sft.weights, rel=0.01)
    assert ppo.gradients == pytest.approx(2 * sft.weights, rel=0.01)
    assert ppo.cache > 0 and sft.cache == 0


def test_settings_reach_the_plan(planned):
    one = planned("model=pico", "run=one", "sft.data.limit=256")[0]
    two = planned("model=pico", "run=two", "sft.data.limit=256", "sft.data.batch_size=32", "ppo/critic=shared")[0]
    assert two["sft"].activations > 1.5 * one["sft"].activations
    assert two["ppo"].weights == pytest.approx(3 / 4 * one["ppo"].weights, rel=0.01)
    less = planned("model=pico", "run=less", "sft.data.limit=256", "trainer.activation_checkpointing=true")[0]
    assert less["sft"].activations < 0.8 * one["sft"].activations


def test_what_ppo_needs_follows_from_the_batch_in_work_and_not_from_the_rollout(planned, monkeypatch):
    monkeypatch.setattr("lit_rlhf.pipeline.plan.planned_stages", lambda cfg: PIPELINE[:5])
    ppo = planned("model=gpt2_124m", "ppo.sampling.max_new_tokens=256", "ppo.data.batch_size=128")[0]["ppo"]
    assert ppo.host < 9 * 2**30  # of which weights, gradients and Adam's state are 4.6 GiB


def test_adapters_are_planned(planned):
    lora = ("sft.lora.r=2", "reward.lora.r=2", "ppo.lora.r=2", "dpo.lora.r=2")
    full, adapted = planned("model=pico", "run=full")[0], planned("model=pico", "run=adapted", *lora)[0]
    for stage in ("sft", "reward", "ppo", "dpo"):
        assert 0 < adapted[stage].gradients < 0.5 * full[stage].gradients
        assert adapted[stage].optimizer < 0.5 * full[stage].optimizer
    assert adapted["ppo"].weights < 0.85 * full["ppo"].weights  # no copy for the reference
    assert adapted["dpo"].weights < 0.6 * full["dpo"].weights


def test_models_of_other_kinds_are_planned(planned, monkeypatch):
    """Gemma 2: sliding windows, logits that are capped; transformers' modules write."""
    monkeypatch.setattr("lit_rlhf.pipeline.plan.planned_stages", lambda cfg: ["pretrain", "sft", "preference"])
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    shape += "num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 256, sliding_window: 8"
    needs, plan = planned("model=pico", "~model.config", f"+model.config={{model_type: gemma2, {shape}}}", "run=gemma")
    assert plan.unplanned == {} and needs["preference"].cache > 0


def test_a_checkpoint_and_a_file_that_is_not_there(planned, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart" / "sft" / "model", tmp_path / "mine")
    needs, plan = planned("run=hf", "model=hf", "model.path=mine")
    assert list(needs) == ["sft", "preference", "reward", "ppo", "dpo", "evaluate"] and plan.unplanned == {}
    with pytest.raises(UserError, match=r"^dpo: .*nowhere.jsonl"):  # after the others are written down
        planned("run=file", "model=hf", "model.path=mine", "dpo/data=jsonl", "dpo.data.path=nowhere.jsonl")
    written = json.loads((tmp_path / "runs" / "file" / "plan.json").read_text())
    assert [need["stage"] for need in written["stages"]] == ["sft", "preference", "reward", "ppo", "evaluate"]
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    assert needs["sft"].weights == pytest.approx(sum(w.nbytes for w in weights.values()), rel=0.001)


def test_a_finished_runs_checkpoints_are_as_large_as_planned(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    said = lit_rlhf("stage=plan").stdout
    plan = json.loads((tmp_path / "runs" / "quickstart" / "plan.json").read_text())
    for need in plan["stages"]:
        assert re.search(rf"^ *{need['stage']} ", said, re.MULTILINE)
        checkpoint = tmp_path / "runs" / "quickstart" / need["stage"] / "checkpoints" / "last.ckpt"
        if checkpoint.is_file():
            assert need["checkpoint"] == pytest.approx(checkpoint.stat().st_size, rel=0.05)


def test_a_mistake_ends_the_plan(planned):
    with pytest.raises(UserError, match=r"sft.data.batch_size=none: it should be a valid integer"):
        planned("sft.data.batch_size=none")


def test_a_mistake_in_one_stage_is_said_plainly_in_the_next(planned):
    with pytest.raises(UserError) as raised:
        planned("model=pico", "run=lost", "pretrain/data=text", "pretrain.data.path=nowhere.jsonl")
    assert str(raised.value).startswith("pretrain: nowhere.jsonl: no such file")
    assert "sft: runs/lost/pretrain/model: no such folder, where a tokenizer was expected" in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_all_stages_of_a_gpu_that_is_not_there_are_planned(planned):
    needs, plan = planned("model=pico", "run=gpu", "trainer=gpu")
    assert (list(needs), plan.unplanned, plan.device, plan.gpu) == (PIPELINE, {}, "cuda", 0)
    for need in needs.values():
        assert need.weights < need.gpu < need.host
    pretrain = needs["pretrain"]
    assert pretrain.checkpoint == pytest.approx(pretrain.weights + pretrain.optimizer, rel=1e-3)  # on disk
    assert pretrain.weights + pretrain.gradients + pretrain.optimizer < pretrain.gpu
    adamw = ("model=pico", "run=off", "trainer=gpu", "pretrain.optimizer.matrix_lr=null")
    pretrain, offloaded = (
        planned(*adamw, f"pretrain.optimizer.offload={on}")[0]["pretrain"] for on in ("false", "true")
    )
    assert pretrain.gpu - offloaded.gpu == pytest.approx((1 + MARGIN) * pretrain.optimizer, abs=2)


def test_several_processes_are_planned(planned, monkeypatch):
    monkeypatch.setattr("lit_rlhf.pipeline.plan.planned_stages", lambda cfg: ["pretrain", "sft", "preference"])
    gpu = ("model=pico", "trainer=gpu", "trainer.devices=4", "sft.lora.r=2")
    ddp = planned(*gpu, "run=ddp", "trainer.strategy=ddp")[0]
    fsdp = planned(*gpu, "run=fsdp", "trainer.strategy=fsdp2", "trainer.num_nodes=2")[0]
    whole, part = ddp["pretrain"], fsdp["pretrain"]
    assert (whole.processes, part.processes) == ("4 processes (ddp)", "8 processes (fsdp2)")
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(part, name) == getattr(whole, name) // 8
    assert part.gpu < whole.gpu and part.checkpoint == whole.checkpoint and part.loading == whole.loading
    # Each process sends its part of the gradients on, and then of their sums: all but one of four parts, twice.
    assert whole.sent == int(2 * 3 / 4 * whole.gradients)
    # Weights in bfloat16 for the forward and again for the backward pass, and gradients once, in float32.
    assert part.sent == pytest.approx(7 / 8 * (2 * whole.weights / 2 + whole.gradients), rel=0.001)
    assert (whole.gb_per_s, part.gb_per_s) == (450, 50) and part.seconds == part.sent / 50e9
    assert whole.node > 4 * (whole.host - 2**20) and 0 < ddp["sft"].sent < whole.sent  # adapters alone
    # From files each process takes its part alone; what is made from a config it has as a whole at first.
    assert fsdp["sft"].loading == pytest.approx(ddp["sft"].loading / 8, rel=0.01)
    for need, count in ((ddp["preference"], 4), (fsdp["preference"], 8)):  # which share out the prompts
        assert need.sent == 0 and need.processes.startswith(f"{count} processes")
        assert need.loading == need.weights and need.node > 4 * (need.host - 2**20)


def test_what_does_not_fit_is_said_with_what_would_make_it_smaller(planned, capsys, monkeypatch):
    monkeypatch.setattr("lit_rlhf.pipeline.plan.machine_bytes", lambda: 2**20)
    needs, _ = planned("model=pico", "run=small")
    assert "ppo.lora.r=8" in needs["ppo"].advice and "trainer=fsdp, 2 processes" in needs["sft"].advice
    assert "cache_gib" in needs["preference"].advice
    assert "lora" not in needs["pretrain"].advice  # which has none
    assert "sft does not fit" in capsys.readouterr().out


def test_planning_leaves_a_running_collection_alone(planned, tmp_path):
    progress_file = tmp_path / "runs" / "mine" / "preference" / "progress.jsonl"
    progress_file.parent.mkdir(parents=True)
    progress_file.write_text("[0, []]\n[1, [")  # a line that is being written
    planned("model=pico", "run=mine")
    assert progress_file.read_text() == "[0, []]\n[1, ["
