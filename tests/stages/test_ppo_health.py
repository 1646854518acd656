"""Each check speaks on a sick history and is silent on a healthy one; the watch says it once, and survives a stop."""

import copy
import csv
import json
import math
import re
import typing
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from omegaconf import OmegaConf

from lit_rlhf.apps import write_report
from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run import make_callbacks
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule, WorldPPODataModule, WorldPretrainDataModule
from lit_rlhf.stages.ppo import HealthWatch, KLPenalty, KLPenaltyLoss, Limits, Scoring, Unhealthy
from lit_rlhf.stages.ppo.health import CHECKS, HELD_OUT, WATCHED, CheckName, findings
from lit_rlhf.training import MetricsFile, make_trainer, read_metrics
from lit_rlhf.training.batches import BatchLoader, in_order
from lit_rlhf.training.resuming import LastCheckpoint, RandomState

LIMITS = Limits()


def healthy():
    """The metrics of the run `healthy` of docs/health_curves.py: 30 iterations of the quickstart's PPO."""
    with (Path(__file__).parent / "healthy_ppo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in WATCHED}


def tail(name, change, length=8):
    """The healthy history with the last values of a metric changed."""
    history = healthy()
    history[name][-length:] = [change(value) for value in history[name][-length:]]
    return history


def falling_gold():
    history = healthy()
    history["ppo/gold"][-10:] = [gold - 0.2 * i for i, gold in enumerate(history["ppo/gold"][-10:])]
    history["ppo/score"][-10:] = [score + 0.1 * i for i, score in enumerate(history["ppo/score"][-10:])]
    return history


def destroyed_at_once():
    """Two iterations, in which nothing can be told from a mean."""
    history = {name: values[:2] for name, values in tail("ppo/approx_kl", lambda x: x).items()}
    history["ppo/approx_kl"][-1] = 0.6
    return history


SICK = {  # check -> histories
    "first_step": [
        tail("ppo/first_ratio", lambda _: 1.002, 1),
        tail("ppo/first_ratio", lambda _: 0.9, 1),
        tail("ppo/first_kl", lambda _: 0.01, 1),
    ],
    "large_steps": [tail("ppo/approx_kl", lambda _: 0.06), destroyed_at_once()],
    "negative_kl": [tail("ppo/kl", lambda _: -0.03)],
    "entropy_collapse": [tail("ppo/entropy", lambda x: x / 5)],
    "growing_answers": [tail("ppo/response_length", lambda x: 1.7 * x)],
    "unfinished_answers": [tail("ppo/finished", lambda _: 0.85)],
    "poor_critic": [tail("ppo/explained_variance", lambda _: -0.01)],
    "score_spread": [tail("ppo/score_std", lambda _: 0.0), tail("ppo/score_std", lambda x: 8 * x)],
    "advantage_spread": [tail("ppo/advantage_std", lambda _: 0.0), tail("ppo/advantage_std", lambda x: 20 * x)],
    "worse_held_out": [tail(HELD_OUT, lambda x: x - 0.4)],
    "over_optimization": [falling_gold()],
}


def test_the_healthy_run_is_healthy_at_every_iteration():
    history = healthy()
    for n in range(len(history["ppo/kl"]) + 1):
        assert findings({name: values[:n] for name, values in history.items()}, LIMITS) == {}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_speaks_on_a_sick_history_and_no_other_does(check):
    for history in SICK[check]:
        assert list(findings(history, LIMITS)) == [check]


@pytest.fixture(scope="module")
def settings():
    register_resolvers()
    return compose_settings([])


@pytest.mark.parametrize("check", CHECKS)
def test_a_sentence_has_numbers_and_a_setting_that_exists(check, settings):
    for history in SICK[check]:
        sentence = CHECKS[check](history, LIMITS)
        assert "\n" not in sentence and "nan" not in sentence and re.search(r"\d", sentence)
        addresses = re.findall(r"ppo(?:\.[a-z_]+)+", sentence)
        assert addresses
        for address in addresses:
            parent, _, key = address.rpartition(".")
            assert key in OmegaConf.select(settings, parent), address


def test_names_that_can_stop_a_run_are_those_of_the_checks():
    assert typing.get_args(CheckName) == tuple(CHECKS)


def test_checks_are_silent_where_a_metric_is_missing():
    nothing = {name: [math.nan] * 40 for name in WATCHED}
    assert findings(nothing, LIMITS) == {}
    assert findings({name: [] for name in WATCHED}, LIMITS) == {}


def test_negative_kl_by_hand():
    """ln(1e-6) = -13.8155: over 128 answers a mean below -0.10793 is too unlikely, over 640 one below -0.02159."""
    check = CHECKS["negative_kl"]
    one = {"ppo/episodes": [128.0], "ppo/kl": [-0.107]}
    assert check(one, LIMITS) is None
    assert check({**one, "ppo/kl": [-0.109]}, LIMITS)
    five = {"ppo/episodes": [128.0 * i for i in range(1, 9)], "ppo/kl": [1.0] * 3 + [-0.0215] * 5}
    assert check(five, LIMITS) is None
    assert check({**five, "ppo/kl": [1.0] * 3 + [-0.0217] * 5}, LIMITS)


def test_chance_does_not_make_a_kl_negative():
    """Small samples near the reference have negative estimates all the time; at a chance of 0.05, few are said."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator)
    p, q = logits.log_softmax(0), (logits + 0.3 * torch.randn(6, generator=generator)).log_softmax(0)
    said = negative = 0
    for _ in range(2000):
        drawn = torch.multinomial(p.exp(), 8, replacement=True, generator=generator)
        kl = (p - q)[drawn].mean().item()
        negative += kl < 0
        said += CHECKS["negative_kl"]({"ppo/episodes": [8.0], "ppo/kl": [kl]}, Limits(chance=0.05)) is not None
    assert negative > 200
    assert said <= 0.05 * 2000


@pytest.mark.parametrize("slope", [0.0, -0.1])
def test_over_optimization_is_not_a_run_whose_score_does_not_rise(slope):
    history = falling_gold()
    history["ppo/score"][-10:] = [score + slope * i for i, score in enumerate(healthy()["ppo/score"][-10:])]
    assert "over_optimization" not in findings(history, LIMITS)


def test_one_bad_validation_is_not_enough():
    history = healthy()
    last = max(i for i, score in enumerate(history[HELD_OUT]) if math.isfinite(score))
    history[HELD_OUT][last] -= 0.5
    assert findings(history, LIMITS) == {}


# ------------------------------------------------------------- the callback


class Recorded(LightningModule):
    """Logs what a run has logged; sick from iteration 12 on."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.rows = healthy()
        for i in range(11, len(self.rows["ppo/first_ratio"])):
            self.rows["ppo/first_ratio"][i] = 1.5

    def training_step(self, batch, batch_idx):
        i = int(self.iteration)
        self.log_dict({name: values[i] for name, values in self.rows.items() if name.startswith("ppo/")})
        self.iteration += 1
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight**2)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log(HELD_OUT, 0.01 * float(self.iteration), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(LightningDataModule):
    def train_dataloader(self):
        return BatchLoader(in_order(20), 1, lambda mine, _: mine)

    def val_dataloader(self):
        return BatchLoader(in_order(2), 1, lambda mine, _: mine, keep_rest=True)


class Killed(Exception):
    pass


@pytest.fixture
def run(tmp_path):
    """Train on recorded metrics, like a stage of a run; ``killed_at``: before that batch."""

    def fit(folder, killed_at=None, **settings):
        path = tmp_path / folder
        watch = HealthWatch(path / "health.jsonl", **settings)
        last = LastCheckpoint(path, every_n_batches=3)
        trainer = make_trainer(
            "cpu", logger=MetricsFile(path / "metrics.csv"), callbacks=[watch, RandomState(), last], max_epochs=1,
            val_check_interval=3, log_every_n_steps=1, default_root_dir=path, enable_progress_bar=False,
        )  # fmt: skip
        module = Recorded()
        if killed_at is not None:

            def kill(batch, batch_idx):
                if trainer.fit_loop.epoch_loop.total_batch_idx == killed_at:
                    raise Killed

            module.on_train_batch_start = kill
        trainer.fit(module, Numbers(), ckpt_path=last.path if last.path.is_file() else None, weights_only=True)
        return watch

    return fit


def test_a_finding_is_said_once_where_it_begins(run, tmp_path, capsys):
    watch = run("a")
    said = [line for line in capsys.readouterr().out.splitlines() if "first_step" in line]
    assert len(said) == 1
    assert "iteration 12" in said[0] and "ratio off 1 by up to 0.5" in said[0]
    [row] = [json.loads(line) for line in (tmp_path / "a/health.jsonl").read_text().splitlines()]
    assert (row["step"], row["check"]) == (12, "first_step")
    assert watch.found.keys() == {"first_step"}
    rows = read_metrics(tmp_path / "a/metrics.csv")
    assert [rows[i]["ppo/findings"] for i in range(20)] == [0.0] * 11 + [1.0] * 9


def test_held_out_scores_stand_where_they_were_measured(run):
    held_out = run("a").history[HELD_OUT]
    assert [i + 1 for i, score in enumerate(held_out) if math.isfinite(score)] == [3, 6, 9, 12, 15, 18]
    assert held_out[5] == pytest.approx(0.06)


def test_a_healthy_run_leaves_an_empty_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Recorded, "__init__", lambda self: _healthy_init(self))
    run("a")
    assert (tmp_path / "a/health.jsonl").read_text() == ""


