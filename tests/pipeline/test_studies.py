"""Experiments that are sweeps: their jobs, and the page that they end in."""

import csv
import json

import pytest
from hydra.types import RunMode
from hydra.utils import get_object

from lit_rlhf.apps import write_ladder
from lit_rlhf.pipeline.run_folder import register_resolvers
from lit_rlhf.pipeline.settings import check_settings, compose_settings, conf_dir, hydra_settings, stages_of, sweep_jobs
from lit_rlhf.training import read_metrics

register_resolvers()
RUNGS = sorted(file.stem for file in (conf_dir() / "rung").glob("*.yaml"))
STUDIES = ("few_shot", "ladder", "overoptimization")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A finished run to start from; the folder is the test's own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    return tmp_path / "runs"


def test_the_ladder_has_every_rung_once():
    jobs = sweep_jobs(["experiment=ladder"])
    assert sorted(job[0] for job in jobs) == [f"rung={name}" for name in RUNGS]


def test_what_the_command_line_asks_for_takes_the_place_of_what_the_experiment_sweeps_over():
    jobs = sweep_jobs(["experiment=ladder", "rung=td,ppo", "seed=1,2"])
    assert [(job[0], job[-1]) for job in jobs] == [
        (f"rung={rung}", f"seed={seed}") for rung in ("td", "ppo") for seed in (1, 2)
    ]
    assert [job[0] for job in sweep_jobs(["sweep=kl", "stage=ppo"])] == [
        f"ppo.module.kl_coef={value}" for value in (0.02, 0.05, 0.1, 0.2)
    ]


def test_an_experiment_can_be_a_sweep_without_being_told():
    assert hydra_settings(["experiment=ladder", "seed=1,2"]).mode == RunMode.MULTIRUN
    assert hydra_settings([]).mode is None
    assert hydra_settings(["experiment=ladder", "hydra.mode=RUN"]).mode == RunMode.RUN


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_names_a_page(study):
    assert callable(get_object(hydra_settings([f"experiment={study}"]).callbacks.sweep.page._target_))


@pytest.mark.parametrize("rung", RUNGS)
def test_each_rung_says_what_it_is_and_samples_as_the_others_do(rung, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose_settings(["experiment=ladder", f"rung={rung}", "world.seed=0", "split.seed=0"])
    check_settings(cfg)
    assert all(cfg.about.values())
    assert stages_of(cfg) == (["dpo", "evaluate"] if rung == "dpo" else ["ppo"])
    assert (cfg.ppo.data.batch_size, cfg.ppo.module.answers_per_prompt) == (32, 4)


def test_a_mistake_is_found_before_the_first_job_begins(lit_rlhf, tmp_path):
    done = lit_rlhf("experiment=ladder", "rung=td,tdd", check=False)
    assert done.returncode == 2 and "Could not find 'rung/tdd'" in done.stderr
    done = lit_rlhf("experiment=ladder", "trainer=ddp", check=False)
    assert done.returncode == 2 and "under multirun (-m) this launcher starts 1 per job" in done.stderr
    assert not (tmp_path / "runs" / "ladder").exists()


@pytest.mark.slow
def test_the_ladder_ends_in_a_page(lit_rlhf, run_copy):
    settings = ["ppo.data.batch_size=4", "ppo.module.critic_warmup=1", "ppo.module.probe_rollouts=1"]
    said = lit_rlhf("experiment=ladder", "rung=reinforce,ppo,dpo", *settings).stdout
    [folder] = (run_copy / "ladder" / "sweeps").iterdir()
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["rung"], row["status"]) for row in rows] == [("reinforce", "done"), ("ppo", "done"), ("dpo", "done")]
    noise = [row.get("ppo/gradient_noise") for row in read_metrics(folder / "1" / "ppo" / "metrics.csv").values()]
    assert [value is not None for value in noise] == [False, True] + [False] * (len(noise) - 2)  # after the warm-up
    assert f"page: {folder.relative_to(run_copy.parent)}/ladder.html" in said
    page = (folder / "ladder.html").read_text(encoding="utf-8")
    for title in ("REINFORCE", "PPO, one pass (default)", "DPO", "SFT model, best of 2"):
        assert title in page
    assert "Score against episodes" in page and 'id="noise"' in page
    assert write_ladder(folder).read_text(encoding="utf-8") == page  # from the folder alone


@pytest.mark.slow
def test_the_study_of_overoptimization_ends_in_a_page_though_a_job_fails(lit_rlhf, run_copy):
    settings = ["reward.data.limit=20", "evaluate.module.best_of=4", "ppo.data.batch_size=8"]
    done = lit_rlhf("experiment=overoptimization", "ppo.optimizer.lr=1e-4,1e30", "ppo.module.kl_coef=0.0", *settings,
                    check=False)  # fmt: skip
    [folder] = (run_copy / "overoptimization" / "sweeps").iterdir()
    assert [json.loads((folder / job / "job.json").read_text())["status"] for job in "01"] == ["done", "failed"]
    page = (folder / "overoptimization.html").read_text(encoding="utf-8")
    assert "20 rankings" in page and "PPO without a penalty" in page and "Job 1 failed and is left out" in page
    assert done.returncode == 1 and "overoptimization.html" in done.stdout
