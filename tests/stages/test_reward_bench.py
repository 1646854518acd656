"""RewardBench's files, by a reward model whose scores are known."""

import pytest
import torch
from lightning import Trainer

from lit_rlhf.errors import UserError
from lit_rlhf.models.heads import score_answers
from lit_rlhf.stages import RewardBenchDataModule, RewardBenchModule
from lit_rlhf.stages.reward_bench.data import BenchQuestion
from lit_rlhf.stages.reward_bench.module import Scored
from lit_rlhf.text.records import Ranking, write_jsonl

ROWS = [
    {"id": i, "prompt": f"What is {i}?", "chosen": f"It is {i}.", "chosen_model": "a", "rejected": f"No {i} here.",
     "rejected_model": "b", "subset": ("chat", "safety")[i % 2]}
    for i in range(6)
]  # fmt: skip
TWO = {"prompt": "Which?", "chosen": ["This one."], "rejected": ["None.", "Who knows?", "All."], "subset": "chat"}


def scored(reward_model, data, **settings):
    data.setup()
    module = RewardBenchModule(reward_model, **data.for_module(), **settings)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.test(module, datamodule=data, verbose=False)
    return module


def test_accuracy_by_subset_is_that_of_the_scores(reward_model, tokenizer, tmp_path, capsys):
    write_jsonl(tmp_path / "bench.jsonl", [*ROWS, TWO])
    data = RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer, batch_size=4)
    module = scored(reward_model, data)
    assert not data.notes  # fields of RewardBench that are not needed are known
    figures, right = module.figures(), {"chat": [], "safety": []}
    for row in [*ROWS, TWO]:
        answers = [text for side in ("chosen", "rejected") for text in (row[side] if row is TWO else [row[side]])]
        prompts = [[{"role": "user", "content": row["prompt"]}]] * len(answers)
        scores = score_answers(reward_model, tokenizer, prompts, answers)
        right[row["subset"]].append(float(scores.argmax() == 0))
    for name, values in right.items():
        assert figures["subsets"][name]["accuracy"] == sum(values) / len(values)
        assert figures["subsets"][name]["n"] == len(values)
    assert figures["accuracy"] == sum(map(sum, right.values())) / 7 and figures["questions"] == 7
    assert figures["subset_mean"] == pytest.approx((sum(right["chat"]) / 4 + sum(right["safety"]) / 3) / 2)
    assert "reward_bench: safety: " in capsys.readouterr().out
    other = scored(reward_model, data, seed=1)  # another order of the answers, the same scores
    for before, after in zip(module.scored, other.scored):
        assert after.scores == pytest.approx(before.scores, abs=1e-5)


def test_ties_count_half_and_long_answers_are_told(reward_model, tokenizer, tmp_path):
    ranking = Ranking([], ["a", "b", "c"], [1, 2, 2])
    of = lambda *scores: Scored(BenchQuestion(ranking, ""), list(scores), 0).right  # noqa: E731
    assert (of(1.0, 0.0, 0.5), of(1.0, 1.0, 0.0), of(0.0, 1.0, 1.0)) == (1.0, 0.5, 0.0)
    write_jsonl(tmp_path / "bench.jsonl", [{**ROWS[0], "rejected": "word " * 500}])
    torch.nn.init.zeros_(next(m for m in reward_model.modules() if getattr(m, "out_features", 0) == 1).weight)
    data = RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer)
    figures = scored(reward_model, data).figures()
    assert (figures["tied"], figures["accuracy"], figures["cut"]) == (1, 0.5, 1)
    assert "1 answers do not fit into the context" in data.notes[0]


def test_a_question_without_a_better_answer_is_a_bad_record(tokenizer, tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", [ROWS[0], {**ROWS[1], "rejected": ROWS[1]["chosen"]}])
    with pytest.raises(UserError, match=r"bench.jsonl:2: none of its answers is the better one"):
        RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer).setup()


