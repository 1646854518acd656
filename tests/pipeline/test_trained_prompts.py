"""Prompts that were trained on are not evaluated on."""

import json
from types import SimpleNamespace

import pytest
import yaml

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run_folder import input_paths
from lit_rlhf.pipeline.split import remember_split, remembered_split
from lit_rlhf.pipeline.trained_prompts import FILE, check_trained, trained_stages, write_trained_prompts
from lit_rlhf.stages import FewShotDataModule, PPODataModule, RewardDataModule, SFTDataModule
from lit_rlhf.text import train_bpe
from lit_rlhf.text.chat import ensure_chat_template
from lit_rlhf.text.records import Moved, prompt_fingerprint, write_jsonl


def asked(text):
    return [{"role": "user", "content": text}]


class Trained:
    """Data that knows what it was trained on."""

    def __init__(self, *texts):
        self.texts = texts

    def trained_prompts(self):
        return map(asked, self.texts)


def make_stage(run, stage, texts, inputs=(), path="demos.jsonl"):
    folder = run / stage
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({stage: {"data": {"path": path}}}))
    (folder / "done.json").write_text(json.dumps({"inputs": dict.fromkeys(inputs, "0")}))
    write_trained_prompts(stage, folder, Trained(*texts))
    return folder / "model"


def settings(*models, allow_trained=False):
    policies = {f"m{i}": {"path": str(path)} for i, path in enumerate(models)}

    class Settings(dict):
        pass

    found = Settings(policies=policies, reward_model=None)
    found.allow_trained = allow_trained
    return found


def data(*texts):
    return SimpleNamespace(evaluated_prompts=lambda: map(asked, texts))


