"""A stage that was stopped and goes on gives the weights of one that was not, to the bit."""

import copy
import random
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, add_lora, critic_from_reward_model, critic_on_policy
from lit_rlhf.pipeline.run import execute, exported_weights, finding_of, make_callbacks
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule, PreferenceModule, WorldPreferenceDataModule, WorldPretrainDataModule
from lit_rlhf.stages.ppo import KLPenalty, KLPenaltyLoss, MonteCarlo, ReferenceUpdate, Scoring
from lit_rlhf.stages.progress_file import ProgressFile
from lit_rlhf.text.world import SimulatedLabeler
from lit_rlhf.training import MetricsFile, make_trainer, read_metrics


class Stop(Exception):
    """A process that is killed after some batches."""


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batches:
            raise Stop


@pytest.fixture
def stage(request, stages):
    """() -> (module, data)"""
    return stages[request.param]


@pytest.mark.parametrize("batches", [1, 4, 5, 7])  # 5 is the last batch of an epoch of SFT, reward model and DPO
@pytest.mark.parametrize(
    ("stage", "budget"),
    [
        ("pretrain", {"max_steps": 9}),
        ("sft", {"max_steps": 9}),
        ("sft", {"max_epochs": 3}),
        ("reward", {"max_epochs": 2}),
        ("dpo", {"max_epochs": 2}),
        ("classify", {"max_epochs": 2}),
    ],
    indirect=["stage"],
)
def test_stopped_and_resumed_equals_uninterrupted(stage, budget, batches, fit):
    whole, data = stage()
    fit(whole, data, "whole", **budget)
    stopped, data = stage()
    with pytest.raises(Stop):
        fit(stopped, data, "parts", callbacks=[StopAfter(batches)], every=1, **budget)
    resumed, data = stage()
    torch.manual_seed(99)  # a new process has other random numbers
    fit(resumed, data, "parts", resume=True, **budget)
    assert any((a != b).any() for a, b in zip(stopped.parameters(), whole.parameters()))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def brevity(prompts, responses, **_):
    return [float(len(r)) for r in responses]


