import json
import math
import re

import pytest

from lit_rlhf.apps import write_overoptimization
from lit_rlhf.apps.overoptimization import studies_of
from lit_rlhf.apps.sweep_reader import load_jobs
from lit_rlhf.errors import UserError

ALPHA, BETA = 1.0, 0.5  # of gold; it peaks at d = e
DISTANCES = [0.0, 0.5, 1.0, 2.0, math.e, 4.0, 6.0, 8.0]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_job(sweep, name, kl_coef=0.0, rankings=500, reach=8, graded=True):
    """A job whose rollouts lie on a curve: gold gains d (alpha - beta log d) standard deviations, the score d."""
    folder = sweep / str(name)
    write_json(folder / "job.json", {"overrides": [f"ppo.module.kl_coef={kl_coef}"], "status": "done", "value": 1.0})
    write_json(folder / "summary.json", {"seed": 1})
    reward = {"figures": {"val_accuracy": 0.731}, "seconds": 1.0, "data": {"train_set": rankings}}
    write_json(folder / "reward" / "done.json", reward)
    write_json(folder / "ppo" / "done.json", {"figures": {"kl_coef": kl_coef}, "seconds": 1.0})
    rows = ["step,ppo/kl,ppo/score,ppo/gold"]
    for i, d in enumerate(DISTANCES[:reach]):
        gain = d * (ALPHA - BETA * math.log(d)) if d else 0.0
        rows.append(f"{i},{d**2},{0.25 + d},{2 + 2 * gain}")
    (folder / "ppo" / "metrics.csv").write_text("\n".join([*rows, f"{reach},,,"]) + "\n", encoding="utf-8")
    # Gold 0 and 4: mean 2, standard deviation 2. The higher score has the higher grade in one prompt of two.
    candidates = [{"scores": [0.0, 1.0], "gold": gold if graded else None} for gold in ([0.0, 4.0], [4.0, 0.0])]
    (folder / "evaluate").mkdir()
    answers = [json.dumps({"prompt": "Hi", "models": {}, "candidates": c}) for c in candidates]
    (folder / "evaluate" / "samples.jsonl").write_text("\n".join(answers), encoding="utf-8")


def page_of(sweep):
    """(source, its text without styles and drawings)"""
    path = write_overoptimization(sweep)
    assert path == sweep / "overoptimization.html" and not list(sweep.glob("*.tmp"))
    source = path.read_text(encoding="utf-8")
    text = re.sub("<[^>]*>", " ", re.sub("<(style|svg).*?</\\1>", "", source, flags=re.DOTALL))
    return source, " ".join(text.split())


def test_gains_and_fits_are_those_of_the_curve(tmp_path):
    write_job(tmp_path, 0)
    [study] = studies_of(load_jobs(tmp_path))
    [pursuit] = study.pursuits
    assert study.name == "500 rankings" and study.candidates == 2
    assert pursuit.points("proxy") == [(pytest.approx(d), pytest.approx(d)) for d in DISTANCES]
    assert study.fits["RL", "gold"].curve == pytest.approx((ALPHA, BETA, 1.0), abs=1e-6)
    assert study.fits["RL", "proxy"].curve == pytest.approx((1.0, 0.0, 1.0), abs=1e-6)
    nats, gain = pursuit.peak  # at 2, e and 4: KL (4 + e^2 + 16) / 3
    assert nats == pytest.approx((20 + math.e**2) / 3) and gain > 1.2


def test_best_of_n_by_hand(tmp_path):
    """Of two answers the better one by score gains half a point of score, and on average none of gold."""
    write_job(tmp_path, 0)
    [study] = studies_of(load_jobs(tmp_path))
    distance = math.sqrt(math.log(2) - 0.5)
    assert study.best_of["proxy"] == [(0.0, 0.0), (pytest.approx(distance), pytest.approx(0.5))]
    assert study.best_of["gold"] == [(0.0, 0.0), (pytest.approx(distance), 0.0)]


def test_the_page_tells_it(tmp_path):
    write_job(tmp_path, 0)
    write_job(tmp_path, 1, kl_coef=0.2, reach=4)
    write_job(tmp_path, 2, rankings=4000)
    source, text = page_of(tmp_path)
    assert "With a reward model from 500 rankings" in text and "With a reward model from 4,000 rankings" in text
    assert "It ranks 73.1% of the held-out pairs right." in text
    assert "500 rankings RL gold 1.00 0.500 1.00 7.39" in text
    assert text.count("500 rankings 0.2 ") == 1
    assert source.count("PPO without a penalty against") == 2 and source.count("Gold by kl_coef against") == 2
    assert not re.search("<(script|link|img|iframe)|url\\(|@import|https?://", source)


def test_seeds_are_fitted_together(tmp_path):
    for name in range(2):
        write_job(tmp_path, name, reach=8 - name)
    [study] = studies_of(load_jobs(tmp_path))
    assert len(study.pursuits) == 1 and len(study.pursuits[0].points("gold")) == 15
    page_of(tmp_path)


def test_failed_jobs_are_named_and_left_out(tmp_path):
    write_job(tmp_path, 0)
    write_json(tmp_path / "1" / "job.json", {"overrides": [], "status": "failed", "error": "no <b>room</b>"})
    source, text = page_of(tmp_path)
    assert "Job 1 failed and is left out: no &lt;b&gt;room" in text and "<b>room" not in source


def test_without_gold_there_is_nothing_to_show(tmp_path):
    write_job(tmp_path, 0, graded=False)
    with pytest.raises(UserError, match=r"evaluate\.module\.best_of"):
        write_overoptimization(tmp_path)


def test_a_short_run_is_drawn_without_a_fit(tmp_path):
    write_job(tmp_path, 0, reach=2)
    text = page_of(tmp_path)[1]
    assert "500 rankings RL" not in text and "500 rankings 0 " in text and "nan" not in text
