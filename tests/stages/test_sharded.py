"""FSDP2 in two processes on a CPU: what they learn together, stopped and gone on with, is what one process learns."""

import copy
import errno
import shutil
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    LoRA,
    RewardHead,
    TextRewardModel,
    add_lora,
    chunked,
    critic_on_policy,
    load_policy,
    save_model,
)
from lit_rlhf.models.gathering import full
from lit_rlhf.models.loading import loading_as_stored
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.processes import is_main_process
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule, SFTModule, WorldPretrainDataModule, WorldSFTDataModule
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo, ReferenceUpdate
from lit_rlhf.training import FSDP2, adamw
from lit_rlhf.training.checkpoint_shards import read_shards
from lit_rlhf.training.trained_state import weights_fingerprint

pytestmark = pytest.mark.slow
SHARDED = {"strategy": "fsdp2", "devices": 2}
FIGURES = {
    f"ppo/{name}"
    for name in ("score", "kl", "loss", "grad_norm", "critic_grad_norm", "ptx_loss", "ptx_grad_norm", "response_length")
}


class Stop(Exception):
    pass


class Watch(Callback):
    """Keeps what each step logs; ends a training after some batches."""

    def __init__(self, batches=10**9):
        self.batches, self.steps = batches, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batches:
            raise Stop

    def on_train_batch_end(self, trainer, module, *_):
        found = trainer.callback_metrics.items()
        self.steps.append({name: float(x) for name, x in found if name.endswith("/loss") or name in FIGURES})


