"""Evaluation with random models: who answers what does not matter, how it is counted does."""

import json
import math
import re
from itertools import combinations

import pytest
import torch
from judge_server import JudgeServer, completion
from lightning import Trainer
from torch.testing import assert_close
from torchmetrics.text import Perplexity

from lit_rlhf.errors import UserError
from lit_rlhf.functional import length_controlled_win_rate, win_rate
from lit_rlhf.models import policy_from_config
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import EvaluateDataModule, EvaluateModule, WorldEvaluateDataModule
from lit_rlhf.stages.evaluate.answers import Answers, estimates, measures
from lit_rlhf.stages.evaluate.text import text_figures, text_nats
from lit_rlhf.stages.preference import LLMJudge
from lit_rlhf.text import train_bpe
from lit_rlhf.text.chat import ensure_chat_template
from lit_rlhf.text.records import write_jsonl


@pytest.fixture
def models(policy, tokenizer, model_of):
    return {"base": (model_of(1), tokenizer), "sft": (policy, tokenizer), "mine": (model_of(2), tokenizer)}


@pytest.fixture
def model_of(tokenizer):
    def make(seed, tokens=tokenizer):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return policy_from_config({"model_type": "llama", "max_position_embeddings": 128, **sizes}, tokens)

    return make


def evaluated(data, *args, temperature=1.0, **settings):
    data.setup()
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    module = EvaluateModule(*args, **data.for_module(), samples=2, sampling=sampling, **settings)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(module, datamodule=data, verbose=False)
    return module


@pytest.fixture
def data(world, tokenizer):
    return WorldEvaluateDataModule(world, tokenizer, limit_held_out=10, batch_size=4, text_documents=5)


class Shortest:
    """Prefers short answers; equally short ones tie."""

    name = "the shortest"

    def __call__(self, prompts, responses):
        self.asked = [*getattr(self, "asked", []), *responses]
        return [[sorted({len(t) for t in texts}).index(len(text)) + 1 for text in texts] for texts in responses]


def test_all_meet_all_and_each_figure_has_its_interval(data, models, reward_model):
    module = evaluated(data, models, reward_model, best_of=3)
    figures = module.figures()
    assert list(figures["models"]) == ["base", "prompted", "sft", "mine"]
    assert figures["judge"] == "gold" and figures["prompts"] == 10
    assert set(figures["ratings"]["models"]) == {"base", "prompted", "sft", "mine", "best_of_n"}
    assert figures["ratings"]["models"]["sft"] == {"elo": 1000.0, "low": 1000.0, "high": 1000.0}
    for name, model in figures["models"].items():
        for key, ends in model["interval"].items():
            assert ends["low"] <= model[key] <= ends["high"], (name, key)
        assert {"entropy", "distinct_1", "distinct_2", "self_similarity", "score", "right"} <= set(model["interval"])
    assert figures["models"]["mine"]["kl"] > 0 and figures["models"]["sft"]["kl"] == 0
    rate = figures["win_rate"]["mine_vs_sft"]
    gold = {n: torch.tensor([[g["gold"] for g in row] for row in module.answers[n].grades]) for n in ("mine", "sft")}
    assert rate["mean"] == win_rate(gold["mine"], gold["sft"]).mean
    assert set(figures["changes"]) == {"mine"}
    change, both = figures["changes"]["mine"]["words"], figures["models"]
    assert change["change"] == pytest.approx(both["mine"]["words"] - both["sft"]["words"])


class First:
    """Prefers what comes first, as a noisy judge may: also of two answers that are the same text."""

    def __call__(self, prompts, responses):
        return [[*range(1, len(texts) + 1)] for texts in responses]


def test_equal_answers_tie_though_the_judge_ranks_them(data, models, policy, tokenizer):
    models = {"sft": models["sft"], "mine": (policy, tokenizer)}
    module = evaluated(data, models, annotator=First(), temperature=0.0)
    assert module.answers["mine"].texts == module.answers["sft"].texts
    figures = module.figures()
    assert figures["win_rate"]["mine_vs_sft"]["mean"] == 0.5
    assert figures["ratings"]["models"]["mine"]["elo"] == pytest.approx(1000.0)


def test_an_annotator_decides_where_there_is_one(data, models, reward_model):
    shortest = Shortest()
    module = evaluated(data, models, reward_model, best_of=2, annotator=shortest, prompted_base=False)
    figures = module.figures()
    assert figures["judge"] == "the shortest"
    assert [len(texts) for texts in shortest.asked] == [2 + 2 + 2 + 1] * 10  # all contestants' answers to a prompt
    lengths = {n: torch.tensor([[-len(t) for t in row] for row in module.answers[n].texts]) for n in ("mine", "sft")}
    assert figures["win_rate"]["mine_vs_sft"]["mean"] == win_rate(lengths["mine"], lengths["sft"]).mean
    assert figures["models"]["sft"]["gold"] is not None  # the gold judge is still heard


