"""Classification and few-shot as commands, from the pretrained model of another run."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_both_start_from_a_runs_pretrained_model_and_end_in_its_report(lit_rlhf, finished_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    said = lit_rlhf("stage=[few_shot,classify]", "from_run=quickstart", "run=told", "classify.data.task=same").stdout
    run = tmp_path / "runs" / "told"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classify"]["task"] == "similarity" and summary["classify"]["labels"] == ["different", "same"]
    assert list(summary["few_shot"]["shots"]) == ["0", "1", "4"]
    assert said.index("classify: ") < said.index("few_shot: ")
    config = json.loads((run / "classify" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "different", "1": "same"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="confusion"' in page and 'id="few-shot"' in page


def test_a_file_of_ones_own(lit_rlhf, tmp_path):
    rows = [{"text": f"{i} is {('odd', 'even')[i % 2]}", "label": i % 2} for i in range(60)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lit_rlhf("stage=classify", "classify/data=jsonl", "classify.data.path=l.jsonl", "classify/init=scratch")
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["classify"]["examples"] > 0 and summary["classify"]["labels"] == ["0", "1"]
    done = lit_rlhf("stage=few_shot", "few_shot/data=jsonl", "few_shot.data.path=l.jsonl", check=False)
    assert done.returncode == 2 and "Run stage=pretrain first" in done.stderr
