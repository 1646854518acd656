import math

import pytest
import torch
from lightning import LightningModule
from torch import nn

from lit_rlhf.training import MetricsFile, make_trainer, read_metrics
from lit_rlhf.training.batches import BatchLoader, in_order


def test_one_row_a_step_and_one_column_a_metric(tmp_path):
    file = MetricsFile(tmp_path / "stage" / "metrics.csv")
    file.log_metrics({"loss": 2.5, "epoch": 0}, step=4)
    file.log_metrics({"loss": torch.tensor(0.1, dtype=torch.float64), "lr": 1e-4}, step=9)
    file.log_metrics({"val/loss": 3}, step=4)
    file.finalize("success")
    assert file.path.read_text() == "step,loss,val/loss,lr\n4,2.5,3.0,\n9,0.1,,0.0001\n"
    assert read_metrics(file.path) == {4: {"loss": 2.5, "val/loss": 3.0}, 9: {"loss": 0.1, "lr": 1e-4}}
    assert [f.name for f in file.path.parent.iterdir()] == ["metrics.csv"]


def test_a_value_logged_again_takes_the_place_of_the_first(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    for value in (1.0, 2.0):
        file.log_metrics({"loss": value}, step=1)
    file.write()
    assert read_metrics(file.path) == {1: {"loss": 2.0}}


def test_values_come_back_to_the_bit_and_nan_stays_nan(tmp_path):
    values = {"a": 1 / 3, "b": 1e-300, "c": -0.0, "inf": math.inf, "nan": math.nan}
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics(values, step=0)
    file.write()
    row = read_metrics(file.path)[0]
    assert math.isnan(row.pop("nan")) and row == {k: v for k, v in values.items() if k != "nan"}


def test_rows_of_an_interrupted_run_are_kept_without_doubles(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in (0, 10, 20, 30):
        first.log_metrics({"loss": float(step), "old": 1.0}, step)
    first.finalize("failed")
    second = MetricsFile(path)  # goes on from a checkpoint of step 15
    for step in (20, 30, 40):
        second.log_metrics({"loss": -float(step)}, step)
        second.write()
        assert max(read_metrics(path)) == step  # what is about to be repeated is not shown
    assert read_metrics(path) == {
        0: {"loss": 0.0, "old": 1.0}, 10: {"loss": 10.0, "old": 1.0}, 20: {"loss": -20.0, "old": 1.0},
        30: {"loss": -30.0}, 40: {"loss": -40.0},
    }  # fmt: skip


def test_a_line_that_was_cut_off_by_a_kill_is_no_row(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.25\n2,0.1")  # of 0.125
    assert read_metrics(path) == {1: {"loss": 0.25}}
    file = MetricsFile(path)
    file.log_metrics({"loss": 0.125}, 2)
    file.write()
    assert read_metrics(path) == {1: {"loss": 0.25}, 2: {"loss": 0.125}}


def test_nothing_logged_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).finalize("success")
    assert not path.exists() and read_metrics(path) == {}
    path.write_text("step,loss\n1,2.0\n")
    MetricsFile(path).finalize("failed")
    assert read_metrics(path) == {1: {"loss": 2.0}}


class Counter(LightningModule):
    """Logs its step number, and fails at the step ``fail_at``."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.layer, self.fail_at = nn.Linear(1, 1), fail_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("broken")
        self.log("step_number", float(self.global_step), batch_size=1)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/step_number", float(self.global_step), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("fail_at", [None, 7])
def test_what_lightning_logs_is_written_also_where_training_breaks_off(tmp_path, fail_at):
    logger = MetricsFile(tmp_path / "metrics.csv", flush_seconds=1e9)
    batches, val = (BatchLoader(in_order(5), 1, lambda mine, _: mine, keep_rest=keep) for keep in (False, True))
    trainer = make_trainer(
        "cpu", max_steps=12, val_check_interval=4, log_every_n_steps=2, logger=logger, enable_progress_bar=False
    )
    try:
        trainer.fit(Counter(fail_at), batches, val)
    except RuntimeError:
        assert fail_at is not None
    rows = read_metrics(logger.path)
    last = 12 if fail_at is None else fail_at
    trained = {step: row["step_number"] for step, row in rows.items() if "step_number" in row}
    assert trained == {step: float(step) for step in range(1, last, 2)}  # the second, fourth ... step
    validated = {step: row["val/step_number"] for step, row in rows.items() if "val/step_number" in row}
    assert validated == {step: step + 1.0 for step in range(3, last, 4)}  # beside the step that they came after
