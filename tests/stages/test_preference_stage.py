"""Collecting: several models and temperatures, equal answers, people, what is stopped."""

import copy
import json

import pytest
import torch

from lit_rlhf.errors import UserError, Waiting
from lit_rlhf.models import policy_from_config
from lit_rlhf.rollouts import FastEngine, Sampling
from lit_rlhf.stages import PreferenceDataModule, PreferenceModule, WorldPreferenceDataModule
from lit_rlhf.stages.preference import Labels, LabelStudio, agreement
from lit_rlhf.text.chat import BASE_TEMPLATE
from lit_rlhf.text.records import load_records, parse_ranking, write_jsonl
from lit_rlhf.training import make_trainer

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 160, "initializer_range": 0.3,
}  # fmt: skip


def by_length(prompts, responses):
    return [[1 + sum(len(o) > len(a) for o in answers) for a in answers] for answers in responses]


class Watched(FastEngine):
    """Shows ``look`` the tokenizer and all requests."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def generate(self, requests, **settings):
        self.look(self.tokenizer, requests)
        return super().generate(requests, **settings)


@pytest.fixture
def collect(world, tokenizer, policy, tmp_path):
    """(annotator, settings) -> (module, folder of the stage) after one pass over a few prompts."""

    def run(annotator=by_length, data=None, policy=policy, tokenizer=tokenizer, **settings):
        progress_file = tmp_path / "preference/progress.jsonl"
        settings = {"sampling": Sampling(max_new_tokens=5), "progress_file": progress_file, **settings}
        data = data or WorldPreferenceDataModule(world, tokenizer, prompts=12, batch_size=5, limit_held_out=4)
        data.setup()
        handed = {**data.for_module(), "tokenizer": tokenizer}
        module = PreferenceModule(policy, annotator=annotator, **handed, **settings)
        trainer = make_trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.predict(module, datamodule=data, return_predictions=False)
        return module, tmp_path / "preference"

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def base(tokenizer):
    torch.manual_seed(5)
    own = copy.deepcopy(tokenizer)
    own.chat_template = BASE_TEMPLATE
    return policy_from_config(CONFIG, own), own


def test_answers_are_dealt_over_models_and_temperatures(collect, base):
    module, folder = collect(others={"base": base}, temperatures=[0.7, 1.3], answers_per_prompt=4, round=3)
    module.export(folder)
    records = rows(folder.parent / "data/rankings-3.jsonl")
    assert len(records) == 16
    for record in records:
        assert sorted(zip(record["models"], record["temperatures"])) == [
            ("base", 0.7), ("base", 1.3), ("sft", 0.7), ("sft", 1.3),
        ]  # fmt: skip
        assert len(record["responses"]) == len(record["ranks"]) == len(record["finished"]) == 4
        assert (record["round"], record["annotator"]) == (3, "by_length")
    loaded = load_records(folder.parent / "data/rankings-3.jsonl", parse_ranking).records
    assert loaded[0].lineage["models"] == records[0]["models"]
    assert all("ranks" not in row for row in rows(folder.parent / "data/answers-3.jsonl"))


def test_with_fewer_answers_than_turns_all_turns_come_up(collect, base):
    module, _ = collect(others={"base": base}, temperatures=[0.5, 1.0, 1.5], answers_per_prompt=2)
    turns = [turn for r in module.answers for turn in zip(r["models"], r["temperatures"])]
    assert len(set(turns)) == 6
    assert all(len(set(r["models"])) == 2 for r in module.answers)


def test_each_model_is_prompted_by_its_own_template(collect, base):
    seen = {}

    def look(tokenizer, requests):
        texts = tokenizer.batch_decode([request.prompt for request in requests])
        seen.setdefault(tokenizer.chat_template == BASE_TEMPLATE, []).extend(texts)

    collect(others={"base": base}, engine=Watched(look))
    assert all(text.endswith("<|assistant|>") for text in seen[False])
    assert not any("<|" in text for text in seen[True])


def test_equal_answers_are_drawn_again_then_dropped_and_counted(collect, tmp_path):
    greedy, _ = collect(temperatures=[0.0], progress_file=None)
    figures = greedy.figures()
    assert (figures["left_out"], figures["equal"], figures["answers"]) == (16, 48, 0)  # K texts alike, every time
    with pytest.raises(UserError, match=r"all answers to a prompt are the same text.*temperature"):
        greedy.export(tmp_path / "preference")
    mixed, _ = collect(temperatures=[0.0, 1.0], progress_file=None, answers_per_prompt=4)
    assert all(len(set(r["responses"])) == len(r["responses"]) >= 2 for r in mixed.answers)
    figures = mixed.figures()
    assert figures["equal"] == sum(4 - len(r["responses"]) for r in mixed.answers) >= 16  # both greedy ones are alike
    assert figures["pairs"] + figures["ties"] == sum(
        len(r["ranks"]) * (len(r["ranks"]) - 1) // 2 for r in mixed.records
    )


def test_drawing_again_makes_more_different_answers(collect):
    sampling = Sampling(max_new_tokens=1, top_k=6)  # few possible answers
    kept = [collect(sampling=sampling, redraws=n, progress_file=None)[0].figures()["equal"] for n in (0, 3)]
    assert kept[0] > kept[1]


def test_a_stopped_collection_goes_on_and_ranks_nothing_twice(collect, tmp_path):
    whole = collect(progress_file=None)[0].records
    calls = []

    def fails_at_the_third(prompts, responses):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_length(prompts, responses)

    fails_at_the_third.name = "by_length"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        collect(fails_at_the_third)
    progress_file, ranks = tmp_path / "preference/progress.jsonl", tmp_path / "preference/progress.ranks.jsonl"
    assert (len(rows(progress_file)), len(rows(ranks))) == (3, 2)  # the third batch's answers are kept, too
    with ranks.open("a") as file:
        file.write("[2, [[1")  # killed while it wrote
    module, folder = collect(fails_at_the_third)
    assert module.records == whole and calls == [5, 5, 5, 5, 1]
    module.export(folder)
    assert not progress_file.exists() and not ranks.exists()


def test_pairs_that_all_tie_are_a_warning(collect):
    module, _ = collect(lambda prompts, responses: [[1] * len(texts) for texts in responses], progress_file=None)
    pairs = module.figures()["ties"]
    assert pairs and module.figures()["warning"].startswith(f"all {pairs} pairs of answers tie")
    assert "warning" not in collect(progress_file=None)[0].figures()


def test_answers_that_are_there_are_ranked_by_somebody_else(collect, tmp_path, tokenizer):
    module, folder = collect()
    module.export(folder)
    answers = tmp_path / "data/answers-0.jsonl"

    def the_other_way(prompts, responses):
        return [[1 + sum(len(o) < len(a) for o in texts) for a in texts] for texts in responses]

    data = PreferenceDataModule(answers, tokenizer, held_out=0.3, batch_size=4)
    other, _ = collect(
        the_other_way, data, answers="given", progress_file=None, compare=str(tmp_path / "data/rankings-0.jsonl")
    )
    known = {json.dumps(r["prompt"]): r for r in rows(answers)}
    assert len(other.records) == len(known)
    assert all(r["responses"] == known[json.dumps(r["prompt"])]["responses"] for r in other.records)
    assert all(r["models"] == known[json.dumps(r["prompt"])]["models"] for r in other.records)
    figures = other.figures()
    assert figures["annotators"] == 2 and figures["alpha"] < 0 and figures["kappa"] < 0
    with pytest.raises(UserError, match=r"answers='given' .*the prompt .* has no 'responses'"):
        collect(answers="given", progress_file=None)
    for models in (None, ["a"]):  # a column of a table; a list that is too short
        write_jsonl(answers, [{**row, "models": models} for row in known.values()])
        data = PreferenceDataModule(answers, tokenizer, held_out=0.3, batch_size=4)
        if models is None:
            given, _ = collect(the_other_way, data, answers="given", progress_file=None)
            assert all(r["models"] == [None] * len(r["responses"]) for r in given.records)
        else:
            with pytest.raises(UserError, match=r"has \d responses, and 'models' 1 entries"):
                collect(the_other_way, data, answers="given", progress_file=None)


def test_people_are_waited_for_and_judge_what_was_drawn(collect, tmp_path, policy):
    labels = tmp_path / "data/labels-0.jsonl"
    module, folder = collect(Labels(labels))
    with pytest.raises(Waiting, match=r"16 prompts with their answers are in .*stage=label.*labels-0.jsonl"):
        module.export(folder)
    answers = rows(tmp_path / "data/answers-0.jsonl")
    tools = [{"name": "add"}]
    judged = [{"prompt": r["prompt"], "responses": r["responses"][::-1], "ranks": [*range(1, len(r["responses"]) + 1)],
               "annotator": who, "tools": tools} for r in answers[:6] for who in ("ann", "bob")]  # fmt: skip
    labels.write_text("".join(json.dumps(r) + "\n" for r in judged))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # would answer otherwise now: nothing may be drawn anew
    module, folder = collect(Labels(labels))
    module.export(folder)
    records = rows(tmp_path / "data/rankings-0.jsonl")
    assert [(r["responses"], r["annotator"]) for r in records] == [(r["responses"], r["annotator"]) for r in judged]
    assert records[0]["models"] == ["sft"] * len(records[0]["responses"]) and records[0]["tools"] == tools
    figures = module.figures()
    assert (figures["rankings"], figures["unjudged"]) == (12, len(answers) - 6)
    assert (figures["annotators"], figures["annotators_agree"], figures["kappa"]) == (2, 1.0, 1.0)
    assert agreement(records).alpha == 1.0


@pytest.mark.parametrize("in_parts", [False, True])
def test_label_studio_there_and_back(collect, tokenizer, tmp_path, in_parts):
    data = None
    if in_parts:  # with a tool, which people are not shown
        parts = [[{"type": "text", "text": f"What is {i}?"}] for i in range(24)]
        asked = [{"prompt": [{"role": "user", "content": part}], "tools": [{"name": "add"}]} for part in parts]
        write_jsonl(tmp_path / "p.jsonl", asked)
        data = PreferenceDataModule(tmp_path / "p.jsonl", tokenizer, batch_size=12, held_out=0.2)
    with pytest.raises(Waiting, match=r"label_studio_template-0.xml and import .*label_studio_tasks-0.json"):
        module, folder = collect(LabelStudio(kind="pairwise"), data, answers_per_prompt=2)
        module.export(folder)
    todo = json.loads((tmp_path / "data/label_studio_tasks-0.json").read_text())
    for number, task in enumerate(todo):
        longer = "left" if len(task["data"]["answer1"]) >= len(task["data"]["answer2"]) else "right"
        result = [{"type": "pairwise", "to_name": ["answer1", "answer2"], "value": {"selected": longer}}]
        task |= {"id": number, "annotations": [{"id": number, "completed_by": 1, "result": result}]}
    (tmp_path / "export.json").write_text(json.dumps(todo))
    assert all(isinstance(turn["content"], str) for task in todo for turn in task["data"]["messages"])
    module, folder = collect(LabelStudio(tmp_path / "export.json", "pairwise"), data, answers_per_prompt=2)
    module.export(folder)
    records = rows(tmp_path / "data/rankings-0.jsonl")
    assert len(records) == len(todo) > 10
    for record in records:
        best = record["responses"][record["ranks"].index(1)]
        assert len(best) == max(map(len, record["responses"])) and record["models"] == ["sft", "sft"]
        assert not in_parts or (record["prompt"][0]["content"] in parts and record["tools"] == [{"name": "add"}])


def test_two_models_of_one_name(policy, tokenizer, base):
    with pytest.raises(UserError, match="'sft', which is the policy's name"):
        PreferenceModule(policy, tokenizer, by_length, others={"sft": base})


def test_tools_stand_in_front_of_prompts_and_in_the_records(collect, base, tokenizer, tmp_path, monkeypatch):
    tool = {"type": "function", "function": {"name": "multiply"}}
    template = "{{ tools[0].function.name + ' ' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = f"{{% if tools %}}{template}{{% else %}}{BASE_TEMPLATE}{{% endif %}}"
    for own in (tokenizer, base[1]):
        monkeypatch.setattr(own, "chat_template", template)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"What is {i}?", "tools": [tool]} for i in range(8)])
    data = PreferenceDataModule(tmp_path / "p.jsonl", tokenizer, batch_size=8, held_out=0.2)
    seen = []

    def look(tokenizer, requests):
        seen.extend(tokenizer.batch_decode([request.prompt for request in requests]))

    module, folder = collect(data=data, others={"base": base}, engine=Watched(look), redraws=0)
    module.export(folder)
    assert seen and all(text.startswith("multiply ") for text in seen)
    records = rows(folder.parent / "data/rankings-0.jsonl")
    assert records and all(record["tools"] == [tool] for record in records)
    assert not any("nobody reads" in note for note in data.notes)


@pytest.mark.parametrize("special_tokens", ["plain", "rendered"])
def test_a_base_model_as_the_policy_goes_on_with_a_transcript(collect, base, tmp_path, special_tokens):
    policy, tokenizer = base
    policy.config.max_position_embeddings, tokenizer.chat_template = 1000, None  # as a checkpoint may come
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"What is {i}?"} for i in range(8)])
    settings = {"batch_size": 8, "held_out": 0.2, "special_tokens": special_tokens}
    data = PreferenceDataModule(tmp_path / "p.jsonl", tokenizer, **settings)
    seen, stops = [], set()

    def look(tokenizer, requests):
        seen.extend(tokenizer.batch_decode([request.prompt for request in requests]))
        stops.update(request.sampling.stop for request in requests)

    collect(data=data, policy=policy, tokenizer=tokenizer, engine=Watched(look), redraws=0)
    if special_tokens == "rendered":  # as it stands in the file
        assert stops == {()} and all(text.startswith("What is ") for text in seen)
        return
    assert stops == {("\nHuman:", "\nAssistant:")}
    assert all(text.startswith("A conversation between a human") and text.endswith("?\n\nAssistant:") for text in seen)
    assert [n for n in data.notes if n.startswith("sft is a base model: it goes on with a transcript of")]