def test_a_language_model_judges_in_both_orders_and_length_is_taken_out(data, models, capsys):
    """The judge prefers the longer answer, and the first of two that are equally long."""

    def longer(request):
        asked = json.loads(request.body)["messages"][1]["content"]
        first, second = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\n", asked, re.DOTALL).groups()
        return 200, completion("A" if len(first) >= len(second) else "B"), {}

    server, said = JudgeServer(longer), []
    judge = LLMJudge(server.url, "stub", special_tokens="rendered")
    settings = {"best_of": 0, "prompted_base": False, "annotator": judge}
    data.note = said.append
    del models["base"]
    module = evaluated(data, models, **settings)
    server.close()
    assert any("up to 12 questions per prompt, about 4 answers" in line for line in said)
    figures = module.figures()
    texts = [module.answers[name].texts for name in ("mine", "sft")]
    lengths = [torch.tensor([[len(text) for text in row] for row in side], dtype=torch.float64) for side in texts]
    rate = figures["win_rate"]["mine_vs_sft"]
    pairs = [pair for row in zip(*(module.answers[name].texts for name in models)) for pair in
             combinations(dict.fromkeys(text for side in row for text in side), 2)]  # fmt: skip
    assert figures["judge"] == "llm_judge:stub" and figures["judge_verdicts"] >= len(pairs)
    assert figures["judge_by_place"] == pytest.approx(sum(len(a) == len(b) for a, b in pairs) / len(pairs))
    assert rate["mean"] == win_rate(*lengths, texts).mean
    fair = length_controlled_win_rate(*lengths, texts)
    assert rate["length_controlled"] == {"mean": fair.mean, "low": fair.low, "high": fair.high}


@pytest.mark.parametrize("share_prompts", [True, False])
def test_answers_are_read_in_batches_bounded_in_memory(data, models, reward_model, monkeypatch, share_prompts):
    settings = {"best_of": 0, "prompted_base": False, "share_prompts": share_prompts}
    whole = evaluated(data, models, reward_model, **settings)
    monkeypatch.setattr("lit_rlhf.models.micro_batches.LOOKING", 2**15)  # some 40 tokens at once
    read = []
    hook = reward_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    parts = evaluated(data, models, reward_model, **settings)
    hook.remove()
    assert (
        len(read) > 3 * 2 * 3 * 2 and max(read) < 100
    )  # more passes than models, ways of sampling and batches of prompts
    for name, known in whole.answers.items():
        assert parts.answers[name].texts == known.texts
        assert_close(torch.tensor(parts.answers[name].scores), torch.tensor(known.scores), atol=1e-4, rtol=1e-4)
        assert_close(torch.tensor(parts.answers[name].kl), torch.tensor(known.kl), atol=1e-4, rtol=1e-4)


def test_the_reward_model_can_decide_though_there_is_a_gold_judge(data, models, reward_model):
    module = evaluated(data, models, reward_model, best_of=0, judge="reward_model")
    scores = {n: torch.tensor(module.answers[n].scores) for n in ("mine", "sft")}
    assert module.figures()["judge"] == "reward model (proxy)"
    assert module.figures()["win_rate"]["mine_vs_sft"]["mean"] == win_rate(scores["mine"], scores["sft"]).mean


def test_a_judge_that_is_not_there_is_refused(data, models):
    with pytest.raises(
        UserError, match=r"judge='annotator' .evaluate.module.judge.: there is none in this evaluation; there is gold"
    ):
        evaluated(data, models, judge="annotator")


def test_a_model_with_other_tokens_is_scored_by_its_words(data, models, reward_model, model_of, world):
    other = train_bpe(world.corpus(50, 1), vocab_size=400)
    ensure_chat_template(other)
    module = evaluated(data, {**models, "other": (model_of(3, other), other)}, reward_model, best_of=0)
    figures = module.figures()["models"]["other"]
    assert figures["kl"] is None  # SFT does not know its tokens
    assert math.isfinite(figures["score"]) and figures["text"]["bits_per_byte"] > 0