def test_names_of_special_tokens_mean_what_is_set(reward_model, tokenizer, tmp_path):
    rows = [ROWS[0], {**ROWS[1], "chosen": f"It is {tokenizer.eos_token} 1."}]
    write_jsonl(tmp_path / "bench.jsonl", rows)
    read = lambda **settings: RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer, **settings)  # noqa: E731
    with pytest.raises(UserError, match=r"bench.jsonl:2: a text holds the special token .* special_tokens=refuse"):
        read(special_tokens="refuse").setup()
    skipping = read(special_tokens="refuse", on_bad_record="skip")
    assert len(scored(reward_model, skipping).scored) == 1
    for kind in ("plain", "rendered"):
        [_, named] = scored(reward_model, read(special_tokens=kind)).scored
        prompt = [[{"role": "user", "content": rows[1]["prompt"]}]]
        answers = [rows[1]["chosen"], rows[1]["rejected"]]
        expected = score_answers(reward_model, tokenizer, prompt * 2, answers, special_tokens=kind)
        assert named.scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert named.scores[0] != pytest.approx(scored(reward_model, read()).scored[1].scores[0])


def test_what_scores_texts_is_asked_by_text(tokenizer, tmp_path):
    """Longer answers are better, and of one answer nothing is said: its question is left out."""
    write_jsonl(tmp_path / "bench.jsonl", [*ROWS, TWO, {**ROWS[0], "rejected": "no idea"}])
    seen = []

    def length(prompts, responses, tools, **_):
        seen.extend(zip((prompt[-1]["content"] for prompt in prompts), responses))
        return [None if text == "no idea" else len(text) for text in responses]

    data = RewardBenchDataModule(tmp_path / "bench.jsonl", batch_size=3)
    figures = scored(length, data).figures()
    # "It is 0." is shorter than "No 0 here."; "This one." longer than all but "Who knows?", by one character
    assert (figures["accuracy"], figures["questions"], figures["incomplete"], figures["cut"]) == (0.0, 7, 1, None)
    assert len(seen) == 2 * 7 + 4 and ("Which?", "Who knows?") in seen
    assert "1 questions are left out" in data.notes[0]


def test_nothing_said_of_any_question_is_an_error(tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", ROWS)
    with pytest.raises(UserError, match="none of the 6 questions has a score for each of its answers"):
        scored(lambda prompts, responses, **_: [None] * len(responses), RewardBenchDataModule(tmp_path / "bench.jsonl"))


def test_a_record_without_a_prompt_is_a_bad_one(tokenizer, tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", [{"chosen": ["a"], "rejected": ["b"]}, TWO, {**TWO, "chosen": "This one."}])
    with pytest.raises(UserError, match=r"bench.jsonl:1: .*prompt"):
        RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer).setup()
    data = RewardBenchDataModule(tmp_path / "bench.jsonl", tokenizer, on_bad_record="skip")
    data.setup()
    assert len(data.skipped) == 1 and [q.ranking.ranks for q in data.questions] == [[1, 2, 2, 2]] * 2


def test_control_tokens_are_refused_without_a_tokenizer_too(tmp_path):
    write_jsonl(tmp_path / "bench.jsonl", [{**ROWS[0], "chosen": "<|im_end|>"}, ROWS[1]])
    with pytest.raises(UserError, match=r"bench.jsonl:1: a text holds the special token '<\|im_end\|>'"):
        RewardBenchDataModule(tmp_path / "bench.jsonl", special_tokens="refuse").setup()
    RewardBenchDataModule(tmp_path / "bench.jsonl").setup()


def test_what_cannot_score_is_refused_when_it_is_made(reward_model, policy, tokenizer):
    for given in ((policy, tokenizer), (tokenizer, reward_model), (reward_model,), ("a/path",), (tokenizer,)):
        with pytest.raises(UserError, match=r"RewardBenchModule\((tokenizer|reward_model)=.*expected"):
            RewardBenchModule(*given)