@pytest.fixture
def trained(fit, in_processes, tmp_path, monkeypatch):
    """(make, for one process; for two) -> ((steps, validation, exported weights) of one process, the same of two)."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # as a stage has it

    def run(make, halved, budget, stop, **settings):
        def begun(folder, callback, **more):
            module, data = make() if folder == "one" else halved()
            data.setup()
            if hasattr(module, "calibration"):
                module.calibration = data.calibration
            return module, data, fit(module, data, folder, callbacks=[callback], **budget, **more)

        def ended(watch, module, data, trainer):
            trainer.validate(module, datamodule=data, verbose=False)
            return watch.steps, {name: float(x) for name, x in trainer.callback_metrics.items() if "val/" in name}

        def in_two():
            before, after = Watch(stop), Watch()
            with pytest.raises(Stop):
                begun("two", before, every=1, **SHARDED, **settings)
            torch.manual_seed(99)
            module, data, trainer = begun("two", after, resume=True, **SHARDED, **settings)
            steps, validation = ended(after, module, data, trainer)
            assert module.parameters() and all(isinstance(p, DTensor) for p in module.parameters())
            names = [n for n, p in module.named_parameters() if p.requires_grad and not n.startswith("critic.")]
            digest = weights_fingerprint(module.state_dict()[name] for name in names)
            module.end_sharding()
            if is_main_process():
                assert digest == weights_fingerprint(module.state_dict()[name] for name in names)
                module.export(tmp_path / "two")
            return before.steps + steps, validation

        watch = Watch()
        module, data, trainer = begun("one", watch)
        one = ended(watch, module, data, trainer)
        module.export(tmp_path / "one")
        two, other = in_processes(2, in_two)
        assert two == other
        weights = [load_file(tmp_path / folder / "model/model.safetensors") for folder in ("one", "two")]
        return (*one, weights[0]), (*two, weights[1])

    return run


def close(one, two, tolerance):
    """Numbers or tensors by name: what they differ by against their size, of figures below 1 against 1."""
    assert one.keys() == two.keys()
    for name in one:
        a, b = torch.as_tensor(one[name]).double(), torch.as_tensor(two[name]).double()
        assert (a - b).norm() <= tolerance * (a.norm() if a.dim() else max(a.abs(), 1)), (name, one[name], two[name])


@pytest.mark.parametrize(
    ("stage", "budget"),
    [
        ("pretrain", {"max_steps": 6}),
        ("sft", {"max_epochs": 2}),
        ("reward", {"max_steps": 6}),
        ("classify", {"max_epochs": 1}),
        ("dpo", {"max_steps": 6}),
    ],
)
def test_a_sharded_stage_is_the_same(stage, budget, stages, trained, monkeypatch):
    if stage == "sft":
        monkeypatch.setattr(chunked, "LOGITS", 4096)  # gradients of large embeddings are added in their place

    def whole():
        module, data = stages[stage]()
        if stage == "pretrain":
            module.optimizer = partial(adamw, lr=1e-2, matrix_lr=1e-2)
        return module, data

    def halved():
        module, data = whole()
        data.batch_size //= 2
        return module, data

    settings = {"activation_checkpointing": True} if stage == "sft" else {}
    one, two = trained(whole, halved, budget, stop=2, **settings)
    assert one[1]
    for mine, theirs in zip([*one[0], *one[1:]], [*two[0], *two[1:]], strict=True):
        close(mine, theirs, 1e-4)


@pytest.mark.parametrize(
    ("lora", "added"),
    [(LoRA(), []), (LoRA(r=2), []), (LoRA(), ["<one>", "<two>"])],
    ids=["all weights", "adapters", "a vocabulary that grows"],
)
def test_what_is_stored_in_bfloat16_is_sharded_in_float32(
    lora, added, policy, tokenizer, optimizer, world, trained, tmp_path
):
    save_model(policy.to(torch.bfloat16), tokenizer, tmp_path / "start")
    tokenizer.add_tokens(added)

    def make(size=8):
        torch.manual_seed(0)
        start = load_policy(tmp_path / "start", tokenizer, lora=lora)
        data = WorldSFTDataModule(world, tokenizer, demonstrations=40, batch_size=size)
        return SFTModule(start, tokenizer, optimizer=optimizer), data

    def halved():
        with loading_as_stored():
            return make(4)

    one, two = trained(make, halved, {"max_steps": 6}, stop=2)
    for mine, theirs in zip([*one[0], one[1]], [*two[0], two[1]], strict=True):
        close(mine, theirs, 1e-4)


def test_a_sharded_likelihood_head_is_the_same(policy, stages, trained):
    """It reads the logits of a language model whose own head it keeps."""
    config = copy.deepcopy(policy.config)
    config.tie_word_embeddings = False

    def make():
        torch.manual_seed(0)
        module, data = stages["reward"]()
        start = AutoModelForCausalLM.from_config(config)
        module.reward_model = RewardTransformer.from_policy(start, RewardHead("likelihood")).train()
        assert module.reward_model.score.lm_head is not None
        return module, data

    def halved():
        module, data = make()
        data.batch_size //= 2
        return module, data

    one, two = trained(make, halved, {"max_steps": 6}, stop=2)
    for mine, theirs in zip([*one[0], *one[1:]], [*two[0], *two[1:]], strict=True):
        close(mine, theirs, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="reward model and critic"),
        pytest.param({"ptx_coef": 0.5, "head": RewardHead("likelihood")}, id="text, a likelihood head"),
        pytest.param({"critic": critic_on_policy, "reference": ReferenceUpdate(ema=0.7)}, id="what follows the policy"),
        pytest.param(
            {
                "lora": LoRA(r=2), "advantage": MonteCarlo(), "kl": KLPenalty("full", in_loss=True), "by_text": True,
            },
            id="adapters, a reward model that is asked by text",
        ),
    ],
)  # fmt: skip
def test_sharded_ppo_is_the_same(settings, policy, reward_model, tokenizer, ppo, prompts, world, trained, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 4096)  # gradients of large embeddings are added in their place
    more = dict(settings)
    lora, head, by_text = (more.pop(name, None) for name in ("lora", "head", "by_text"))
    if "ptx_coef" in more:
        more["ptx"] = partial(WorldPretrainDataModule, world, documents=200, block_size=24, held_out=0.1)

    def make(size):
        torch.manual_seed(0)
        adapted = add_lora(copy.deepcopy(policy), lora)
        scorer = RewardTransformer.from_policy(copy.deepcopy(policy), head) if head else reward_model
        scorer = TextRewardModel(copy.deepcopy(scorer), tokenizer) if by_text else scorer
        more["minibatch_size"] = size
        module = ppo(adapted, scorer, kind=PPOModule, sampling=Sampling(max_new_tokens=6), ppo_epochs=2, **more)
        return module, prompts(batch_size=size)

    budget = {"max_epochs": 1, "limit_train_batches": 5}
    one, two = trained(lambda: make(8), lambda: make(4), budget, stop=3)
    for mine, theirs in zip(one[0], two[0], strict=True):
        close(mine, theirs, 1e-5)
    close(one[2], two[2], 1e-5)


def test_any_number_of_processes_goes_on_with_a_checkpoint_folder(stages, fit, in_processes, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def start(number, folder, stop=10**9, resume=False, **settings):
        module, data = stages["sft"]()
        data.batch_size = 12 // number
        try:
            fit(module, data, folder, callbacks=[Watch(stop)], every=1, resume=resume, max_steps=6, **settings)
        except Stop:
            return None
        return {name: full(p.detach()) for name, p in module.named_parameters()}

    whole = start(1, "whole")
    in_processes(2, lambda: start(2, "run", 2, **SHARDED))
    in_processes(3, lambda: start(3, "run", 4, resume=True, strategy="fsdp2", devices=3))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    [sharded] = in_processes(1, lambda: start(1, "copy", resume=True, strategy="fsdp2"))
    close(whole, sharded, 1e-4)
    close(whole, start(1, "run", resume=True), 1e-4)  # not sharded, which leaves a file in the folder's place
    assert (tmp_path / "run/last.ckpt").is_file() and (tmp_path / "copy/last.ckpt").is_dir()


def test_in_bfloat16_gradients_are_summed_in_float32(stages, fit, in_processes, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def start(number, **settings):
        module, data = stages["pretrain"]()
        data.batch_size //= number
        watch = Watch()
        fit(module, data, str(number), callbacks=[watch], max_steps=4, precision="bf16-mixed", **settings)
        assert {p.dtype for p in module.parameters()} == {torch.float32} and len(module.write_samples()) == 2
        return watch.steps

    one, (two, _) = start(1), in_processes(2, lambda: start(2, **SHARDED))
    for mine, theirs in zip(one, two, strict=True):
        close(mine, theirs, 1e-2)


class KilledWhileWriting(Callback):
    """Keeps the third checkpoint from being written to its end; what SIGKILL leaves of the step after it is copied."""

    def __init__(self, folder):
        self.folder, self.free = folder, threading.Event()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            trainer.strategy.saved(wait=True)  # the second
            write = FileSystemWriter.write_data
            FileSystemWriter.write_data = lambda *given: self.free.wait() and write(*given)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 3:
            if is_main_process():
                assert (self.folder / "last.tmp.part").is_dir()
                shutil.copytree(self.folder, self.folder.parent / "killed")
            dist.barrier()
            self.free.set()
            raise Stop


def assert_whole(folder, step):
    assert read_shards(folder)["global_step"] == step


def test_a_checkpoint_written_beside_training_is_whole_or_not_there(stages, fit, in_processes, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def start(folder, callbacks=(), resume=False, beside=True):
        module, data = stages["pretrain"]()
        data.batch_size //= 2
        strategy = FSDP2(save_async=beside)
        try:
            fit(module, data, folder, callbacks, resume, every=1, max_steps=6, strategy=strategy, devices=2)
        except Stop:
            return None
        return [full(p.detach()) for p in module.parameters()]

    whole = in_processes(2, lambda: start("whole", beside=False))
    in_processes(2, lambda: start("run", [KilledWhileWriting(tmp_path / "run")]))
    assert_whole(tmp_path / "killed/last.ckpt", step=2)  # the third step's is not whole
    resumed = in_processes(2, lambda: start("killed", resume=True))
    assert_whole(tmp_path / "killed/last.ckpt", step=6)
    assert not [*tmp_path.glob("killed/*.part"), *tmp_path.glob("killed/*.tmp")]
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_disk_that_is_full_for_one_process_is_said_by_both(stages, fit, in_processes, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    class Fills(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                trainer.strategy.saved(wait=True)  # the second
                if not is_main_process():
                    monkeypatch.setattr(FileSystemWriter, "write_data", refuses)

    def refuses(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def start():
        module, data = stages["pretrain"]()
        data.batch_size //= 2
        strategy = FSDP2(save_async=True)
        with pytest.raises(UserError) as found:
            fit(module, data, "run", [Fills()], every=1, max_steps=6, strategy=strategy, devices=2)
        return str(found.value)

    for said in in_processes(2, start):
        assert said.startswith(f"{tmp_path}/run/last.ckpt: cannot be written (No space left on device); make room for")
    assert_whole(tmp_path / "run/last.ckpt", step=2)


def test_in_bfloat16_alone_no_weight_is_float32(policy, tokenizer, optimizer, world, fit, in_processes, tmp_path):
    save_model(policy.to(torch.bfloat16), tokenizer, tmp_path / "start")

    def start():
        with loading_as_stored():
            module = SFTModule(load_policy(tmp_path / "start", tokenizer), tokenizer, optimizer=optimizer)
        data = WorldSFTDataModule(world, tokenizer, demonstrations=16, batch_size=8)
        fit(module, data, max_steps=1, strategy="fsdp2", precision="bf16-true")
        return {p.dtype for p in module.parameters()}

    assert in_processes(1, start) == [{torch.bfloat16}]
