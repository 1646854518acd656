"""Small models on the built-in world: enough to see that the stages are right, not that they are good."""

import copy
import os
import pickle
import socket
import traceback
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning import seed_everything
from transformers import AutoModelForSequenceClassification

from lit_rlhf.models import policy_from_config
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import (
    ClassifyModule,
    DPOModule,
    PPOModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    WorldClassifyDataModule,
    WorldDPODataModule,
    WorldPPODataModule,
    WorldPretrainDataModule,
    WorldRewardDataModule,
    WorldSFTDataModule,
)
from lit_rlhf.text import ensure_chat_template, train_bpe
from lit_rlhf.text.classifier_inputs import add_classifier_tokens
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.text.world import SimulatedLabeler, World
from lit_rlhf.training import adamw, make_trainer, warmup_decay
from lit_rlhf.training.resuming import LastCheckpoint, RandomState

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="session")
def world():
    return World(0)


@pytest.fixture(scope="session")
def trained_tokenizer(world):
    tokenizer = train_bpe(world.corpus(400, 0), vocab_size=600)
    ensure_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def tokenizer(trained_tokenizer):
    """A copy for each test: some change it."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture
def policy(tokenizer):
    seed_everything(0, verbose=False)
    return policy_from_config(LLAMA, tokenizer)


@pytest.fixture
def family(model_config, tokenizer):
    """A policy like GPT-2, Llama or Qwen; packed rows are 128 tokens long, and GPT-2 counts their padding too."""
    length = "n_positions" if model_config["model_type"] == "gpt2" else "max_position_embeddings"
    torch.manual_seed(0)
    return policy_from_config({**model_config, length: 128}, tokenizer)


def scored(policy):
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model.eval()


@pytest.fixture
def reward_model(policy):
    return scored(policy)


@pytest.fixture
def reward_model_of():
    """(policy) -> a random reward model like it."""
    return scored


@pytest.fixture
def rankings(tmp_path, world):
    demonstrations = world.demonstrations(160, 3)
    held_out = world.demonstrations(40, 3, split="held_out")
    labeler = SimulatedLabeler(world)
    rows = []
    for row in [*demonstrations, *held_out]:
        responses = [row["response"], "I do not know.", world.best_answer(row["prompt"])]
        ranks = labeler([row["prompt"]], [responses])[0]
        rows.append({"prompt": row["prompt"], "responses": responses, "ranks": ranks})
    write_jsonl(tmp_path / "rankings.jsonl", rows)
    return tmp_path / "rankings.jsonl"


@pytest.fixture
def stages(world, tokenizer, policy, reward_model, rankings, optimizer):
    """Stage -> what makes its module and its data."""

    def classify():
        torch.manual_seed(0)  # the run's seed: the head and the new tokens begin at random
        its_tokenizer, reading = copy.deepcopy(tokenizer), copy.deepcopy(policy)
        add_classifier_tokens(its_tokenizer)
        reading.resize_token_embeddings(len(its_tokenizer), mean_resizing=False)
        data = WorldClassifyDataModule(world, its_tokenizer, examples=40, batch_size=8)
        data.setup()
        return ClassifyModule(reading, **data.for_module(), optimizer=optimizer), data

    make = {
        "pretrain": lambda: (
            PretrainModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer),
            WorldPretrainDataModule(world, tokenizer, documents=200, block_size=32, batch_size=32),
        ),
        "sft": lambda: (
            SFTModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer),
            WorldSFTDataModule(world, tokenizer, demonstrations=40, batch_size=8),
        ),
        "reward": lambda: (
            RewardModule(copy.deepcopy(reward_model), tokenizer, optimizer=optimizer),
            WorldRewardDataModule(rankings, tokenizer, world, batch_size=32),
        ),
        "classify": classify,
        "dpo": lambda: (
            DPOModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer),
            WorldDPODataModule(rankings, tokenizer, world, batch_size=32),
        ),
    }  # fmt: skip
    return make


@pytest.fixture
def fit(tmp_path):
    """Train a module; resumable, like a stage of a run."""

    def run(module, data, folder="run", callbacks=(), resume=False, **settings):
        last = LastCheckpoint(tmp_path / folder, settings.pop("every", 10**6))
        trainer = make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
            callbacks=[RandomState(), last, *callbacks], **settings,
        )  # fmt: skip
        data.setup()
        trainer.fit(module, datamodule=data, ckpt_path=last.path if resume else None, weights_only=True)
        return trainer

    return run


@pytest.fixture
def short():
    return Sampling(max_new_tokens=6)


@pytest.fixture
def optimizer():
    return partial(adamw, lr=1e-2)


class Watched(PPOModule):
    """Keeps rollouts, updates, logs, policies and, of the first two updates, the largest |ratio - 1| before them."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.batches, self.rollouts, self.updates, self.off, self.policies = [], [], [], [], []
        self.logged = defaultdict(list)

    def collect(self, prompts):
        rollout, statistics = super().collect(prompts)
        self.batches.append(prompts)
        self.rollouts.append(rollout)
        return rollout, statistics

    @torch.no_grad()
    def ratios(self, minibatch):
        """(N, A), each answer read alone by plain transformers."""
        logprobs = torch.zeros(len(minibatch), int(minibatch.lengths.max()))
        for i, (sequence, n) in enumerate(zip(minibatch.sequences, minibatch.lengths.tolist())):
            logprobs[i, :n] = plain_logprobs(self.policy, sequence, n, self.sampling.temperature)
        if self.action == "answer":
            logprobs = logprobs.sum(-1, keepdim=True)
        return torch.where(minibatch.mask, (logprobs - minibatch.old_logprobs).exp(), 1.0)

    def update(self, minibatch, number=0):
        if len(self.off) < 2:
            self.off.append((self.ratios(minibatch) - 1).abs().max().item())
        self.updates.append(super().update(minibatch, number))
        return self.updates[-1]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.policies.append({name: p.detach().clone() for name, p in self.policy.named_parameters()})

    def log_once(self, metrics):
        super().log_once(metrics)
        for name, value in metrics.items():
            self.logged[name].append(float(value))

    def log(self, name, value, **settings):
        self.logged[name].append(float(value))
        super().log(name, value, **settings)


