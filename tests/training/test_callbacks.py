import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_rlhf.errors import Interrupted, TrainingDiverged, UserError
from lit_rlhf.training import MetricsFile, adamw, make_trainer, read_metrics, warmup_decay
from lit_rlhf.training.batches import BatchLoader, in_order, sharding, shuffled
from lit_rlhf.training.callbacks import StageProgressBar, TextSamples, said_when_slow
from lit_rlhf.training.diverging import StopOnNonFinite
from lit_rlhf.training.metrics_file import append_rows
from lit_rlhf.training.optim import optimizer_and_schedule
from lit_rlhf.training.resuming import LastCheckpoint, RandomState

STEPS = 20  # optimizer steps; an epoch has 6


class Noisy(LightningModule):
    """A regression whose every step draws from all three global generators."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randn(26, 4, generator=generator)
        self.layer = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        x = self.data[batch] + 0.3 * torch.randn(len(batch), 4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        loss = (self.layer(x).squeeze(-1) - self.data[batch].sum(-1)).square().mean()
        self.log("loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/noise", torch.rand(()), batch_size=1)

    def configure_optimizers(self):
        return optimizer_and_schedule(self, [{"params": self.layer.parameters(), "lr": 0.03}], adamw, warmup_decay)

    def train_dataloader(self):
        return BatchLoader(shuffled(26, seed=3), 2, lambda mine, _: mine, **sharding(self.trainer))

    def val_dataloader(self):
        return BatchLoader(in_order(4), 2, lambda mine, _: mine, keep_rest=True)


class At(Callback):
    """Does something before the ``batch``-th batch of a start, counted from 0."""

    def __init__(self, batch, action):
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer, *_):
        if self.batch == 0:
            self.action()
        self.batch -= 1


class KilledError(Exception):
    pass


def kill():
    raise KilledError


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def fit(folder, *more, every=4, seed=0, accumulate=2, module=None, first=False, rescue=None, **settings):
    """Train from ``folder``'s last checkpoint, or from the beginning; the module and the trainer."""
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    last = LastCheckpoint(folder, every, rescue)
    callbacks = [RandomState(), StopOnNonFinite("sft"), last]
    trainer = make_trainer(
        "cpu",
        accumulate_grad_batches=accumulate,
        logger=MetricsFile(folder / "metrics.csv"),
        enable_progress_bar=False,
        callbacks=[*more, *callbacks] if first else [*callbacks, *more],
        **{"max_steps": STEPS, "log_every_n_steps": 1, "val_check_interval": 6, **settings},
    )
    module = module or Noisy()
    trainer.fit(module, ckpt_path=last.path if last.path.exists() else None, weights_only=True)
    return module, trainer


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    module, _ = fit(folder)
    return folder, module


def assert_like_uninterrupted(folder, module, uninterrupted):
    whole, expected = uninterrupted
    assert equal(weights(module), weights(expected))
    assert expected.seen[-len(module.seen) :] == module.seen
    assert read_metrics(folder / "metrics.csv") == read_metrics(whole / "metrics.csv")


def test_the_noise_is_felt(uninterrupted, tmp_path):
    folder, module = uninterrupted
    assert len(module.seen) == 2 * STEPS and len(read_metrics(folder / "metrics.csv")) == STEPS
    again, _ = fit(tmp_path / "again")
    assert equal(weights(again), weights(module))
    other, _ = fit(tmp_path / "other", seed=1)
    assert not equal(weights(other), weights(module))


class PowerCut(Callback):
    """Keeps a copy of the folder as each hook finds it on disk."""

    def __init__(self, folder, copies):
        self.folder, self.copies, self.n = folder, copies, 0

    def copy(self, *_):
        self.n += 1
        if (self.folder / "last.ckpt").is_file():
            shutil.copytree(self.folder, self.copies / str(self.n))

    on_train_batch_start = on_train_batch_end = on_validation_start = on_validation_end = on_train_epoch_end = copy