PPO = {
    "default": lambda world: {},
    "all that adapts": lambda world: {
        "kl": KLPenalty(estimator="k2", in_loss=True, adaptive=True, target=0.05, horizon=40.0, stop=0.5),
        "loss": KLPenaltyLoss(beta=0.5, target=1e-3),
        "scoring": Scoring(functions=[brevity], scale="running", center=True),
        "reference": ReferenceUpdate(ema=0.7),
    },
    "reference in half precision": lambda world: {"reference": ReferenceUpdate(dtype="bfloat16")},
    "refreshed reference": lambda world: {"reference": ReferenceUpdate(refresh_every=2)},
    "ptx": lambda world: {
        "ptx": partial(WorldPretrainDataModule, world, documents=200, block_size=24), "ptx_coef": 0.5,
    },
    "LoRA": lambda world: {"lora": LoRA(r=2), "critic": partial(critic_from_reward_model, lora=LoRA(r=2))},
    "shared critic": lambda world: {"critic": critic_on_policy, "critic_warmup": 2, "probe_rollouts": 1},
    "RLOO of whole answers": lambda world: {
        "advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 2, "action": "answer",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PPO)
def test_every_ppo_resumes_with_its_coefficients_and_metrics(kind, world, policy, ppo, prompts, fit):
    def make():
        settings = PPO[kind](world)
        torch.manual_seed(0)  # the run's seed: adapters begin at random
        adapted = add_lora(copy.deepcopy(policy), settings.pop("lora", None))
        return ppo(adapted, sampling=Sampling(max_new_tokens=6), ppo_epochs=2, **settings)

    budget = {"max_epochs": 1, "limit_train_batches": 5}
    whole = make()
    fit(whole, prompts(), "whole", **budget)
    for batches in (1, 2, 4):
        stopped = make()
        with pytest.raises(Stop):
            fit(stopped, prompts(), "parts", callbacks=[StopAfter(batches)], every=1, **budget)
        resumed = make()
        torch.manual_seed(99)
        fit(resumed, prompts(), "parts", resume=True, **budget)
        assert whole.state_dict().keys() == resumed.state_dict().keys()
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
            assert torch.equal(a, b), (batches, name)
        assert any((a != b).any() for a, b in zip(stopped.parameters(), whole.parameters()))
        for name, values in resumed.logged.items():
            assert values == whole.logged[name][-len(values) :], (batches, name)
        assert len(resumed.logged["ppo/score"]) == 5 - batches


class Start:
    """Starts of a stage in one folder, each as the command makes it; what they leave behind."""

    def __init__(self, folder, name, make, draw):
        self.path, self.stage, self.make, self.rescue = folder, name, make, None
        budget = draw.choice([{"max_steps": draw.randint(5, 9)}, {"max_epochs": draw.randint(2, 3)}])
        if name == "ppo":
            budget = {"max_epochs": 2}
        every = draw.choice([1, 2, 3, 7])
        self.trainer = {
            **budget, "val_check_interval": draw.choice([2, 3, 4]), "limit_train_batches": draw.choice([2, 3, 4]),
            "log_every_n_steps": 1, "enable_progress_bar": False,
        }  # fmt: skip
        self.settings = OmegaConf.create(
            {"run": "fit", "validate_first": name != "ppo", "checkpoint_every": every}
            | ({"keep": {"best": True, "metric": f"val/{name}/{'score' if name == 'ppo' else 'loss'}", "mode": "min"}})
            | ({"samples_every": 2} if name not in ("reward", "classify") else {})
            | ({"health": {"_target_": "lit_rlhf.stages.ppo.HealthWatch", "path": str(folder / "health.jsonl")}}
               if name == "ppo" else {})
        )  # fmt: skip

    @property
    def checkpoint(self):
        return next(self.path.glob("checkpoints/last.ckpt"), None)

    def __call__(self, stop=None, first=False):
        self.path.mkdir(exist_ok=True)
        module, data = self.make()
        first_steps = {"_target_": "lit_rlhf.training.FirstSteps", "_partial_": True, "window": 2, "margin": 0.01}
        cfg = OmegaConf.create({"callbacks": {"progress_bar": False, "first_steps": first_steps}})
        callbacks = make_callbacks(cfg, self.stage, self.settings, self)
        callbacks = [*([stop] if first else []), *callbacks, *([stop] if stop and not first else [])]
        logger = MetricsFile(self.path / "metrics.csv")
        trainer = make_trainer("cpu", logger=logger, callbacks=callbacks, default_root_dir=self.path, **self.trainer)
        data.setup()
        self.last = trainer, module
        execute(self.settings, trainer, module, data, self)
        logger.write()
        return {
            **module.state_dict(),
            "metrics": read_metrics(self.path / "metrics.csv"),
            "figures": str(module.figures()) + str(finding_of(callbacks)),
            **{name: file.read_text() for name in ("samples", "health") for file in self.path.glob(f"{name}.jsonl")},
        }


def differing(a, b):
    same = {k: torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a.keys() & b.keys()}
    return [name for name in a.keys() | b.keys() if not same.get(name)]


def check_history(draw, folder, name, make, stop_at):
    """A stage that is stopped 1 to 4 times, anywhere, leaves what it leaves when nothing stops it."""
    state = draw.getstate()
    whole = Start(folder / "whole", name, make, draw)()
    draw.setstate(state)
    start = Start(folder / "parts", name, make, draw)
    stops = [(draw.randint(1, 45), draw.random() < 0.7, draw.random() < 0.5) for _ in range(draw.randint(1, 4))]
    for moment, killed, first in stops:
        with stop_at(start.path, moment, killed) as stop:
            start(stop, first)
    assert not differing(start(), whole), (stops, start.trainer, start.settings)


@pytest.mark.parametrize("stage", ["sft"], indirect=True)
def test_weights_that_no_step_has_left_are_not_exported(stage, tmp_path):
    start = Start(tmp_path / "run", "sft", stage, random.Random(0))
    start()
    trainer, module = start.last
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    step = best["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    assert exported_weights(trainer, module, start)["weights"]["step"] == step
    with torch.no_grad():
        next(module.parameters())[0, 0] += 1e-4
    with pytest.raises(UserError, match=f"the weights in memory are not those that step {step} left"):
        exported_weights(trainer, module, start)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "classify"], indirect=True)
def test_any_history_of_stops(stage, seed, request, tmp_path, stop_at):
    name = request.node.callspec.params["stage"]
    check_history(random.Random(f"{name} {seed}"), tmp_path, name, stage, stop_at)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("kind", [*PPO, "a budget that ends it"])
def test_any_history_of_stops_of_ppo(kind, seed, world, policy, ppo, prompts, tmp_path, stop_at):
    def make():
        budget = {"kl": KLPenalty(budget=1e-3)}
        settings = PPO[kind](world) if kind in PPO else budget
        torch.manual_seed(0)  # the run's seed: adapters begin at random
        adapted = add_lora(copy.deepcopy(policy), settings.pop("lora", None))
        return ppo(adapted, sampling=Sampling(max_new_tokens=4), kind=PPOModule, **settings), prompts()

    check_history(random.Random(f"{kind} {seed}"), tmp_path, "ppo", make, stop_at)


@pytest.mark.parametrize("step", [9, 10, 13])  # 8 an iteration: in the first optimization epoch, its end, the second
def test_an_iteration_that_was_cut_off_is_repeated_from_its_start(step, policy, ppo, prompts, fit):
    settings = {"sampling": Sampling(max_new_tokens=6), "minibatch_size": 4, "ppo_epochs": 4}
    budget = {"max_epochs": 1, "limit_train_batches": 3, "batch_size": 8}
    batch_size = budget.pop("batch_size")
    whole, stopped, resumed = (ppo(copy.deepcopy(policy), **settings) for _ in range(3))
    fit(whole, prompts(batch_size=batch_size), "whole", **budget)
    update, calls = stopped.update, iter(range(1, 1000))

    def killed(*arguments):
        if next(calls) > step:
            raise Stop
        return update(*arguments)

    stopped.update = killed
    with pytest.raises(Stop):
        fit(stopped, prompts(batch_size=batch_size), "parts", every=1, **budget)
    fit(resumed, prompts(batch_size=batch_size), "parts", resume=True, **budget)
    assert len(resumed.logged["ppo/score"]) == 2  # of 3 iterations the first was whole
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    for name, values in resumed.logged.items():
        assert values == whole.logged[name][-len(values) :], name


def test_collection_that_was_killed_ends_with_the_same_records(tmp_path, world, tokenizer, policy, short):
    def collect(file, limit=1.0):
        module = PreferenceModule(
            policy, tokenizer, SimulatedLabeler(world), answers_per_prompt=3, sampling=short, progress_file=file
        )
        data = WorldPreferenceDataModule(world, tokenizer, prompts=24, batch_size=8, limit_held_out=8)
        data.setup()
        trainer = make_trainer("cpu", logger=False, enable_progress_bar=False, limit_predict_batches=limit)
        trainer.predict(module, datamodule=data, return_predictions=False)
        return module

    whole = collect(tmp_path / "whole.jsonl")
    collect(tmp_path / "parts.jsonl", limit=2)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('[2, [{"prompt": "half a li')  # killed while it wrote
    resumed = collect(tmp_path / "parts.jsonl")
    assert resumed.records == whole.records
    assert len(whole.records) == 32
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("half", ['[1, "ä'.encode()[:-1], b"[", b'[1, "b"]'], ids=["in a character", "begun", "whole"])
def test_the_half_line_of_a_killed_writer_is_written_anew(tmp_path, half):
    (tmp_path / "progress.jsonl").write_bytes(b'[0, "a"]\n' + half)
    assert ProgressFile(tmp_path / "progress.jsonl").results == {0: "a"}
    ProgressFile(tmp_path / "progress.jsonl").add(1, "b")
    assert ProgressFile(tmp_path / "progress.jsonl").results == {0: "a", 1: "b"}


@pytest.mark.parametrize("line", ["nonsense", "{}", "[1]", "", '[[], "b"]', "1"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "progress.jsonl").write_text(f'[0, "a"]\n{line}\n[2, "c"]\n')
    with pytest.raises(UserError, match=r"progress.jsonl:2: damaged.*delete the line"):
        ProgressFile(tmp_path / "progress.jsonl")
