import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.models import policy_from_config
from lit_rlhf.stages import FewShotDataModule, FewShotModule, WorldFewShotDataModule
from lit_rlhf.stages.few_shot.module import choice_scores
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training import make_trainer

ROWS = [{"text": f"Text {i}.", "label": ("cat", "a long dog")[i % 2]} for i in range(30)]
OPEN = [{"prompt": f"Q {i}", "answers": ["yes", "it is so"]} for i in range(30)]


@pytest.fixture
def data(tmp_path, tokenizer):
    def make(rows=ROWS, **settings):
        write_jsonl(tmp_path / "t.jsonl", rows)
        settings = {"tokenizer": tokenizer, "shots": [2, 0], "held_out": 0.3, **settings}
        module = FewShotDataModule(tmp_path / "t.jsonl", **settings)
        module.setup()
        return module

    return make


@pytest.fixture
def ask(tmp_path):
    """(policy, data, settings) -> the module, after it was asked."""

    def run(policy, data, **settings):
        module = FewShotModule(policy, data.tokenizer, **settings)
        trainer = make_trainer("cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.test(module, datamodule=data, verbose=False)
        return module

    return run


def test_the_prompt_by_hand(data):
    made = data(template="In: {question}\nOut: {answer}", separator="\n--\n", instruction="Which animal?")
    question, label = made.val_set[0].question, {r["text"]: r["label"] for r in ROWS}
    text = made.prompt(0, 2)
    start, first, second, last = text.split("\n--\n")
    assert (start, last) == ("Which animal?", f"In: {question}\nOut:")
    for example in (first, second):
        shown, _, told = example.removeprefix("In: ").partition("\nOut: ")
        assert told == label[shown] and shown not in {shot.question for shot in made.val_set}
    assert made.prompt(0, 0) == f"Which animal?\n--\n{last}"
    assert made.prompt(0, 1) == f"Which animal?\n--\n{first}\n--\n{last}"  # examples of fewer are among those of more
    assert len({made.prompt(0, 20), data(seed=1).prompt(0, 20)}) == 2
    batch = made._collate(0, [0])
    assert made.tokenizer.decode(batch.prompts[0]) == f"<|endoftext|>{made.prompt(0, 0)}"
    assert [made.tokenizer.decode(c) for c in batch.choices[0]] == [" a long dog", " cat"]


@pytest.mark.parametrize("template", ["{question}\n{answer}", "Q: {question} A: {answer}"])
def test_choices_have_the_tokens_that_they_have_behind_the_prompt(data, sentencepiece, template):
    made = data(template=template, tokenizer=sentencepiece)
    batch = made._collate(1, [0])
    for choice, text in zip(batch.choices[0], batch.tasks[0].choices, strict=True):
        whole = sentencepiece(batch.texts[0] + template[-9:].removesuffix("{answer}").strip("\n") + text)["input_ids"]
        assert batch.prompts[0][1:] + choice == whole


def test_likelihoods_are_those_of_plain_transformers(family, data, ask, logprobs_of):
    made = data(batch_size=3)
    modules = {way: ask(family, made, normalize=way) for way in ("sum", "token", "byte")}
    for k in (0, 2):
        for place, answer in enumerate(modules["sum"].answers[k]):
            [prompt], [choices] = made._collate(k, [place])[2:4]
            sums = [logprobs_of(family, prompt + c, len(c)).sum().item() for c in choices]
            for way, divisors in (("sum", (1, 1)), ("token", map(len, choices)), ("byte", (10, 3))):
                scores = [total / by for total, by in zip(sums, divisors)]
                assert answer[way] == made.val_set[place].choices[scores.index(max(scores))]
    for way, module in modules.items():
        right = sum(a[way] == t.answers[0] for a, t in zip(module.answers[2], made.val_set))
        row, n = module.figures()["shots"]["2"], len(made.val_set)
        assert (row["accuracy"], row["n"], row["by"][way]) == (right / n, n, right / n)
        assert row["low"] < right / n < row["high"] or right in (0, n)


def test_choice_scores_by_hand():
    scores = choice_scores([-6.0, -4.0], [3, 1], [12, 4])
    assert scores == {"sum": [-6.0, -4.0], "token": [-2.0, -4.0], "byte": [-0.5, -1.0]}


def test_what_does_not_fit_is_left_out_and_counted(model_config, data, ask, tokenizer, capsys):
    length = "n_positions" if model_config["model_type"] == "gpt2" else "max_position_embeddings"
    made = data(shots=[0, 2, 6])
    longest = {
        k: [len(p) + len(c[0]) for p, c in zip(*made._collate(k, range(len(made.val_set)))[2:4])] for k in (2, 6)
    }
    room = sorted(longest[2])[len(longest[2]) // 2]  # half of those behind two examples fit, none behind six
    policy = policy_from_config({**model_config, length: room}, tokenizer)
    module = ask(policy, made)
    shots = module.figures()["shots"]
    fitting = sum(n <= room for n in longest[2])
    assert [shots[k]["too_long"] for k in "026"] == [0, len(made.val_set) - fitting, len(made.val_set)]
    assert [shots[k]["n"] for k in "026"] == [len(made.val_set), fitting, 0]
    assert f"({room} tokens) are left out: {shots['2']['too_long']} behind 2, " in capsys.readouterr().out
    assert shots["6"]["accuracy"] is None
    assert (module.figures()["k"], module.figures()["accuracy"]) == (0, shots["0"]["accuracy"])


def test_an_open_answer_is_met_word_for_word_up_to_the_end_of_its_line(data, ask, family, monkeypatch, tmp_path):
    from lit_rlhf.stages.few_shot import module as written

    texts = ["yes\nQ 2", " it  is so", "Yes", "no"]

    def sample(engine, policy, tokenizer, prompts, sampling):
        assert sampling.temperature == 0
        return SimpleNamespace(texts=lambda _: [texts[i % 4] for i in range(len(prompts))])

    monkeypatch.setattr(written, "sample", sample)
    made = data(OPEN, batch_size=4, limit_held_out=4)
    assert made.task == "exact match" and len(made.val_set) == 4
    module = ask(family, made)
    row = module.figures()["shots"]["0"]
    assert (row["accuracy"], row["by"]) == (0.5, {"greedy": 0.5})
    assert module.figures()["guessing"] == 0
    module.export(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [r["told"]["2"]["greedy"] for r in rows] == ["yes", "it is so", "Yes", "no"]


def test_open_answers_are_really_written(data, ask, family):
    made = data(OPEN, batch_size=4, limit_held_out=5)
    module = ask(family, made, max_new_tokens=5)
    prompt = torch.tensor(made._collate(2, [3]).prompts)
    with torch.no_grad():
        for _ in range(5):
            token = family.eval()(input_ids=prompt).logits[:, -1].argmax(-1)
            prompt = torch.cat([prompt, token[:, None]], 1)
    text = made.tokenizer.decode(prompt[0, -5:], skip_special_tokens=True).strip().split("\n")[0]
    if made.tokenizer.eos_token_id not in prompt[0, -5:]:
        assert module.answers[2][3] == {"greedy": " ".join(text.split())}


def test_the_worlds_tasks_are_asked(world, tokenizer, policy, ask):
    for task in ("kind", "truth", "choice", "same", "answer"):
        data = WorldFewShotDataModule(world, tokenizer, task=task, shots=[0, 1], limit_held_out=12, examples=50)
        data.setup()
        figures = ask(policy, data, max_new_tokens=4).figures()
        assert figures["examples"] == 12 and set(figures["shots"]) == {"0", "1"}
        guessing = {"kind": 1 / 7, "truth": 0.5, "same": 0.5, "answer": 0.0}.get(task, figures["guessing"])
        assert_close(figures["guessing"], guessing)


@pytest.mark.parametrize(
    ("rows", "settings", "reason"),
    [
        ([*ROWS, *OPEN], {}, "holds open questions and others"),
        (ROWS, {"shots": [999]}, "shots (few_shot.data): 999 examples are asked for, and there are"),
        (ROWS, {"shots": []}, "shots=[] (few_shot.data)"),
        (ROWS, {"template": "{answer} {question}"}, "{question} once and {answer} once, at its end"),
    ],
)
def test_bad_settings_are_one_line(rows, settings, reason, data):
    with pytest.raises(UserError) as error:
        data(rows, **settings)
    assert reason in str(error.value)
