"""``lit-rlhf stage=chat``: from the command line to a conversation."""

import json

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.models import policy_from_config, save_model
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings, stages_of
from lit_rlhf.text import ensure_chat_template, train_bpe

register_resolvers()


@pytest.fixture
def run_folder(tmp_path):
    """A run with a base and an SFT model."""
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    for name in ("pretrain", "sft"):
        torch.manual_seed(0)
        tokenizer = train_bpe(["What is 12 + 30? It is 42.", "Who are you? I am the cat."] * 3, 300)
        if name == "sft":
            ensure_chat_template(tokenizer)
        save_model(policy_from_config(config, tokenizer), tokenizer, tmp_path / "runs/quickstart" / name / "model")
    return tmp_path / "runs/quickstart"


def test_chat_talks_to_the_best_model_of_the_run(lit_rlhf, run_folder):
    short = ["chat.sampling.max_new_tokens=5", "chat.judgements.round=1", "chat.judgements.annotator=anna"]
    done = lit_rlhf("stage=chat", "run=quickstart", *short, input="Who are you?\n/down\n/quit\n")
    assert done.stdout.startswith("Talking to sft.\n") and not done.stderr
    [record] = map(json.loads, (run_folder / "data/feedback-1.jsonl").read_text().splitlines())
    assert (record["rating"], record["annotator"], record["model"]) == (-1, "anna", "sft")
    assert not (run_folder / "summary.json").exists()  # it is no stage


def checked(*overrides):
    cfg = compose_settings(["stage=chat", *overrides])
    remember_world(cfg)
    check_settings(cfg)
    return cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chat.ui=phone", "chat.ui=phone: it should be 'terminal' or 'web'"),
        ("chat.sampling.top_p=2", "chat.sampling.top_p=2: it should be less than or equal to 1"),
        ("chat.judgements.round=-1", "chat.judgements.round=-1: it should be greater than or equal to 0"),
        ("chat.port=0", "chat.port=0: it should be greater than or equal to 1"),
        ("chat.colour=red", "chat.colour: there is no such setting"),
        ("stage=[sft,chat]", "give stage=chat alone"),
    ],
)
def test_settings_are_checked(override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        checked(override)
    assert message in str(error.value)


@pytest.mark.parametrize("transcript", ["human", "world"])
def test_it_is_a_command_and_no_stage(transcript, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stages_of(checked(f"chat/transcript={transcript}")) == []
