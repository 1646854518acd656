# ruff: noqa: RUF001  the page's minus signs and dashes are meant
"""Classification and few-shot on the report, and the page of the study of few-shot."""

import json
import re

import pytest

from lit_rlhf.apps import write_few_shot, write_report
from lit_rlhf.apps.report.classification import by_shots, confusion
from lit_rlhf.errors import UserError

CLASSIFY = {
    "task": "classification", "val_loss": 0.3, "accuracy": 0.75, "accuracy_low": 0.6, "accuracy_high": 0.9,
    "examples": 40, "guessing": 0.5, "f1": 0.7, "labels": ["<b>cat", "dog"], "confusion": [[15, 5], [2, 18]],
}  # fmt: skip


def few_shot(accuracy, parameters=1000):
    def row(value, n, too_long=0):
        by = {"sum": value, "token": value} if n else {}
        known = {"accuracy": value, "low": value - 0.1, "high": value + 0.1}
        return {**(known if n else dict.fromkeys(known)), "n": n, "too_long": too_long, "by": by}

    shots = {"0": row(accuracy, 50), "4": row(accuracy + 0.1, 30, 20), "32": row(0.0, 0, 50)}
    return {"task": "choice", "examples": 50, "parameters": parameters, "guessing": 0.25, "normalize": "token", "k": 0,
            "accuracy": accuracy, "shots": shots}  # fmt: skip


def write_stage(run, stage, figures, metrics=""):
    (run / stage).mkdir(parents=True)
    done = {"stage": stage, "figures": figures, "seconds": 1.0, "versions": {}, "data": {}}
    (run / stage / "done.json").write_text(json.dumps(done))
    (run / stage / "metrics.csv").write_text(metrics or "step\n")


def text_of(path):
    page = path.read_text(encoding="utf-8")
    return page, " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


CELL = re.compile(
    r'<rect class="fill-(\w+)" opacity="[\d.]+" x="([\d.]+)" y="([\d.]+)"[^>]*>'
    r"<title>(\S+) taken for (\S+): (\d+) \(([\d.]+)%\)</title>"
)


def test_confusion_by_hand(tmp_path):
    write_stage(tmp_path, "classify", CLASSIFY)
    page = write_report(tmp_path).read_text(encoding="utf-8").replace("&lt;b&gt;", "<b>")
    tones, xs, ys, *cells = zip(*CELL.findall(page))
    assert list(zip(*cells)) == [
        ("<b>cat", "<b>cat", "15", "75.0"), ("<b>cat", "dog", "5", "25.0"),
        ("dog", "<b>cat", "2", "10.0"), ("dog", "dog", "18", "90.0"),
    ]  # fmt: skip
    assert tones == ("teal", "orange", "orange", "teal")  # what is right lies on the diagonal
    xs, ys = (list(map(float, places)) for places in (xs, ys))
    assert xs[0] == xs[2] < xs[1] == xs[3] and ys[0] == ys[1] < ys[2] == ys[3]  # rows are labels, columns what was said
    assert confusion({"task": "choice", "accuracy": 0.5}) is None


def test_many_labels_stay_within_the_page():
    labels = [f"label number {i}" for i in range(40)]
    drawn = confusion({"labels": labels, "confusion": [[0] * 40 for _ in labels]})
    assert 1.7 * drawn.margin + 40 * drawn.size < 1100 and not drawn.numbered


def test_shots_by_hand():
    shots = by_shots(few_shot(0.5))
    assert shots.ways == ["sum", "token"]
    assert [(r.k, r.by, r.n, r.too_long) for r in shots.rows] == [
        (0, [0.5, 0.5], 50, 0), (4, [0.6, 0.6], 30, 20), (32, [None, None], 0, 50),
    ]  # fmt: skip
    assert by_shots({}) is None


def test_the_report_shows_both(tmp_path):
    write_stage(tmp_path, "classify", CLASSIFY, "step,classify/loss,val/classify/loss\n0,,0.7\n10,0.5,0.3\n")
    write_stage(tmp_path, "few_shot", few_shot(0.5))
    page, text = text_of(write_report(tmp_path))
    assert "By prompt alone, the model solves 50.0% of the held-out tasks; guessing solves 25.0%." in text
    assert "does not fit the context" in text and "What is taken for what" in text
    assert "&lt;b&gt;cat taken for dog: 5 (25.0%)" in page and "<b>cat" not in page
    assert 'aria-label="Loss against optimizer steps"' in page and "75.0% right" in text


def test_the_study_shows_accuracy_against_size_and_steps(tmp_path):
    jobs = [(1000, 100, 0.3), (4000, 100, 0.4), (1000, 200, 0.5), (4000, 200, 0.7)]
    for i, (parameters, steps, accuracy) in enumerate(jobs):
        write_stage(tmp_path / str(i), "few_shot", few_shot(accuracy, parameters))
        write_stage(tmp_path / str(i), "pretrain", {"val_loss": 2.0}, f"step,pretrain/loss\n{steps},2.0\n")
        (tmp_path / str(i) / "job.json").write_text(json.dumps({"overrides": [], "status": "done"}))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "job.json").write_text(json.dumps({"overrides": [], "status": "failed", "error": "it was late"}))
    page, text = text_of(write_few_shot(tmp_path))
    assert "Right, after 200 steps against doublings of 1,000 parameters" in page
    assert "Right, k = 4 against steps of pretraining" in page
    assert "Job 4 failed and is left out: it was late" in text
    assert "4,000 200 2.00 70.0% 60.0% – 80.0% 80.0% 70.0% – 90.0% 20 do not fit – 50 do not fit" in text


def test_a_study_without_a_job_that_ended_well_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is nothing to show"):
        write_few_shot(tmp_path)