@pytest.mark.parametrize("every", [2, 6])
def test_all_rows_up_to_a_checkpoint_are_on_disk_whenever_the_power_is_cut(tmp_path, uninterrupted, every):
    fit(tmp_path / "run", PowerCut(tmp_path / "run", tmp_path / "copies"), every=every)
    whole = read_metrics(uninterrupted[0] / "metrics.csv")
    copies = list((tmp_path / "copies").iterdir())
    assert len(copies) > 50
    for copy in copies:
        steps = torch.load(copy / "last.ckpt", weights_only=True)["global_step"]
        rows = read_metrics(copy / "metrics.csv")
        assert [rows.get(step) for step in range(steps)] == [whole[step] for step in range(steps)]


# 12 batches per epoch, 2 per step: before the first save; within and between windows; around the ends of two epochs;
# where validation stands next; the last batch of all.
@pytest.mark.parametrize("batch", [0, 3, 4, 5, 8, 11, 12, 13, 20, 23, 24, 25, 37, 39])
@pytest.mark.parametrize("every", [1, 4, 12])
def test_killed_and_resumed_gives_the_same_weights(tmp_path, uninterrupted, batch, every):
    with pytest.raises(KilledError):
        fit(tmp_path, At(batch, kill), every=every)
    assert (tmp_path / "last.ckpt").exists() == (batch >= max(every, 2))
    saved = batch // every * every // 2 * 2 if every > 1 else batch // 2 * 2
    module, _ = fit(tmp_path, every=every, seed=99)
    if saved:  # else it begins anew, with the other seed
        assert len(module.seen) == 2 * STEPS - saved
        assert_like_uninterrupted(tmp_path, module, uninterrupted)


def test_resumed_many_times(tmp_path, uninterrupted):
    for start in range(6):
        with pytest.raises(KilledError):
            fit(tmp_path, At(6, kill), every=2, seed=start)
    module, trainer = fit(tmp_path, every=2, seed=99)
    assert len(module.seen) == 2 * STEPS - 6 * 6
    assert_like_uninterrupted(tmp_path, module, uninterrupted)
    assert trainer.global_step == STEPS


@pytest.mark.parametrize("batch", [0, 1, 10, 11, 12, 22, 23, 38, 39])
def test_ctrl_c_saves_says_so_and_is_resumed_exactly(tmp_path, uninterrupted, batch):
    handler = signal.getsignal(signal.SIGINT)
    done = batch // 2 * 2 + 2  # the step that has begun is brought to its end
    with pytest.raises(
        Interrupted, match=f"stopped after step {done}, which is saved; run the same command again to go on"
    ):
        fit(tmp_path, At(batch, press_ctrl_c), every=1000)
    assert signal.getsignal(signal.SIGINT) is handler
    module, _ = fit(tmp_path, every=1000, seed=99)
    assert len(module.seen) == 2 * STEPS - done
    if module.seen:
        assert_like_uninterrupted(tmp_path, module, uninterrupted)
    else:
        assert equal(weights(module), weights(uninterrupted[1]))


class Delete(Callback):
    """Deletes or renames the folder within step ``step``, counted from 1, or within the validation behind it."""

    def __init__(self, folder, step, where, how):
        self.folder, self.step, self.where, self.how = folder, step, where, how

    def at(self, trainer, where):
        begun = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if where == self.where and begun >= self.step and self.folder.is_dir():
            if self.how == "deleted":
                shutil.rmtree(self.folder)
            else:
                self.folder.rename(self.folder.with_name("elsewhere"))

    def on_train_batch_start(self, trainer, *_):
        self.at(trainer, "step")

    def on_validation_start(self, trainer, *_):
        self.at(trainer, "validation")


