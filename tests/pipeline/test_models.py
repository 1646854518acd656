"""The pipeline with models of other families, and with a checkpoint in the place of pretraining."""

import json
import shutil

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run_folder import check_inputs, check_lineage, register_resolvers, remember_world
from lit_rlhf.pipeline.settings import compose_settings
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.text import train_bpe
from lit_rlhf.text.world import World


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano_gpt2", "nano_qwen"])
def test_other_families_go_through_the_pipeline(lit_rlhf, tmp_path, model):
    lit_rlhf(f"model={model}")
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert set(summary["evaluate"]["models"]) == {"base", "prompted", "sft", "ppo"}


@pytest.mark.slow
def test_checkpoint_takes_the_place_of_pretraining(lit_rlhf, tmp_path):
    tokenizer = train_bpe(World(0).corpus(300, 0), vocab_size=500)
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's users often do; a padding token has to be added
    tokenizer.chat_template = None
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    assert lit_rlhf("model=hf", "model.path=checkpoint", fresh=True).stderr == ""  # no notice of any library
    run = tmp_path / "runs" / "quickstart"
    assert not (run / "pretrain").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["evaluate"]["models"]) == {"base", "prompted", "sft", "ppo"}
    saved = json.loads((run / "ppo" / "model" / "config.json").read_text())
    assert saved["pad_token_id"] != saved["eos_token_id"]
    # Runs that start from this one know what it began with.
    lit_rlhf("stage=dpo", "run=second", "from_run=quickstart")
    lit_rlhf("stage=evaluate", "run=third", "from_run=second")
    figures = json.loads((tmp_path / "runs/third/evaluate/done.json").read_text())["figures"]
    assert list(figures["models"]) == ["base", "prompted", "sft", "ppo", "dpo"]
    lit_rlhf("stage=sft")  # the same stage again: finished, without naming the checkpoint once more


register_resolvers()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(run, stage, settings) -> a stage of a run, in so far as others look for it."""
    monkeypatch.chdir(tmp_path)

    def make(run, stage, *overrides):
        cfg = compose_settings([f"stage={stage}", f"run={run}", *overrides])
        remember_world(cfg)
        check_lineage(cfg)
        StageFolder(cfg, stage).begin()
        (tmp_path / "runs" / run / stage / "model").mkdir()

    return make


def test_a_run_goes_back_over_several_runs(made, tmp_path):
    made("a", "pretrain", "seed=7")
    made("a", "reward", "seed=7")
    made("b", "sft", "from_run=a", "seed=8")
    made("c", "ppo", "from_run=b", "seed=9")
    cfg = compose_settings(["stage=evaluate", "run=d", "from_run=c"])
    remember_world(cfg)
    assert (cfg.world.seed, cfg.split.seed) == (7, 7)
    policies = {name: node.path for name, node in cfg.evaluate.policies.items()}
    assert policies["base"] == "runs/a/pretrain/model" and policies["sft"] == "runs/b/sft/model"
    assert policies["ppo"] == "runs/c/ppo/model" and cfg.evaluate.reward_model.path == "runs/a/reward/model"
    # What a run started from, it knows in later commands too.
    assert compose_settings(["stage=ppo", "run=b"]).ppo.reward_model.path == "runs/a/reward/model"
    # The nearest run that has it.
    made("b", "reward", "from_run=a")
    assert compose_settings(["stage=ppo", "run=d", "from_run=c"]).ppo.reward_model.path == "runs/b/reward/model"


def test_a_run_remembers_the_checkpoint_it_began_with(made, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    made("a", "sft", "model=hf", "model.path=checkpoint")
    made("b", "reward", "from_run=a")
    for settings in (["run=a"], ["run=b"], ["run=c", "from_run=b"]):
        base = compose_settings(["stage=evaluate", *settings]).evaluate.policies.base.path
        assert base == str(tmp_path / "checkpoint")
    named = compose_settings(["stage=evaluate", "run=c", "from_run=b", "model=hf", "model.path=other"])
    assert named.evaluate.policies.base.path == "other"
    (tmp_path / "checkpoint").rmdir()
    check_inputs(compose_settings(["stage=evaluate", "run=c", "from_run=b"]))
    said = capsys.readouterr().out
    assert said == f"evaluate: base is left out, for {tmp_path / 'checkpoint'} is not there\n"


def test_a_checkpoint_that_is_named_is_not_replaced_by_what_another_model_became(made, tmp_path):
    made("quickstart", "sft")  # which experiment=own_prompts starts from where no other run or model is named
    made("tuned", "sft", "model=hf", "model.path=gpt2")

    def starts(*settings):
        return compose_settings(["stage=ppo", "run=mine", *settings]).ppo.policy.path

    assert starts("from_run=quickstart") == "runs/quickstart/sft/model"
    assert starts("from_run=tuned") == starts("from_run=tuned", "model=hf", "model.path=gpt2") == "runs/tuned/sft/model"
    for run in ("quickstart", "tuned"):
        assert starts(f"from_run={run}", "model=hf", "model.path=qwen") == "qwen"
    # A later command goes on with the checkpoint, too.
    made("mine", "preference", "from_run=quickstart", "model=hf", "model.path=qwen")
    assert starts() == starts("from_run=mine", "run=next") == "qwen"


def test_a_run_of_its_own_pretraining_forgets_the_checkpoint_behind_it(made):
    made("a", "sft", "model=hf", "model.path=gpt2")
    assert compose_settings(["stage=evaluate", "run=b", "from_run=a"]).evaluate.policies.base.path == "gpt2"
    made("b", "pretrain", "from_run=a")
    base = compose_settings(["stage=evaluate", "run=c", "from_run=b"]).evaluate.policies.base
    assert base.path == "runs/b/pretrain/model"


def test_a_run_cannot_start_from_itself(made):
    made("a", "sft", "model=hf", "model.path=gpt2")
    made("b", "reward", "from_run=a")
    made("c", "ppo", "from_run=b")
    with pytest.raises(UserError, match=r"from_run=c: that run itself started from a; choose another run="):
        made("a", "ppo", "from_run=c")


def test_a_run_that_was_removed_is_named(made, tmp_path, capsys):
    made("a", "pretrain")
    made("b", "sft", "from_run=a")
    shutil.rmtree(tmp_path / "runs/a")
    lost = "this run goes back to a, which is not there any more"
    with pytest.raises(UserError, match=f"ppo: runs/b/reward/model is not there.*; {lost}"):
        check_inputs(compose_settings(["stage=ppo", "run=c", "from_run=b"]))
    check_inputs(compose_settings(["stage=evaluate", "run=c", "from_run=b"]))
    assert f"evaluate: base is left out, for runs/b/pretrain/model is not there; {lost}" in capsys.readouterr().out
