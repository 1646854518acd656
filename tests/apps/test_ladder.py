# ruff: noqa: RUF001  the page's dashes are meant
import json
import re

import pytest

from lit_rlhf.apps import write_ladder
from lit_rlhf.apps.ladder import curve, gradient_noise, rungs_of
from lit_rlhf.apps.run_reader import load_run
from lit_rlhf.apps.sweep_reader import load_jobs
from lit_rlhf.errors import UserError

HOSTILE = "<script>alert(1)</script> \x1b[31m {{ 7 * 7 }}"


def write_job(sweep, name, rung, seed=1, error=None, about=True):
    """The folder of a job, as the command leaves it."""
    folder = sweep / str(name)
    folder.mkdir(parents=True)
    said = {"part": "Baselines", "title": rung.title(), "adds": f"What {rung} adds.", "formula": "A = R"}
    record = {"overrides": [f"rung={rung}", "experiment=ladder", f"seed={seed}"], "status": "done", "value": 0.5}
    if error:
        record |= {"status": "failed", "error": error}
    if about:
        record["about"] = said
    (folder / "job.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"seed": seed}), encoding="utf-8")
    return folder


def write_stage(folder, stage, figures, metrics="", seconds=61.2):
    (folder / stage).mkdir()
    (folder / stage / "done.json").write_text(json.dumps({"figures": figures, "seconds": seconds}), encoding="utf-8")
    (folder / stage / "metrics.csv").write_text(metrics, encoding="utf-8")


def write_ppo(folder, win=0.8, gold=4.0, shift=0.0, noise=(2.0, 0.5), judge="gold"):
    header = "step,ppo/score,ppo/gold,ppo/kl,ppo/episodes,ppo/gradient_variance,ppo/gradient_signal\n"
    rows = [f"{i},{i / 10 + shift},{2 + i / 5},{i / 4},{128 * (i + 1)},{noise[0]},{noise[1]}" for i in range(4)]
    rate = {"mean": win, "low": win - 0.02, "high": win + 0.02, "n": 8, "prompts": 2, "judge": judge}
    figures = {"kl": 1.25, "gold": gold, "correct": 0.75, "val_score": 0.9, "episodes": 512, "win_rate": rate}
    write_stage(folder, "ppo", figures, header + "\n".join(rows) + "\n4,,,,,,\n")


def write_dpo(folder):
    write_stage(folder, "dpo", {"val_loss": 0.5}, "step,dpo/loss\n0,0.7\n1,0.6\n", seconds=125)
    rate = {"mean": 0.7, "low": 0.68, "high": 0.72, "n": 8, "prompts": 2}
    models = {"sft": {"gold": 2.25, "correct": 0.5, "score": 0.0, "kl": 0.0}, "dpo": {"gold": 3.5, "kl": 2.5}}
    best = {"n": 8, "gold": 4.5, "correct": 0.9, "win_rate": {"best_of_n_vs_sft": {**rate, "mean": 0.85}}}
    write_stage(folder, "evaluate", {"models": models, "win_rate": {"dpo_vs_sft": rate}, "best_of_n": best})


def page_of(sweep):
    """(source, its text without styles and tags)"""
    path = write_ladder(sweep)
    assert path == sweep / "ladder.html" and not list(sweep.glob("*.tmp"))
    source = path.read_text(encoding="utf-8")
    text = re.sub("<[^>]*>", " ", re.sub("<(style|svg).*?</\\1>", "", source, flags=re.DOTALL))
    return source, " ".join(text.split())


def test_rungs_stand_side_by_side(tmp_path):
    write_ppo(write_job(tmp_path, 0, "reinforce"), win=0.7, gold=3.0)
    write_ppo(write_job(tmp_path, 1, "ppo"), win=0.8)
    write_dpo(write_job(tmp_path, 2, "dpo"))
    source, text = page_of(tmp_path)
    assert "Ppo beats the SFT model most often: in 80.0% of comparisons (95% interval 78.0% – 82.0%)" in text
    assert "No other interval reaches into its own." in text
    assert "Reinforce 70.0% 68.0% – 72.0%" in text and "Dpo 70.0%" in text
    assert "Ppo 4.00 0.750 0.900 1.25 512 1 min 1 s" in text
    assert "Dpo 3.50 – – 2.50 – 2 min 5 s" in text
    assert "SFT model 2.25 0.500 0 0 – –" in text and "SFT model, best of 8 4.50 0.900" in text
    assert "What reinforce adds. A = R" in text
    assert source.count("Score against episodes") == 1  # one part, one chart for both; DPO has no episodes


def test_the_page_loads_and_runs_nothing(tmp_path):
    write_ppo(write_job(tmp_path, 0, HOSTILE))
    source, text = page_of(tmp_path)
    assert not re.search("<(script|link|img|iframe)|url\\(|@import|https?://(?!www.w3.org)", source)
    assert r"\x1b[31m {{ 7 * 7 }}" in text


def test_seeds_are_one_rung_and_their_mean_is_drawn(tmp_path):
    write_ppo(write_job(tmp_path, 0, "ppo", seed=1), win=0.7, shift=0.0, noise=(2.0, 0.5))
    write_ppo(write_job(tmp_path, 1, "ppo", seed=2), win=0.8, shift=1.0, noise=(4.0, 0.5))
    [rung] = rungs_of(load_jobs(tmp_path))
    assert curve(rung.runs, "ppo/kl") == [(128.0, 0.0), (256.0, 0.25), (384.0, 0.5), (512.0, 0.75)]
    assert [y for _, y in curve(rung.runs, "ppo/score")] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert gradient_noise(rung.runs) == 6.0
    text = page_of(tmp_path)[1]
    assert "75.0% 68.0% – 82.0%" in text and "Seeds 1, 2" in text


def test_overlapping_intervals_are_no_clear_difference(tmp_path):
    write_ppo(write_job(tmp_path, 0, "rloo"), win=0.79)
    write_ppo(write_job(tmp_path, 1, "ppo"), win=0.8)
    assert "No clear difference to it, as their intervals overlap: Rloo." in page_of(tmp_path)[1]


def test_a_gradient_lost_in_the_noise_is_called_so(tmp_path):
    folder = write_job(tmp_path, 0, "reinforce")
    write_ppo(folder, noise=(2.0, -0.1))
    write_ppo(write_job(tmp_path, 1, "ppo"), noise=(8.0, 0.1))
    assert gradient_noise([load_run(folder)]) == float("inf")
    text = page_of(tmp_path)[1]
    assert "Reinforce lost in the noise" in text and "Ppo 80.0" in text


def test_failed_jobs_are_named_and_left_out(tmp_path):
    write_ppo(write_job(tmp_path, 0, "ppo"))
    write_job(tmp_path, 1, "td", error="ppo: at step 3 the loss is <nan>")
    source, text = page_of(tmp_path)
    assert "Job 1 (Td) failed and is left out: ppo: at step 3 the loss is &lt;nan&gt;" in text
    assert "<nan>" not in source


def test_any_sweep_will_do(tmp_path):
    """Without titles, jobs are called by what differs, the seed apart."""
    for name, (coef, seed) in enumerate((c, s) for c in (0.1, 0.2) for s in (1, 2)):
        folder = write_job(tmp_path, name, "ppo", seed, about=False)
        record = {"overrides": ["stage=ppo", f"ppo.module.kl_coef={coef}", f"seed={seed}"], "status": "done"}
        (folder / "job.json").write_text(json.dumps(record))
        write_ppo(folder, judge="reward model (proxy)")
    text = page_of(tmp_path)[1]
    assert "kl_coef 0.1 80.0%" in text and "kl_coef 0.2 80.0%" in text
    assert "There is no gold judge here" in text


def test_a_sweep_without_a_result_is_refused(tmp_path):
    write_job(tmp_path, 0, "ppo", error="no")
    with pytest.raises(UserError, match="nothing to show"):
        write_ladder(tmp_path)


def test_writing_again_gives_the_same_page(tmp_path):
    write_ppo(write_job(tmp_path, 0, "ppo"))
    assert page_of(tmp_path) == page_of(tmp_path)
