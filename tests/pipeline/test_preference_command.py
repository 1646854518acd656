"""Collecting preferences of people, as a user types it."""

import json
import shutil

import pytest

PROMPTS = [f"What is {a} plus {b}?" for a in range(5) for b in range(5)]


@pytest.mark.slow
def test_from_prompts_to_a_reward_model_on_judgements_of_people(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    own = ["experiment=own_prompts", "preference.data.path=prompts.jsonl"]  # as README has it
    run = tmp_path / "runs" / "mine"

    said = lit_rlhf("stage=preference", *own).stdout
    assert "25 prompts with their answers" in said and "stage=label" in said
    assert not (run / "preference" / "done.json").exists() and not (run / "report.html").exists()
    waiting = lit_rlhf(*own, check=False)
    assert waiting.returncode == 2 and "stage=label" in waiting.stderr  # the reward model cannot be trained yet

    answers = [json.loads(line) for line in (run / "data/answers-0.jsonl").read_text().splitlines()]
    labels = [{"prompt": r["prompt"], "responses": r["responses"], "ranks": [*range(1, len(r["responses"]) + 1)],
               "annotator": "ann"} for r in answers]  # fmt: skip
    some = labels[-20:]  # held-out prompts come last
    # Chat writes there too, of prompts that nobody has collected answers to.
    some.append({"prompt": "And you?", "responses": ["x", "y"], "ranks": [2, 1], "models": ["a", "b"], "blind": True})
    (run / "data/labels-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    lit_rlhf("stage=[preference,reward]", *own)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["preference"]["rankings"], summary["preference"]["unjudged"]) == (21, 5)
    assert "val_accuracy" in summary["reward"]

    # More labels: the stage takes them in by itself, without drawing an answer anew.
    turned = {**labels[0], "ranks": labels[0]["ranks"][::-1]}
    (run / "data/labels-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [turned, *labels[1:]]))
    before = (run / "data/answers-0.jsonl").read_text()
    lit_rlhf("stage=preference", *own)
    assert json.loads((run / "summary.json").read_text())["preference"]["rankings"] == 25
    assert (run / "data/answers-0.jsonl").read_text() == before
    ranked = (run / "data/rankings-0.jsonl").read_text().splitlines()
    assert json.loads(ranked[0])["ranks"] == turned["ranks"]
    # Other answers are another matter.
    changed = lit_rlhf("stage=preference", *own, "preference.module.answers_per_prompt=3", check=False)
    assert changed.returncode == 2 and "answers_per_prompt was 4, now 3" in changed.stderr


def test_answers_alone_are_kept_for_those_who_rank_them_later(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    lit_rlhf("stage=preference", "run=mine", "from_run=quickstart", "preference/annotator=none")
    assert (tmp_path / "runs" / "mine" / "data" / "answers-0.jsonl").read_text(encoding="utf-8").count("responses") > 1
    assert not (tmp_path / "runs" / "mine" / "data" / "rankings-0.jsonl").exists()


def test_records_of_later_stages_are_read_as_asked_for_and_looked_for_at_once(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    rows = [json.dumps({"question": f"What is {i}?"}) for i in range(8)]
    (tmp_path / "q.jsonl").write_text("\n".join([*rows, json.dumps({"other": 1})]))
    own = ["experiment=own_prompts", "preference.data.path=q.jsonl", "preference.data.on_bad_record=skip"]
    done = lit_rlhf(*own, check=False)
    assert "q.jsonl: no valid record; the first of 9 bad ones" in done.stderr
    assert "set preference.data.fields='{prompt: NAME}'" in done.stderr
    done = lit_rlhf(*own, "preference.data.fields={prompt: question}", check=False)
    assert "Rank them with stage=label" in done.stdout + done.stderr, done.stderr
    done = lit_rlhf("run=early", "sft/data=jsonl", "sft.data.path=nowhere.jsonl", check=False)
    assert done.returncode == 2 and "sft.data.path: nowhere.jsonl: no such file" in done.stderr
    assert not (tmp_path / "runs" / "early" / "pretrain").exists()


def test_a_missing_export_is_said_before_anything_is_loaded(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs" / "quickstart", tmp_path / "runs" / "quickstart")
    asked = ["stage=preference", "run=mine", "from_run=quickstart", "preference/annotator=label_studio"]
    done = lit_rlhf(*asked, "preference.annotator.export=./nowhere.json", check=False)
    assert done.returncode == 2
    assert "preference.annotator.export=./nowhere.json: there is no such file" in done.stderr
