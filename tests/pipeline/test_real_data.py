"""The experiments on data that people wrote, in small."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.slow


def summary(tmp_path, run):
    return json.loads((tmp_path / "runs" / run / "summary.json").read_text())


def test_shakespeare_by_characters(lit_rlhf, test_data, tmp_path):
    text = test_data / "tinyshakespeare" / "input.txt"
    lit_rlhf(
        "experiment=shakespeare", f"pretrain.data.path={text}", "pretrain.trainer.max_steps=250",
        "logger=csv", "threads=1",
        "callbacks.progress_bar=false", fast=False,
    )  # fmt: skip
    figures = summary(tmp_path, "shakespeare")["pretrain"]
    assert figures["val_loss_first"] > 4  # nats a character: log(70) = 4.2 for a model that knows nothing
    assert figures["val_loss"] < 2.6  # bigrams reach 2.5; the full 2,000 steps end below 1.88
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "shakespeare" / "pretrain" / "model")
    sample = text.read_text()[:5000]
    assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


def test_reward_model_on_human_preferences(lit_rlhf, test_data, tmp_path):
    path = test_data / "hh-rlhf" / "harmless-base.jsonl"
    said = lit_rlhf(
        "experiment=hh_rlhf", f"reward.data.path={path}", "reward.data.limit=150", "logger=csv", "threads=1",
        "callbacks.progress_bar=false", fast=False,
    ).stdout  # fmt: skip
    figures = summary(tmp_path, "hh_rlhf")["reward"]
    assert "bag_of_words_accuracy" in said  # shown beside the model's own
    assert figures["val_pairs"] >= 400
    assert figures["bag_of_words_accuracy"] > 0.55
    assert 0.4 < figures["val_accuracy"] < 0.75
    assert figures["gold_accuracy"] is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "hh_rlhf" / "reward" / "model")
    assert model.config.score_shift != 0


def test_instructions_with_gpt2s_tokenizer(lit_rlhf, test_data, tmp_path):
    lit_rlhf(
        "experiment=instructions", f"sft.data.path={test_data}/instructions/instruction-data.json",
        f"tokenizer.path={test_data}/gpt2-tokenizer", "model.config.hidden_size=48", "model.config.num_hidden_layers=2",
        "sft.data.limit=400", "sft.optimizer.lr=5e-3", "logger=csv",
        "threads=1", "callbacks.progress_bar=false", fast=False,
    )  # fmt: skip
    figures = summary(tmp_path, "instructions")["sft"]
    assert figures["val_loss"] < figures["val_loss_first"] - 2
    folder = tmp_path / "runs" / "instructions" / "sft" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "Name a colour."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]) == "\n\nHuman: Name a colour.\n\nAssistant:"
    torch.manual_seed(0)
    assert model.generate(**prompt, max_new_tokens=5).shape[1] > prompt["input_ids"].shape[1]
