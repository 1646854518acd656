"""What a user adds in files of their own, as docs/architecture.md says: engine, advantage, loss, reward function."""

import csv
import json
import shutil

import pytest

MINE = '''
import torch
from lit_rlhf.rollouts import FastEngine


class Engine(FastEngine):
    """Counts what it is asked for."""

    def generate(self, requests, *, states=False):
        with open("asked.txt", "a") as file:
            print(len(requests), file=file)
        return super().generate(requests, states=states)


def advantage(rewards, values, mask, answers_per_prompt):
    totals = rewards.sum(-1, keepdim=True).expand_as(rewards)
    return torch.where(mask, totals, 0.0), None


def loss(logprobs, old_logprobs, advantages, mask):
    return 0.0 * logprobs.sum() + 7.0


def reward(prompts, responses, **record):
    return [3.0] * len(responses)
'''
FILES = {
    "engine/mine.yaml": "_target_: mine.Engine\n",
    "ppo/advantage/mine.yaml": "# @package ppo\nadvantage: {_target_: mine.advantage, _partial_: true}\n"
    "module: {whiten: false}\n",
    "ppo/loss/mine.yaml": "_target_: mine.loss\n_partial_: true\n",
}


@pytest.mark.slow
def test_engine_advantage_loss_and_reward_of_ones_own(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    for name, text in FILES.items():
        (tmp_path / "my_conf" / name).parent.mkdir(parents=True)
        (tmp_path / "my_conf" / name).write_text(text, encoding="utf-8")
    choices = ["engine=mine", "ppo/advantage=mine", "ppo/loss=mine", "ppo.scoring.functions=[mine.reward]"]
    scores = ["ppo.scoring.reward_model_weight=0", "ppo.scoring.scale=none"]
    lit_rlhf("--config-dir", "my_conf", "stage=ppo", "from_run=quickstart", "run=own", *choices, *scores, fresh=True)
    with open(tmp_path / "runs/own/ppo/metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["ppo/policy_loss"]]
    assert {float(row["ppo/policy_loss"]) for row in rows} == {7.0}
    assert all(2.0 <= float(row["ppo/score"]) <= 3.0 for row in rows)  # 1 less where an answer was cut off
    assert (tmp_path / "asked.txt").read_text().split()
    assert json.loads((tmp_path / "runs/own/ppo/done.json").read_text())
