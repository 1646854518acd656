"""Two processes on a CPU learn what one learns from the same total batch."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.slow
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


def test_two_processes_equal_one(lit_rlhf, finished_run, tmp_path):
    """Stage by stage that is tests/stages/test_processes.py."""
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    exact = ["trainer.precision=32-true", "ppo.module.ppo_epochs=2"]  # in bfloat16 each process rounds its own sums
    exact += ["ppo.module.kl_coef=0.2"]
    one, two = ([f"ppo.data.batch_size={n}", f"ppo.module.minibatch_size={n // 2}"] for n in (16, 8))
    lit_rlhf("stage=[ppo,evaluate]", "run=one", "from_run=quickstart", *one, *exact)
    chain = ["stage=[ppo,evaluate]", "run=two", "from_run=quickstart", *two, *exact, "ppo.module.micro_batch_size=3"]
    said = lit_rlhf(*chain, *TWO, fresh=True).stdout
    assert said.count("report:") == 1  # one process speaks
    runs = tmp_path / "runs"
    first, second = (load_file(runs / run / "ppo" / "model" / "model.safetensors") for run in ("one", "two"))
    start = load_file(runs / "quickstart" / "sft" / "model" / "model.safetensors")
    moved = sum((first[name] - start[name]).square().sum() for name in first).sqrt()
    apart = sum((first[name] - second[name]).square().sum() for name in first).sqrt()
    assert moved > 0.1
    assert apart < 0.01 * moved  # sums in another order, which Adam enlarges where a gradient is all but 0
    one, two = (json.loads((runs / run / "summary.json").read_text()) for run in ("one", "two"))
    assert one["ppo"]["episodes"] == two["ppo"]["episodes"] == 48
    assert_close(one["ppo"]["score_last"], two["ppo"]["score_last"], atol=1e-3, rtol=1e-3)
    assert one["evaluate"]["models"]["sft"] == two["evaluate"]["models"]["sft"]  # which is the same model in both


def test_two_processes_end_a_rollout_together(lit_rlhf, finished_run, tmp_path):
    """One that went on alone would wait for the other for ever; each sees its own answers and divergence."""
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    moving = ["ppo.kl.stop=2.5e-4", "ppo.kl.adaptive=true", "ppo.kl.target=0.1", "ppo/loss=kl_penalty"]
    small = ["ppo.data.batch_size=4", "ppo.module.minibatch_size=4", "ppo.module.ppo_epochs=8", "ppo.optimizer.lr=3e-4"]
    lit_rlhf(
        "stage=ppo", "run=two", "from_run=quickstart", *moving, *small, "ppo.module.ptx_coef=0.1", *TWO, fresh=True
    )
    figures = json.loads((tmp_path / "runs" / "two" / "summary.json").read_text())["ppo"]
    assert figures["episodes"] == 24 and figures["kl_coef"] != pytest.approx(0.08)


def test_chain_with_two_processes(lit_rlhf, tmp_path):
    said = lit_rlhf("stage=[pretrain,sft,preference]", *TWO, fresh=True).stdout
    assert (tmp_path / "runs" / "quickstart" / "data" / "rankings-0.jsonl").is_file()
    assert said.count("\npretrain: val_loss_first") + said.startswith("pretrain: val_loss_first") == 1