@pytest.mark.parametrize("how", ["deleted", "renamed"])
@pytest.mark.parametrize(
    ("step", "where"), [(s, "step") for s in (1, 2, 3, 11, 12, 13, 39, 40)] + [(12, "validation"), (40, "validation")]
)
def test_a_folder_that_goes_loses_no_row_and_no_step(tmp_path, uninterrupted, step, where, how):
    lost, rescue = tmp_path / "lost", tmp_path / "rescue"
    with pytest.raises(FileNotFoundError):
        more = {"val_check_interval": STEPS} if (step, where) == (40, "validation") else {}
        fit(lost, Delete(lost, step, where, how), every=1000, rescue=lambda: rescue, first=True, **more)
    (rescue / "checkpoints" / "last.ckpt").rename(rescue / "last.ckpt")
    done = min(step + step % 2 + 2 * (where == "validation"), 2 * STEPS)  # the optimizer step that was under way
    assert torch.load(rescue / "last.ckpt", weights_only=True)["global_step"] == done / 2
    module, _ = fit(rescue, every=1000, seed=99)
    if module.seen:
        assert_like_uninterrupted(rescue, module, uninterrupted)
    assert equal(weights(module), weights(uninterrupted[1]))
    assert set(read_metrics(rescue / "metrics.csv")) == set(range(STEPS))


def test_ctrl_c_in_the_last_validation_is_not_lost(tmp_path, uninterrupted):
    class InValidation(Callback):
        def on_validation_start(self, trainer, module):
            if trainer.global_step == STEPS:
                press_ctrl_c()

    with pytest.raises(Interrupted, match=f"stopped after step {2 * STEPS},"):
        fit(tmp_path, InValidation(), val_check_interval=STEPS)
    module, _ = fit(tmp_path)
    assert module.seen == [] and equal(weights(module), weights(uninterrupted[1]))


def test_ctrl_c_without_accumulation_stops_after_the_batch(tmp_path):
    with pytest.raises(Interrupted, match="stopped after step 4,"):
        fit(tmp_path, At(3, press_ctrl_c), accumulate=1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def test_ctrl_c_twice_ends_at_once_without_saving(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, At(3, press_twice), every=1000)
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_same_callbacks_serve_a_second_fit_after_ctrl_c(tmp_path):
    last = LastCheckpoint(tmp_path, 1000)
    settings = {"logger": False, "enable_progress_bar": False, "max_steps": 6}
    with pytest.raises(Interrupted):
        make_trainer("cpu", callbacks=[last, At(1, press_ctrl_c)], **settings).fit(Noisy())
    module = Noisy()
    make_trainer("cpu", callbacks=[last], **settings).fit(module, ckpt_path=last.path, weights_only=True)
    assert len(module.seen) == 4


def test_a_finished_run_is_saved_and_can_be_lengthened(tmp_path, uninterrupted):
    fit(tmp_path, every=1000, max_steps=STEPS)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)  # nothing in it needs to be trusted
    assert checkpoint["global_step"] == STEPS
    module, trainer = fit(tmp_path, every=1000, max_steps=STEPS + 3)
    assert len(module.seen) == 6 and trainer.global_step == STEPS + 3


