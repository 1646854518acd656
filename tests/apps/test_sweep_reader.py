import json

from lit_rlhf.apps.sweep_reader import load_jobs, varied


def write_job(sweep, name, overrides, **record):
    folder = sweep / name
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"overrides": overrides, **record}), encoding="utf-8")
    return folder


def test_jobs_stand_in_the_order_in_which_they_were_started(tmp_path):
    for name in ("10", "9", "0"):
        write_job(tmp_path, name, [f"seed={name}", "stage=ppo"], status="done", objective="ppo.gold", value=1.5)
    (tmp_path / "11").mkdir()  # still running
    jobs = load_jobs(tmp_path)
    assert [job.name for job in jobs] == ["0", "9", "10"]
    assert varied(jobs) == ["seed"] and jobs[0].objective == ("ppo.gold", 1.5)


def test_a_failed_job_has_no_figures_and_says_why(tmp_path):
    folder = write_job(tmp_path, "0", ["+a=1=2"], status="failed", error="no such thing")
    (folder / "summary.json").write_text('{"ppo": {"kl": 1.0}}')
    [job] = load_jobs(tmp_path)
    assert (job.done, job.error, job.figures, job.settings) == (False, "no such thing", {}, {"a": "1=2"})
    folder = write_job(tmp_path, "1", [], status="done")
    (folder / "summary.json").write_text('{"ppo": {"kl": 1.0, "win_rate": {"mean": 0.5, "judge": "gold"}}, "x": true}')
    assert load_jobs(tmp_path)[1].figures == {"ppo.kl": 1.0, "ppo.win_rate.mean": 0.5}
