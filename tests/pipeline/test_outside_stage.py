"""A stage of another distribution: found by its entry point, and run, compared and reported as others are."""

import json
import os
import re
from pathlib import Path

import pytest

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture
def command(lit_rlhf, tmp_path):
    """(arguments) -> the command, where the other distribution is installed and there is a file for it."""
    (tmp_path / "lines.txt").write_text("The rof is brown.\n\nWhat colour is it?\n", encoding="utf-8")
    env = {"PYTHONPATH": os.pathsep.join([lit_rlhf.env["PYTHONPATH"], str(OUTSIDE)])}

    def run(*arguments, **settings):
        return lit_rlhf("copycat.data.path=lines.txt", *arguments, env=env, **settings)

    return run


@pytest.mark.slow
def test_it_runs_in_a_chain_and_stands_in_the_report(command, tmp_path):
    policies = "evaluate.policies.copycat=${upstream:copycat}"
    said = command("stage=[evaluate,copycat,sft,pretrain]", policies).stdout
    started = re.findall(r"^(\w+): .* s\)$", said, re.MULTILINE)
    assert started == ["pretrain", "sft", "copycat", "evaluate"]  # in their order
    assert "copycat: 1 records were skipped as invalid, the first: lines.txt:2: no text" in said
    run = tmp_path / "runs/quickstart"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["copycat"]["val_loss"] < 0.5 * summary["copycat"]["val_loss_first"]
    assert "copycat_vs_sft" in summary["evaluate"]["win_rate"]
    done = json.loads((run / "copycat/done.json").read_text())
    assert list(done["inputs"]) == ["sft/model"] and done["data"]["train_set"] == 2
    assert len((run / "copycat/trained_prompts.txt").read_text().split()) == 2
    page = (run / "report.html").read_text().replace("&#39;", "'")
    assert "<h3>Learning by heart</h3>" in page and "Surprise" in page and "Copycat's surprise" in page
    assert "Copycat</b> vs SFT" in page and "as it was" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=copycatt"], "there is no stage 'copycatt'. Did you mean copycat?"),
        (["stage=copycat", "copycat.module.lr=0"], "copycat.module.lr=0: it should be greater than 0"),
        (["stage=copycat", "copycat.module.rate=1"], "copycat.module.rate: there is no such setting."),
        (["stage=copycat"], "Run stage=sft first"),
        (
            ["stage=copycat", "copycat.module._target_=lit_rlhf.rollouts.Sampling"],
            "copycat.module.lr: lit_rlhf.rollouts",
        ),
    ],
)
def test_its_settings_are_checked_as_those_of_the_package(command, arguments, message):
    done = command(*arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_its_settings_are_shown_and_swept(command, tmp_path):
    shown = command("--cfg", "job", "--package", "copycat", fast=False).stdout
    assert "_target_: copycat.stage.CopycatModule" in shown
    done = command("-m", "stage=copycat", "copycat.module.lr=0.1,0.2", check=False)
    assert re.search(r"job 1 \(.*copycat\.module\.lr=0\.2", done.stdout) and "Run stage=sft first" in done.stdout
    assert "+copycat=default" not in done.stdout  # which nobody asked for
