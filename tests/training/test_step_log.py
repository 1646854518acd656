import pytest
import torch
from lightning import LightningModule
from torch import nn

from lit_rlhf.training import BatchLoader, MetricsFile, StepLog, in_order, make_trainer, read_metrics


def module(base):
    class Falling(base):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(torch.tensor([1.0, float(batch[0])])).square().sum()
            self.log("loss", loss, prog_bar=True, batch_size=1)
            self.log_dict({"lr": 0.1, "batch": float(batch[0])}, batch_size=1)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/batch", float(batch[0]), batch_size=1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    return Falling()


def logged(base, folder, every, accumulate):
    logger = MetricsFile(folder / f"{base.__name__}-{every}-{accumulate}.csv")
    trainer = make_trainer(
        "cpu", max_steps=13, log_every_n_steps=every, accumulate_grad_batches=accumulate, val_check_interval=4,
        logger=logger, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module(base), *(BatchLoader(in_order(10), 1, lambda mine, _: mine, keep_rest=val) for val in (0, 1)))
    return read_metrics(logger.path)


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (5, 2)])
def test_what_is_written_is_what_lightning_alone_writes(tmp_path, every, accumulate):
    rows = logged(StepLog, tmp_path, every, accumulate)
    assert rows == logged(LightningModule, tmp_path, every, accumulate)
    assert sum("loss" in row for row in rows.values()) == 13 // every
    assert any("val/batch" in row for row in rows.values())


def test_a_step_that_nobody_sees_does_not_reach_lightning(tmp_path, monkeypatch):
    calls, log = [], LightningModule.log

    def counted(self, name, *arguments, **settings):
        calls.append(name)
        log(self, name, *arguments, **settings)

    monkeypatch.setattr(LightningModule, "log", counted)
    logged(StepLog, tmp_path, 5, 1)
    assert calls.count("loss") == 2  # of 13 steps


def test_a_mean_over_the_epoch_is_refused(tmp_path):
    class Mean(StepLog):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0, on_epoch=True)

        def configure_optimizers(self):
            return None

    with pytest.raises(ValueError, match="loss: on_epoch=True"):
        make_trainer("cpu", max_steps=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path).fit(
            Mean(), BatchLoader(in_order(2), 1, lambda mine, _: mine)
        )


@pytest.mark.parametrize(("own", "trainers", "norm"), [(1e-3, None, 1e-3), (1e-3, 1e-4, 1e-4), (None, 1e-4, 1e-4)])
def test_gradients_are_clipped_to_what_the_module_says_or_the_trainer(own, trainers, norm):
    falling, settings = module(StepLog).double(), {"logger": False, "enable_progress_bar": False}
    falling.max_grad_norm = own
    before = nn.utils.parameters_to_vector(falling.parameters()).detach().clone()
    make_trainer("cpu", precision="64-true", max_steps=1, gradient_clip_val=trainers, **settings).fit(
        falling, BatchLoader(in_order(10), 1, lambda mine, _: mine)
    )
    step = nn.utils.parameters_to_vector(falling.parameters()).detach() - before
    torch.testing.assert_close(step.norm().item(), 0.01 * norm, rtol=1e-3, atol=0.0)  # a learning rate of 0.01