def test_leaks_are_counted_by_stage_and_file_through_the_whole_chain(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    make_stage(first, "pretrain", [])
    make_stage(first, "sft", ["Why?", "Who is it?"], ["pretrain/model"])
    make_stage(first, "reward", ["Where?"], ["sft/model", "data/rankings-0.jsonl"], path=None)
    ppo = make_stage(second, "ppo", ["who  is IT?"], ["../first/sft/model", "../first/reward/model"], "prompts.jsonl")
    with pytest.raises(UserError) as error:
        check_trained("evaluate", settings(ppo), data("WHO is it?", "Why?", "When?", "What?"))
    said = str(error.value)
    assert said.startswith("evaluate: 2 of 4 prompts to be evaluated on were trained on: ")
    assert f"1 in ppo (prompts.jsonl; {second / 'ppo'})" in said and f"2 in sft (demos.jsonl; {first / 'sft'})" in said
    assert "reward" not in said and "evaluate.allow_trained=true" in said and "\n" not in said


def test_what_an_adapter_was_trained_on_counts_too(tmp_path):
    make_stage(tmp_path, "sft", ["Why?"])
    dpo = make_stage(tmp_path, "dpo", [], ["sft/adapter"])
    with pytest.raises(UserError, match="1 of 2 prompts to be evaluated on were trained on: 1 in sft"):
        check_trained("evaluate", settings(dpo), data("Why?", "When?"))
    policy = {"path": "base", "lora": {"path": "runs/a/sft/adapter"}}
    assert dict(input_paths("sft", {"policy": policy, "data": {}})) == {
        "sft.policy.lora.path": "runs/a/sft/adapter", "sft.policy.path": "base",
    }  # fmt: skip


def test_leaks_can_be_allowed_and_are_counted(tmp_path, capsys):
    sft = make_stage(tmp_path / "run", "sft", ["Why?", "Who?"])
    found = check_trained("evaluate", settings(sft, allow_trained=True), data("Why?", "When?"))
    assert found == {str(tmp_path / "run" / "sft"): 1}
    assert "1 of 2 prompts" in capsys.readouterr().out


def test_clean_runs_and_models_from_elsewhere_pass(tmp_path, capsys):
    sft = make_stage(tmp_path / "run", "sft", ["Why?"])
    models = (sft, tmp_path / "elsewhere", "gpt2", tmp_path / "run/dpo/model")  # the last was never made
    assert check_trained("evaluate", settings(*models), data("Why not?")) == {}
    assert capsys.readouterr().out == ""


def test_a_stage_that_does_not_say_is_named(tmp_path, capsys):
    sft = make_stage(tmp_path / "run", "sft", ["Why?"])
    (sft.parent / FILE).unlink()
    ppo = make_stage(tmp_path / "run", "ppo", ["Who?"], ["sft/model", "../gone/reward/model"])
    assert check_trained("evaluate", settings(ppo), data("Why?")) == {}
    said = capsys.readouterr().out
    assert "run/sft does not say which prompts it was trained on" in said
    assert "gone/reward does not say which prompts it was trained on" in said  # a run that was deleted


def test_stages_of_a_circle_are_visited_once(tmp_path):
    a = make_stage(tmp_path, "sft", [], ["ppo/model"])
    make_stage(tmp_path, "ppo", [], ["sft/model"])
    assert [folder.name for folder in trained_stages([a, a])] == ["sft", "ppo"]


def test_fingerprints_know_the_words_not_how_they_are_written():
    assert prompt_fingerprint(asked("\uff37hat  is\n it?")) == prompt_fingerprint(asked(" what is it? "))
    assert prompt_fingerprint(asked("What is it?")) != prompt_fingerprint(asked("What is it"))
    system = [{"role": "system", "content": "Be kind."}, *asked("What is it?")]
    assert prompt_fingerprint(system) == prompt_fingerprint(asked("What is it?"))
    answered = [{**message, "role": "assistant"} for message in asked("What is it?")]
    assert prompt_fingerprint(answered) != prompt_fingerprint(asked("What is it?"))


def test_each_data_module_says_what_it_trains_on(tmp_path):
    tokenizer = train_bpe(["What is one? It is a number."], vocab_size=300)
    ensure_chat_template(tokenizer)
    path = tmp_path / "all.jsonl"
    answers = {"response": "A number.", "chosen": "A number.", "rejected": "No."}
    write_jsonl(path, [{"prompt": f"What is {i}?", **answers} for i in range(60)])
    trained = {}
    for kind in (SFTDataModule, RewardDataModule, PPODataModule):
        module = kind(path, tokenizer, held_out=0.3, limit=20)
        module.setup()
        trained[kind] = {prompt_fingerprint(m) for m in module.trained_prompts()}
        assert len(trained[kind]) == 20
    assert trained[SFTDataModule] == trained[RewardDataModule] == trained[PPODataModule]
    held_out = {prompt_fingerprint(p.messages) for p in module.held_out_prompts}
    assert held_out and not held_out & trained[SFTDataModule]
    module = FewShotDataModule(path, tokenizer, shots=[0], held_out=0.3)
    module.setup()
    assert {prompt_fingerprint(m) for m in module.evaluated_prompts()} == held_out


def test_a_dialogue_trains_on_each_turn_that_is_learned(tmp_path):
    tokenizer = train_bpe(["What is one? It is a number."], vocab_size=300)
    turns = [("user", "Two?"), ("assistant", "No.")]
    rest = [{"role": role, "content": content} for role, content in turns]
    firsts = [[*asked(f"{i}?"), {"role": "assistant", "content": "Yes."}] for i in range(30)]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": [*first, *rest]} for first in firsts])
    module = SFTDataModule(tmp_path / "d.jsonl", tokenizer, held_out=0.2)
    module.setup()
    prompts = list(module.trained_prompts())
    trained = [first for first in firsts if first[:1] in prompts]
    assert 0 < len(trained) < 30
    assert prompts == [p for first in trained for p in (first[:1], [*first, rest[0]])]


def test_paths_of_all_models_are_looked_at():
    given = {"policies": {"a": {"path": "x"}, "b": None}, "reward_model": {"path": "y"}}
    assert [path for _, path in input_paths("evaluate", given)] == ["x", "y"]


def run_settings(runs, run, from_run):
    from omegaconf import OmegaConf

    paths = {"runs": str(runs), "run_dir": f"{runs}/{run}"}
    return OmegaConf.create({"run": run, "from_run": from_run, "paths": paths})


def test_what_changed_sides_is_remembered_by_the_run_and_those_that_start_from_it(tmp_path):
    first = run_settings(tmp_path, "first", "first")
    make_stage(tmp_path / "first", "sft", ["Why?"])
    moved = remembered_split(first, "evaluate")
    assert moved == Moved(trained={prompt_fingerprint(asked("Why?"))})
    assert remembered_split(first, "sft") == remembered_split(first, "evaluate", allow_trained=True) == Moved()
    moved.held_out.add("a" * 16)
    remember_split(first, moved)
    second = run_settings(tmp_path, "second", "first")
    make_stage(tmp_path / "second", "reward", ["Who?"], ["../first/sft/model"])
    (tmp_path / "second/reward/config.yaml").write_text(
        yaml.safe_dump({"reward": {"data": {"path": "x"}}, "origin": {"from_run": "first"}})
    )
    moved = remembered_split(second, "evaluate")
    assert moved.held_out == {"a" * 16} and moved.trained == {prompt_fingerprint(asked(t)) for t in ("Why?", "Who?")}
    moved.train.add("b" * 16)
    remember_split(second, moved)
    # A round of a run of its own writes down what the run knows.
    third = run_settings(tmp_path, "third", "second")
    third.paths.run_dir = f"{tmp_path}/third/rounds/2"
    (tmp_path / "third").mkdir()
    moved = remembered_split(third, "evaluate")
    assert (moved.held_out, moved.train) == ({"a" * 16}, {"b" * 16})
    remember_split(third, moved)
    assert json.loads((tmp_path / "third/split.json").read_text()) == {"held_out": ["a" * 16], "train": ["b" * 16]}