def plain_logprobs(policy, sequence, length, temperature=1.0):
    """Log-probs (length,) of the last ``length`` tokens of one sequence, alone in a forward pass of transformers'."""
    tokens = torch.tensor([sequence])
    logprobs = (policy(input_ids=tokens).logits[0, -length - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(1, tokens[0, -length:, None])[:, 0]


@pytest.fixture
def logprobs_of():
    return plain_logprobs


@pytest.fixture
def ppo(policy, reward_model, tokenizer, optimizer):
    """(settings) -> PPO on copies of small models; it keeps what it did."""

    def make(policy=policy, reward_model=reward_model, kind=Watched, **settings):
        settings = {
            "sampling": Sampling(max_new_tokens=8), "minibatch_size": 4, "optimizer": optimizer, "kl_coef": 0.1,
            "critic_lr": 1e-3, "critic_head_lr": None, "schedule": partial(warmup_decay, warmup=0.05), **settings,
        }  # fmt: skip
        return kind(copy.deepcopy(policy), copy.deepcopy(reward_model), tokenizer, **settings)

    return make


@pytest.fixture
def prompts(world, tokenizer):
    """(settings) -> prompts of the world, ready."""

    def make(**settings):
        settings = {"prompts": 64, "batch_size": 8, "limit_held_out": 6, **settings}
        data = WorldPPODataModule(world, tokenizer, **settings)
        data.setup()
        return data

    return make


@pytest.fixture
def train(prompts, fit):
    """(module, iterations, settings of the data) -> the module, trained on the world's prompts."""

    def run(module, iterations=1, **settings):
        fit(module, prompts(**settings), max_epochs=1, limit_train_batches=iterations)
        return module

    return run


@pytest.fixture
def alone(prompts):
    """(module, rank) -> (module, batch): its methods can be called without a trainer."""

    def make(module, rank=0, world_size=1, **settings):
        data = prompts(**settings)
        strategy = SimpleNamespace(
            reduce=lambda x, reduce_op: x, reduce_boolean_decision=lambda decision, all: decision
        )
        module._trainer = SimpleNamespace(
            precision="32-true", world_size=world_size, global_rank=rank, strategy=strategy, datamodule=data,
            is_global_zero=True, progress_bar_callback=None, callback_metrics={},
        )  # fmt: skip
        module.log = module.log_dict = lambda *_, **__: None
        return module, next(iter(data.loader(data.train_prompts)))

    return make


@pytest.fixture
def moved():
    """(module) -> the module, its policy no longer the reference."""

    def move(module, by=0.05):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in module.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(by * torch.randn_like(parameter))
        return module

    return move


@pytest.fixture(autouse=True)
def _no_leftover_randomness():
    seed_everything(1, verbose=False)


@pytest.fixture
def in_processes(tmp_path):
    """(number, function, timeout) -> what the function returns in each of so many processes that talk by gloo.

    They are forks of this one, so that nothing is imported again, and nothing is handed over but the result."""

    def run(number, function):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        begun = []
        for rank in range(number):
            if not (child := os.fork()):
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                _end_as_process(function, tmp_path / f"process-{rank}")
            begun.append(child)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in begun]
        found = [pickle.loads((tmp_path / f"process-{rank}").read_bytes()) for rank in range(number)]
        assert ended == [0] * number, "\n".join(map(str, found))
        return found

    return run


def _end_as_process(function, file):
    """Write down what the function returns, or why it did not, and end."""
    code = 1
    try:
        dist.init_process_group("gloo")
        file.write_bytes(pickle.dumps(function()))
        code = 0
    except BaseException:
        file.write_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        os._exit(code)
