"""A loss that rises past the one before training is said in one line, with the setting; one that falls is not."""

import re

import pytest
import torch
from torch import nn

from lit_rlhf.errors import TrainingDiverged
from lit_rlhf.training import FirstSteps, adamw, make_trainer, warmup_decay
from lit_rlhf.training.batches import BatchLoader, in_order, shuffled
from lit_rlhf.training.optim import optimizer_and_schedule
from lit_rlhf.training.parts import LearnsInParts


class Fitted(LearnsInParts):
    """A linear regression that begins near its best weights; 24 noisy examples of 16 numbers to train on."""

    def __init__(self, lr, examples=256):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(examples + 256, 16, generator=draw)
        self.y = self.x.sum(-1, keepdim=True) + 2 * torch.randn(examples + 256, 1, generator=draw)
        self.layer, self.lr, self.examples = nn.Linear(16, 1), lr, examples
        nn.init.ones_(self.layer.weight)
        self.layer.weight.data += 0.2

    def loss(self, batch):
        return (self.layer(self.x[batch]) - self.y[batch]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.latest_loss = loss.detach()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/sft/loss", self.loss([i + self.examples for i in batch]), batch_size=len(batch))

    def configure_optimizers(self):
        return optimizer_and_schedule(self, [{"params": self.parameters(), "lr": self.lr}], adamw, warmup_decay)

    def train_dataloader(self):
        return BatchLoader(shuffled(self.examples, seed=3), 16, lambda mine, _: mine)

    def val_dataloader(self):
        return BatchLoader(in_order(256), 64, lambda mine, _: mine, keep_rest=True)


def watched(module, check=None, **settings):
    """Validated, trained and validated, as a stage is; what the check has found."""
    check = check or FirstSteps("sft")
    settings = {"max_steps": 60, "log_every_n_steps": 50, **settings}
    trainer = make_trainer("cpu", logger=False, enable_progress_bar=False, callbacks=[check], **settings)
    trainer.validate(module, verbose=False)
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    return check


def test_a_good_rate_says_nothing(capsys):
    check = watched(Fitted(1e-2))
    assert check.finding is None and len(check.losses) == 10 and 3 < check.first < 8
    assert capsys.readouterr().out == ""


def test_a_rate_that_is_too_large_is_said_once_as_soon_as_it_is_known(capsys):
    check = watched(Fitted(1.0))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft: ")]
    assert said == [f"sft: {check.finding}"]
    assert f"val loss was {check.first:.3g} before training and that of training is" in said[0]
    assert 10 <= int(re.search(r"in the last 10 steps up to (\d+):", said[0])[1]) < 40  # of 60: while it trains
    assert said[0].endswith("set a lower sft.optimizer.lr (it is 1)")


def test_it_stops_only_where_it_is_asked_to():
    with pytest.raises(TrainingDiverged, match=r"stopped by callbacks.first_steps.stop: val loss was .* lower sft"):
        watched(Fitted(1.0), FirstSteps("sft", stop=True))


def test_few_records_learned_by_heart_are_told_from_steps_that_are_too_large():
    check = watched(Fitted(5e-2, examples=16), max_steps=100)
    assert "learned by heart; set fewer sft.trainer.max_epochs" in check.finding


def test_a_few_large_steps_are_found_by_the_validation_after_them():
    check = watched(Fitted(1.0), max_steps=5)
    assert "at step 5: the steps undo what the model knew; set a lower sft.optimizer.lr" in check.finding


def test_what_was_seen_goes_on_after_a_stop():
    before, after = watched(Fitted(1.0), max_steps=5), FirstSteps("sft")
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict() and after.first is not None and after.finding is not None