def _healthy_init(module, original=Recorded.__init__):
    original(module)
    module.rows = healthy()


@pytest.mark.parametrize("killed_at", [4, 6, 12, 13, 14])  # 6, 12: just after a checkpoint and a validation
def test_a_run_that_was_killed_goes_on_with_the_same_watch(run, tmp_path, killed_at):
    whole = run("whole")
    with pytest.raises(Killed):
        run("parts", killed_at=killed_at)
    resumed = run("parts")
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())
    assert (tmp_path / "parts/health.jsonl").read_text() == (tmp_path / "whole/health.jsonl").read_text()


def test_a_finding_after_the_checkpoint_is_forgotten_when_the_run_goes_on_without_it(run, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run("a", killed_at=14)
    assert "first_step" in (tmp_path / "a/health.jsonl").read_text()
    (tmp_path / "a/last.ckpt").unlink()  # as if killed before the first checkpoint
    monkeypatch.setattr(Recorded, "__init__", lambda self: _healthy_init(self))
    run("a")
    assert (tmp_path / "a/health.jsonl").read_text() == ""


def test_a_run_stops_where_that_is_asked_for_and_can_go_on(run, tmp_path):
    with pytest.raises(Unhealthy, match=r"ppo.health.stop asks.*first_step \(iteration 12\).*ratio off 1") as error:
        run("a", stop=["first_step"])
    assert "\n" not in str(error.value)
    assert max(read_metrics(tmp_path / "a/metrics.csv")) == 11  # of the twelfth iteration: its row is there
    assert (tmp_path / "a/last.ckpt").is_file()
    with pytest.raises(Unhealthy):  # the same command stops again
        run("a", stop=["first_step"])
    assert run("a", stop=[]).iterations == 20


def test_a_run_goes_on_after_findings_that_it_need_not_stop_for(run):
    assert run("a", stop=["entropy_collapse", "poor_critic"]).iterations == 20


def test_half_precision_has_limits_of_its_own():
    """Two passes over one text, laid out otherwise, round otherwise: a 135M model's KL was 0.0012 nats per token."""
    watch, seen = HealthWatch(), {**healthy(), "ppo/first_ratio": [1.25] * 30, "ppo/first_kl": [1.2e-3] * 30}
    assert "first_step" in findings(seen, watch._limits_in("32-true"))
    assert "first_step" not in findings(seen, watch._limits_in("bf16-mixed"))
    for sick in ({"ppo/first_ratio": [1.6] * 30}, {"ppo/first_kl": [0.02] * 30}):
        assert "first_step" in findings({**seen, **sick}, watch._limits_in("bf16-mixed"))


def test_what_is_watched_is_what_ppo_logs(policy, reward_model, tokenizer, optimizer, world, fit):
    module = PPOModule(
        copy.deepcopy(policy), reward_model, tokenizer, gold_judge=world, optimizer=optimizer, minibatch_size=4,
        val_samples=1,
        sampling=Sampling(max_new_tokens=6),
    )  # fmt: skip
    watch = HealthWatch()
    data = WorldPPODataModule(world, tokenizer, prompts=64, batch_size=8, limit_held_out=4)
    trainer = fit(
        module, data, callbacks=[watch], max_epochs=1, limit_train_batches=2, val_check_interval=2, log_every_n_steps=1
    )
    assert watch.iterations == 2
    for name, values in watch.history.items():
        assert math.isfinite(values[-1]), name
    assert "ppo/findings" in trainer.callback_metrics
    assert abs(watch.history["ppo/first_ratio"][1] - 1) < 1e-4


# ------------------------------------------------------- settings, report, docs


def settings_for(tmp_path, *overrides):
    register_resolvers()
    return compose_settings(["stage=ppo", f"paths.runs={tmp_path}", *overrides])


def test_settings_are_the_defaults_and_reach_the_watch(tmp_path):
    cfg = settings_for(tmp_path, "ppo.health.stop=[first_step]", "ppo.health.limits.length=2")
    callbacks = make_callbacks(cfg, "ppo", cfg.ppo, StageFolder(cfg, "ppo"))
    kinds = [type(callback) for callback in callbacks]
    watch = callbacks[kinds.index(HealthWatch)]
    assert kinds.index(HealthWatch) < kinds.index(LastCheckpoint)
    assert (watch.stop, watch.limits) == (("first_step",), Limits(length=2))
    assert watch.path == tmp_path / "quickstart/ppo/health.jsonl"


def test_an_unknown_check_is_refused_and_the_known_ones_are_named(tmp_path):
    cfg = settings_for(tmp_path, "ppo.health.stop=[entropy]")
    remember_world(cfg)
    with pytest.raises(UserError, match=r"ppo.health.stop=.*'first_step', 'large_steps'"):
        check_settings(cfg)


def test_the_watch_may_change_while_a_run_is_stopped(tmp_path):
    """What is watched for is not what the run was made by: stop=[] goes on with a run that was stopped."""
    before = StageFolder(settings_for(tmp_path), "ppo")
    after = StageFolder(settings_for(tmp_path, "ppo.health.stop=[first_step]", "ppo.health.limits.gold=9"), "ppo")
    assert before.settings != after.settings
    assert before._comparable(before.settings) == after._comparable(after.settings)


@pytest.mark.parametrize("found", [None, [], [{"step": 12, "check": "first_step", "finding": "it <b>differed</b>"}]])
def test_the_report_lists_findings(tmp_path, found):
    (tmp_path / "ppo").mkdir()
    rows = "\n".join(f"{i},{i / 10},{128 * (i + 1)}" for i in range(5))
    (tmp_path / "ppo/metrics.csv").write_text(f"step,ppo/score,ppo/episodes\n{rows}\n")
    if found is not None:
        (tmp_path / "ppo/health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("Health</h3>" in page) == (found is not None)
    assert ("No findings." in page) == (found == [])
    assert ("first step, iteration 12</b>: it &lt;b&gt;differed" in page) == bool(found)


PAGE = (Path(__file__).parents[2] / "docs/reading_a_ppo_run.md").read_text(encoding="utf-8")


def test_the_page_shows_every_check():
    for name in CHECKS:
        assert f"\n| `{name}` |" in PAGE
        assert f"### {name}\n\n![" in PAGE
        assert (Path(__file__).parents[2] / f"docs/health/{name}.svg").stat().st_size < 100_000


def test_the_page_names_settings_that_exist(settings):
    for address in set(re.findall(r"`(ppo(?:\.[a-z_]+)+)", PAGE)):
        parent, _, key = address.rpartition(".")
        assert key in OmegaConf.select(settings, parent), address
    for name in settings.ppo.health.limits:
        assert name == "_target_" or f"`{name}`" in PAGE


def test_the_page_defines_every_metric_and_no_other(policy, reward_model, tokenizer, optimizer, world, tmp_path):
    """What PPO logs with all that can be logged turned on."""
    module = PPOModule(
        copy.deepcopy(policy), reward_model, tokenizer, gold_judge=world, optimizer=optimizer, minibatch_size=4,
        val_samples=1,
        sampling=Sampling(max_new_tokens=6), loss=KLPenaltyLoss(), kl=KLPenalty(estimator="k2", in_loss=True),
        ptx=partial(WorldPretrainDataModule, world, documents=200, block_size=32), ptx_coef=0.1, probe_rollouts=1,
        scoring=Scoring(functions=[lambda prompts, responses, **_: [0.0] * len(responses)]),
    )  # fmt: skip
    data = WorldPPODataModule(world, tokenizer, prompts=64, batch_size=8, limit_held_out=4)
    logger = MetricsFile(tmp_path / "metrics.csv")
    trainer = make_trainer(
        "cpu", logger=logger, callbacks=[HealthWatch()], max_epochs=1, limit_train_batches=1, val_check_interval=1,
        log_every_n_steps=1, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    logged = {name for row in read_metrics(logger.path).values() for name in row}
    assert set(re.findall(r"^\| `((?:val/)?ppo/\w+)` \|", PAGE, re.MULTILINE)) == logged