def test_no_checkpoint_within_a_window_of_accumulation(tmp_path):
    saved = []

    class Watch(LastCheckpoint):
        def _save(self, trainer):
            saved.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)
            super()._save(trainer)

    trainer = make_trainer(
        "cpu", accumulate_grad_batches=2, logger=False, enable_progress_bar=False, max_steps=6,
        callbacks=[Watch(tmp_path, 3)],
    )  # fmt: skip
    trainer.fit(Noisy())
    assert saved == [6, 12, 12]  # not 3 and 9; the end is saved too


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    def full_disk(trainer):
        def save(path, *_):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        trainer.save_checkpoint = save

    class Full(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 5:
                full_disk(trainer)

    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written \(No space left on device\); make room"):
        fit(tmp_path, Full(), every=4)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    module, _ = fit(tmp_path, every=4)
    assert len(module.seen) == 2 * STEPS - 4


def test_the_seconds_of_earlier_starts_are_kept(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr("lit_rlhf.training.resuming.time.perf_counter", lambda: float(next(clock)))
    processor = iter(range(0, 1000, 10))
    monkeypatch.setattr("lit_rlhf.training.resuming.time.process_time", lambda: float(next(processor)))
    one = LastCheckpoint(tmp_path)  # begun at 0
    state = one.state_dict()
    assert state == {"seconds": 100.0, "cpu_seconds": 10.0, "ended_early": False}
    two = LastCheckpoint(tmp_path)  # begun at 200
    two.load_state_dict(state)
    assert two.earlier_seconds == 100.0
    assert two.earlier_cpu_seconds == 10.0
    assert two.state_dict() == {"seconds": 200.0, "cpu_seconds": 20.0, "ended_early": False}


def test_random_state_restores_all_three_generators(tmp_path):
    def draw():
        return [
            torch.rand(2).tolist(),
            torch.randn(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            np.random.randn(3).tolist(),
        ]

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    draw()
    torch.save(RandomState().state_dict(), tmp_path / "state")
    expected = draw()
    callback = RandomState()
    callback.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    draw()
    callback.on_train_start(type("Rank0", (), {"global_rank": 0}), None)
    assert draw() == expected


# Any number of stops, at any moment


class SeenInValidation(Noisy):
    """Training that depends on what validations have said, and a callback that does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("validations", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.validations)

    def on_validation_epoch_end(self):
        self.validations += 1


def history(seed):
    """(settings of the training, [(moment, by SIGKILL, first or last of the callbacks)])"""
    draw = random.Random(seed)
    budget = draw.choice([{"max_steps": draw.randint(7, 20)}, {"max_steps": -1, "max_epochs": draw.randint(2, 3)}])
    settings = {
        **budget,
        "accumulate": draw.randint(1, 3),
        "every": draw.choice([1, 2, 3, 4, 13]),
        "limit_train_batches": draw.choice([1.0, 5]),
        "val_check_interval": draw.choice([None, 3, 4, 5, 13]),
    }
    stops = [(draw.randint(1, 70), draw.random() < 0.7, draw.random() < 0.5) for _ in range(draw.randint(1, 4))]
    return settings, stops


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)], ids=str)
def test_any_history_of_stops_gives_the_run_that_nothing_stopped(tmp_path, seeds, stop_at):
    wrong = []
    for seed in seeds:
        settings, stops = history(seed)
        whole, trainer = fit(tmp_path / f"{seed}-whole", module=SeenInValidation(), **settings)
        folder = tmp_path / str(seed)
        for moment, killed, first in stops:
            folder.mkdir(exist_ok=True)
            begun = seed if (folder / "last.ckpt").exists() else 0
            with stop_at(folder, moment, killed) as stop:
                fit(folder, stop, first=first, module=SeenInValidation(), seed=begun, **settings)
        begun = seed if (folder / "last.ckpt").exists() else 0
        module, resumed = fit(folder, module=SeenInValidation(), seed=begun, **settings)
        rows = read_metrics(tmp_path / f"{seed}-whole" / "metrics.csv")
        same = {
            "steps": resumed.global_step == trainer.global_step,
            "weights": equal(module.state_dict().values(), whole.state_dict().values()),
            "order": whole.seen[len(whole.seen) - len(module.seen) :] == module.seen,
            "metrics": read_metrics(folder / "metrics.csv") == rows,
        }
        if not all(same.values()):
            wrong.append((seed, [what for what in same if not same[what]], settings, stops))
    assert not wrong, wrong[:3]


# Numbers that are not finite


class Diverging(Noisy):
    """At batch 5 the loss, or a gradient alone, is no finite number."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(self.seen) == 6:
            self.before = weights(self)
            bias = self.layer[0].bias
            if self.what == "gradient":
                return loss + (bias - bias.detach()).sqrt().sum()  # adds 0; its derivative 1/(2√0) is infinite
            return loss * float(self.what)
        return loss


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "sft: at step 6 the loss is nan; stopped before the weights changed"),
        ("inf", "sft: at step 6 the loss is inf; stopped before the weights changed"),
        ("gradient", "sft: at step 6 the gradient of 1 parameters is not finite, layer.0.bias among them; stopped"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_training_stops_before_the_weights_change(tmp_path, what, message, clip):
    module = Diverging(what)
    with pytest.raises(TrainingDiverged) as caught:
        fit(tmp_path, module=module, every=2, gradient_clip_val=clip)
    assert str(caught.value).startswith(message) and "The last good checkpoint is kept" in str(caught.value)
    assert equal(weights(module), module.before)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert equal(checkpoint["state_dict"].values(), module.before)


class ByHand(Noisy):
    """Manual optimization, as PPO does it."""

    def __init__(self, factor):
        super().__init__()
        self.automatic_optimization, self.factor = False, factor

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for step in range(2):
            self.before = weights(self)
            optimizer.zero_grad()
            loss = self.layer(self.data[batch]).square().mean()
            if batch_idx == 1 and step == 1:
                loss = loss + self.factor()
            self.manual_backward(loss)
            optimizer.step()


@pytest.mark.parametrize(
    "what", ["the loss is nan", "the gradient of 1 parameters is not finite, layer.2.bias among them"]
)
def test_training_by_hand_stops_too(tmp_path, what):
    module = ByHand(None)
    bias = module.layer[2].bias
    module.factor = (lambda: float("nan")) if "loss" in what else (lambda: (bias - bias.detach()).sqrt().sum())
    with pytest.raises(TrainingDiverged, match=f"sft: at step 2 {what}; stopped before"):
        fit(tmp_path, module=module, every=1, accumulate=1, max_steps=-1, max_epochs=1, val_check_interval=None)
    assert equal(weights(module), module.before)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


# What one sees


def test_rows_of_later_steps_are_dropped_when_a_run_is_resumed(tmp_path):
    path = tmp_path / "stage" / "samples.jsonl"
    for step in (10, 20, 30):
        append_rows(path, step, [{"step": step, "text": "ü"}, {"step": step, "text": "b"}])
    append_rows(path, 20, [{"step": 20, "text": "new"}])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["text"]) for row in rows] == [(10, "ü"), (10, "b"), (20, "new")]
    assert [f.name for f in path.parent.iterdir()] == ["samples.jsonl"]


def test_text_samples_are_written_and_shown(tmp_path, capsys):
    module = Noisy()
    module.write_samples = lambda: [(f"Why\n{i}?", f" because  {module.global_step}") for i in range(3)]
    samples = TextSamples(tmp_path / "samples.jsonl", every_n_steps=4)
    trainer = make_trainer("cpu", max_steps=9, logger=False, enable_progress_bar=False, callbacks=[samples])
    trainer.fit(module)
    rows = [json.loads(line) for line in samples.path.read_text(encoding="utf-8").splitlines()]
    expected = [(s, f" because  {s}") for s in (0, 4, 8, 9) for _ in range(3)]
    assert [(row["step"], row["text"]) for row in rows] == expected
    assert rows[1]["prompt"] == "Why\n1?"
    out = capsys.readouterr().out
    module.write_samples = lambda: [("\x1b]0;title\x07", "a\u202eb\x00\n"), ("", "")]
    samples.show(trainer, module)
    assert r"step 9: \x1b]0;title\x07 → a\u202eb\x00" in capsys.readouterr().out
    assert "step 4: Why 0? → because 4\n" in out and "step 8: Why 1? → because 8\n" in out and "Why 2?" not in out


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("lit_rlhf.training.callbacks._in_a_file", lambda: False)


def test_a_bar_in_a_file_is_a_line_for_every_tenth(capsys):
    bar = StageProgressBar("sft", 1)
    trainer = make_trainer("cpu", max_epochs=2, logger=False, callbacks=[bar])
    trainer.fit(Noisy())
    shown = "".join(capsys.readouterr())
    lines = [line for line in shown.splitlines() if line.startswith("sft")]
    assert "\r" not in shown and len(lines) == 20 and not any("validation" in line for line in lines)
    assert lines[0].startswith("sft:  15%") and " 2/13 [" in lines[0]
    assert lines[-1].startswith("sft, epoch 2: 100%")


def test_the_progress_bar_names_the_stage(capsys, terminal):
    module = Noisy()
    module.log = lambda name, value, **settings: LightningModule.log(
        module, f"sft/{name}", value, prog_bar=True, **settings
    )
    make_trainer("cpu", max_steps=6, logger=False, callbacks=[StageProgressBar("sft", 1)]).fit(module)
    shown = "".join(capsys.readouterr())
    assert "sft: 100%" in shown and ", loss=" in shown and "sft/loss" not in shown


def test_progress_bar_counts_from_the_first_step_to_the_last_that_will_be(capsys, terminal):
    bar = StageProgressBar("sft", 100)
    trainer = make_trainer("cpu", max_steps=15, max_epochs=9, logger=False, callbacks=[bar])
    trainer.fit(Noisy())
    trainer.validate(Noisy(), verbose=False)
    shown = "".join(capsys.readouterr())
    assert "sft:   8%" in shown and " 1/13 [" in shown  # the first step, though every 100th is shown
    assert "sft, epoch 2: 100%" in shown and " 2/2 [" in shown  # max_steps ends it
    assert "Epoch" not in shown and "DataLoader" not in shown and "sft: validation: 100%" in shown


def test_slow_steps_are_shown_each(monkeypatch):
    monkeypatch.setattr("lit_rlhf.training.callbacks.SLOW_STEP", 0.0)
    bar = StageProgressBar("sft", 100)
    assert all(bar._should_update(n, 50) for n in range(2, 9))
    monkeypatch.setattr("lit_rlhf.training.callbacks.SLOW_STEP", 60.0)
    assert not any(bar._should_update(n, 50) for n in range(2, 9)) and bar._should_update(50, 50)


def test_what_takes_long_is_said_and_what_does_not_is_not(capsys):
    with said_when_slow("writing", after=0.05):
        time.sleep(0.3)
    with said_when_slow("reading", after=5.0):
        pass
    shown = "".join(capsys.readouterr())
    assert "  writing ...\n" in shown and "reading" not in shown


def change(path, edit):
    """Change a checkpoint in place."""
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c["state_dict"]["layer.0.weight"][1].fill_(torch.nan), r"tensor layer\.0\.weight holds 4 of 32"),
        (
            lambda c: c["optimizer_states"][0]["state"][1]["exp_avg"].fill_(-torch.inf),
            r"the optimizer's exp_avg of layer\.0\.bias holds 8 of 8",
        ),
    ],
)
def test_what_is_not_finite_is_not_resumed(tmp_path, edit, said):
    fit(tmp_path, max_steps=4)
    change(tmp_path / "last.ckpt", edit)
    module = Noisy()
    with pytest.raises(UserError, match=rf"last\.ckpt: {said} numbers that are NaN .*; the training has div"):
        fit(tmp_path, module=module)
    assert module.seen == []


def test_rows_that_are_missing_before_the_checkpoint_are_counted(tmp_path, capsys):
    fit(tmp_path, max_steps=4)
    (tmp_path / "metrics.csv").write_bytes(b"".join((tmp_path / "metrics.csv").read_bytes().splitlines(True)[:2]))
    capsys.readouterr()
    fit(tmp_path)
    assert f"{tmp_path / 'metrics.csv'}: 3 of 4 rows before the checkpoint are not there" in capsys.readouterr().out
    (tmp_path / "metrics.csv").unlink()
    fit(tmp_path)
    assert f"{tmp_path / 'metrics.csv'}: it is not there any more, which had" in capsys.readouterr().out
