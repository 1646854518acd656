"""Pretraining that goes on from a checkpoint."""

import json

import pytest
import torch

from lit_rlhf.models import load_policy
from lit_rlhf.models.text_rows import text_loss
from lit_rlhf.stages import PretrainDataModule
from lit_rlhf.text import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(new.txt, old.jsonl)"""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "new.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80, encoding="utf-8")
    rows = [{"text": f"The rof number {i} eats grass and sleeps in a tree at night."} for i in range(40)]
    (folder / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "new.txt", folder / "old.jsonl"


def mean_loss(model, loader):
    batches = list(loader)
    with torch.no_grad():
        losses = [text_loss(model, rows).item() * rows.labels.numel() for rows in batches]
    return sum(losses) / sum(rows.labels.numel() for rows in batches)


def test_goes_on_from_a_checkpoint_and_watches_the_old_text(lit_rlhf, finished_run, texts, tmp_path):
    checkpoint, (new, old) = finished_run / "runs/quickstart/pretrain/model", texts
    lit_rlhf(
        "run=on", "stage=[pretrain,sft]", "model=hf", f"model.path={checkpoint}", "pretrain/init=checkpoint",
        "pretrain/data=text", f"pretrain.data.path={new}", f"pretrain.data.old_path={old}",
        "pretrain.trainer.limit_val_batches=1.0", "pretrain.trainer.precision=32-true", "pretrain.optimizer.lr=1e-3",
    )  # fmt: skip
    run = tmp_path / "runs/on"
    found = json.loads((run / "pretrain/done.json").read_text())["figures"]
    assert found["val_loss"] < found["val_loss_first"]
    # The figures by hand: before from the checkpoint, after from what was exported, on all of the old text.
    data = PretrainDataModule(
        str(new), load_tokenizer(checkpoint), old_path=str(old), batch_size=8, block_size=48, held_out=0.1
    )
    data.setup()
    for figure, folder in (("_first", checkpoint), ("", run / "pretrain/model")):
        model = load_policy(folder).eval()
        for name, loader in zip(("val_loss", "old_loss"), data.val_dataloader()):
            assert found[f"{name}{figure}"] == pytest.approx(mean_loss(model, loader), rel=1e-4)
    # What comes next starts from it, not from the checkpoint.
    assert "pretrain/model" in json.loads((run / "sft/done.json").read_text())["inputs"]


def test_old_text_is_not_learned_from(texts, finished_run):
    new, old = texts
    tokenizer = load_tokenizer(finished_run / "runs/quickstart/pretrain/model")
    plain = PretrainDataModule(str(new), tokenizer, block_size=16)
    watched = PretrainDataModule(str(new), tokenizer, old_path=str(old), block_size=16)
    for data in (plain, watched):
        data.setup()
    assert all(a.tokens.equal(b.tokens) for a, b in zip(plain.train_dataloader(), watched.train_dataloader()))
    held_out, old_rows = watched.val_dataloader()
    assert all(a.tokens.equal(b.tokens) for a, b in zip(plain.val_dataloader(), held_out))
    assert "rof" in tokenizer.decode(next(iter(old_rows)).tokens[0])


def test_rows_that_are_skipped_are_counted(lit_rlhf, texts, tmp_path):
    rows = [{"text": "The rof eats grass, and sleeps in a tree. " * 4}] * 40
    lines = [json.dumps(row) for row in rows] + ['{"text": 3}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    said = lit_rlhf(
        "stage=pretrain", "pretrain/data=text", "pretrain.data.path=rows.jsonl", "pretrain.data.on_bad_record=skip"
    ).stdout
    assert "pretrain: 1 records were skipped as invalid, the first: rows.jsonl:41" in said
