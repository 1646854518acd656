"""The experiments on data that people wrote, in small."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lit_rlhf.models import load_reward_model
from lit_rlhf.models.reward_head import score_scale

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
        "experiment=hh_rlhf", f"reward.data.path={path}", "reward.data.limit=150", "model=pico", "logger=csv",
        "threads=1", "callbacks.progress_bar=false", fast=False,
    ).stdout  # fmt: skip
    figures = summary(tmp_path, "hh_rlhf")["reward"]
    assert "bag_of_words_accuracy" in said  # shown beside the model's own
    assert figures["val_pairs"] >= 400
    assert figures["bag_of_words_accuracy"] > 0.55
    assert 0.4 < figures["val_accuracy"] < 0.75
    assert figures["gold_accuracy"] is None
    model = load_reward_model(tmp_path / "runs" / "hh_rlhf" / "reward" / "model")
    assert model.score.spec.pooling == "answer" and score_scale(model).shift != 0


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


LABEL_STUDIO = [
    "experiment=label_studio", "sft.trainer.max_epochs=1", "reward.trainer.max_epochs=3",
    "ppo.trainer.limit_train_batches=2", "ppo.module.val_samples=1", "evaluate.module.samples=1",
    "evaluate.module.best_of=2", "logger=csv", "threads=1", "callbacks.progress_bar=false",
]  # fmt: skip


def test_from_prompts_through_label_studio_to_a_tuned_model(lit_rlhf, test_data, tmp_path):
    studio = test_data / "label-studio"
    given = [
        *LABEL_STUDIO, f"sft.data.path={test_data}/instructions/instruction-data.json", "sft.data.limit=100",
        f"preference.data.path={studio}/pairwise-tasks.json", "model.config.n_embd=64", "model.config.n_layer=2",
    ]  # fmt: skip
    data = tmp_path / "runs" / "label_studio" / "data"

    # Prompts alone: as far as Label Studio's tasks.
    waiting = lit_rlhf(*given, fast=False, check=False)
    assert waiting.returncode == 2 and "add preference.annotator.export=" in waiting.stderr
    made = [task["data"] for task in json.loads((data / "label_studio_tasks-0.json").read_text())]
    prompts = {task["prompt"] for task in json.loads((studio / "pairwise-tasks.json").read_text())}
    assert {task["prompt"] for task in made} == prompts and len(made) == 24
    assert all(task["answer1"] != task["answer2"] for task in made)
    assert "<Pairwise" in (data / "label_studio_template-0.xml").read_text()

    # The export of people who judged them; it brings its own answers.
    said = lit_rlhf(*given, f"preference.annotator.export={studio}/pairwise-export.json", fast=False).stdout
    assert "sft: finished already" in said
    rankings = [json.loads(line) for line in (data / "rankings-0.jsonl").read_text().splitlines()]
    assert [r["ranks"] for r in rankings].count([1, 2]) == 14 and len(rankings) == 24
    figures = summary(tmp_path, "label_studio")
    assert figures["preference"]["unjudged"] == 24  # what the small model wrote
    assert figures["reward"]["val_loss_first"] == pytest.approx(0.693147, abs=1e-4)  # the head begins at 0
    assert figures["evaluate"]["judge"] == "reward model (proxy)"
    assert figures["evaluate"]["prompts"] == figures["reward"]["val_pairs"] == 4
    run = tmp_path / "runs" / "label_studio"
    reward_model = load_reward_model(run / "reward" / "model")
    assert (reward_model.score.spec.kind, reward_model.score.spec.pooling) == ("mlp", "mean")
    assert AutoModelForCausalLM.from_pretrained(run / "ppo" / "model").config.model_type == "gpt2"
    assert (run / "report.html").is_file()


def test_a_gpt2_checkpoint_takes_the_small_models_place(lit_rlhf, test_data, tmp_path):
    AutoTokenizer.from_pretrained(test_data / "gpt2-tokenizer").save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=256)).save_pretrained(tmp_path / "gpt2")
    lit_rlhf(
        *LABEL_STUDIO, "stage=[sft,preference,reward,ppo]", "model=hf", f"model.path={tmp_path}/gpt2",
        "sft/init=upstream", "sft.data.limit=16", f"sft.data.path={test_data}/instructions/instruction-data.json",
        f"preference.data.path={test_data}/label-studio/pairwise-export.json",
        f"preference.annotator.export={test_data}/label-studio/pairwise-export.json", "ppo.data.batch_size=4",
        "ppo.module.answers_per_prompt=1", "ppo.module.minibatch_size=4", fast=False,
    )  # fmt: skip
    figures = summary(tmp_path, "label_studio")
    assert figures["reward"]["val_pairs"] == 4 and "pretrain" not in figures
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "label_studio" / "ppo" / "model")
    assert tokenizer("Where?")["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "gpt2")("Where?")["input_ids"]