def test_without_anyone_to_judge_nothing_is_compared(tmp_path, tokenizer, models):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Say {i}."} for i in range(40)])
    data = EvaluateDataModule(tmp_path / "p.jsonl", tokenizer, held_out=0.3)
    figures = evaluated(data, models).figures()
    assert figures["win_rate"] == {} and "ratings" not in figures and figures["judge"] is None
    assert figures["models"]["sft"]["gold"] is None and "perplexity" not in figures["models"]["sft"]
    assert figures["models"]["sft"]["interval"]["self_similarity"]["prompts"] == figures["prompts"]


def test_measures_by_hand():
    answers = Answers(texts=[["a b", "a c"], ["d", "d"]], entropy=[[1.0, 2.0], [1.0, 0.0]], tokens=[[3, 3], [1, 1]])
    found = {name: measured.estimate().value for name, measured in measures(answers).items()}
    assert found["entropy"] == 4 / 8  # nats per token, not a mean of means
    assert found["words"] == 6 / 4
    assert found["distinct_1"] == (3 / 4 + 1 / 2) / 2
    assert found["self_similarity"] == (1 / 3 + 1) / 2  # ^a ab b$ and ^a ac c$: one of three
    assert found["different"] == 3 / 4
    assert "gold" not in found and "kl" not in found


def test_never_right_is_not_certainly_never():
    grades = [[dict.fromkeys(("gold", "correct", "polite", "right"), 0.0)]] * 20
    assert estimates(Answers(grades=grades))["right"][:3] == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)


def test_perplexity_is_that_of_torchmetrics(policy, tokenizer, world):
    documents = world.corpus(6, 3)
    nats, tokens, _ = text_nats(policy, tokenizer, documents, row_length=24)
    end = tokenizer.eos_token_id
    ids = [end, *(t for text in documents for t in [*tokenizer(text)["input_ids"], end])]
    metric = Perplexity()
    for i in range(0, len(ids) - 1, 24):
        row = torch.tensor([ids[i : i + 25]])
        with torch.no_grad():
            metric.update(policy(row[:, :-1]).logits, row[:, 1:])
    assert tokens.sum() == len(ids) - 1  # every token is predicted once, the first behind a separator
    figures = text_figures(policy, tokenizer, documents, 24)
    assert figures["perplexity"] == pytest.approx(metric.compute().item(), rel=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(nats.sum() / tokens.sum()))
    assert figures["low"] < figures["perplexity"] < figures["high"]


def test_bits_per_byte_leave_separators_out_on_both_sides(policy, tokenizer):
    """As nanochat's ``evaluate_bpb``: nats of tokens that have bytes over ln 2 times these; special ones have none."""
    special = tokenizer.all_special_ids
    sizes = [0 if i in special else len(tokenizer.decode([i]).encode()) for i in range(len(tokenizer))]
    documents = [f"Line {i}." for i in range(7)]  # of few tokens each: their separators weigh
    ids = [tokenizer(text)["input_ids"] for text in documents]
    sequence = [tokenizer.eos_token_id, *(token for document in ids for token in [*document, tokenizer.eos_token_id])]
    with torch.no_grad():
        logprobs = policy(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    nats = -sum(logprobs[i - 1, token].item() for i, token in enumerate(sequence) if i and sizes[token])
    figures = text_figures(policy, tokenizer, documents, 120)  # all in one row
    assert len(sequence) < 120 and figures["tokens"] == len(sequence) - 1
    expected = nats / (math.log(2) * sum(sizes[token] for token in sequence))
    assert figures["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("row_length", [2, 5, 64])
def test_bits_per_byte_of_a_model_that_knows_nothing(policy, tokenizer, row_length):
    with torch.no_grad():
        policy.get_output_embeddings().weight.zero_()  # every token has the probability 1 / V
    documents = ["Line 0.", "", "Ein Wörtchen.", "Line 2."]
    own, size = sum(map(len, tokenizer(documents)["input_ids"])), policy.config.vocab_size
    figures = text_figures(policy, tokenizer, documents, row_length)
    assert figures["bits_per_byte"] == pytest.approx(own * math.log2(size) / (7 + 14 + 7))
    assert figures["perplexity"] == pytest.approx(size) and figures["tokens"] == own + 4


def test_bad_records_of_the_text_are_counted_with_the_prompts(tokenizer, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {i}?"} for i in range(8)] + [{"prompt": 3}])
    write_jsonl(tmp_path / "text.jsonl", [{"text": "a text"}, {"text": 4}, {"other": "x"}])
    files = {"text": str(tmp_path / "text.jsonl"), "held_out": 0.5, "on_bad_record": "skip"}
    data = EvaluateDataModule(str(tmp_path / "prompts.jsonl"), tokenizer, **files)
    data.setup()
    assert len(data.skipped) == 3 and len(data.documents()) == 1
