"""The road with models of other families, and with a checkpoint in the place of pretraining."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lit_rlhf.text import train_bpe
from lit_rlhf.text.world import World

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["nano_gpt2", "nano_qwen"])
def test_other_families_go_the_whole_road(lit_rlhf, tmp_path, model):
    lit_rlhf(f"model={model}")
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert set(summary["evaluate"]["models"]) == {"base", "prompted", "sft", "ppo"}


def test_checkpoint_takes_the_place_of_pretraining(lit_rlhf, tmp_path):
    tokenizer = train_bpe(World(0).corpus(300, 0), vocab_size=500)
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's users often do; a padding token has to be added
    tokenizer.chat_template = None
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    lit_rlhf("model=hf", "model.path=checkpoint")
    run = tmp_path / "runs" / "quickstart"
    assert not (run / "pretrain").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["evaluate"]["models"]) == {"base", "prompted", "sft", "ppo"}
    saved = json.loads((run / "ppo" / "model" / "config.json").read_text())
    assert saved["pad_token_id"] != saved["eos_token_id"]
