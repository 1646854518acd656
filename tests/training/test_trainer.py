import pytest
import torch
from lightning import LightningModule
from torch import nn

from lit_rlhf.training import make_trainer
from lit_rlhf.training.batches import BatchLoader, in_order


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch[0])
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.global_step, batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(**settings):
    module = Recorder()
    loaders = [BatchLoader(in_order(4), 1, lambda mine, _: mine, keep_rest=keep) for keep in (False, True)]
    make_trainer("cpu", logger=False, enable_progress_bar=False, **settings).fit(module, *loaders)
    return module


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, 4),  # one epoch
        ({"max_epochs": 3}, 12),
        ({"max_steps": 6}, 6),
        ({"max_steps": 6, "max_epochs": 1}, 4),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 6),
        ({"limit_train_batches": 3}, 3),
    ],
)
def test_the_budget(settings, batches):
    assert fit(**settings).trained == [i % 4 for i in range(batches)]


def test_no_validation_unless_asked_for():
    assert fit(max_steps=9).validated == []


def test_validation_counts_steps_over_epochs():
    validated = fit(max_steps=10, val_check_interval=3).validated
    assert validated == [(step, i) for step in (3, 6, 9) for i in range(4)]


def test_a_limited_validation_sees_the_same_batches_each_time():
    validated = fit(max_steps=9, val_check_interval=3, limit_val_batches=3).validated
    assert validated == [(step, i) for step in (3, 6, 9) for i in range(3)]


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(max_steps=4)
    assert list(tmp_path.iterdir()) == []


def test_gradients_stay_no_longer_than_a_step_needs_them():
    held = []

    class Watched(Recorder):
        def training_step(self, batch, batch_idx):
            held.append(any(p.grad is not None for p in self.parameters()))
            return super().training_step(batch, batch_idx)

    loader = BatchLoader(in_order(4), 1, lambda mine, _: mine)
    settings = {"accumulate_grad_batches": 2, "max_epochs": 1}
    make_trainer("cpu", logger=False, enable_progress_bar=False, **settings).fit(Watched(), loader)
    assert held == [False, True, False, True]
