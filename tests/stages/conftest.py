"""Small models on the built-in world: enough to see that the stages are right, not that they are good."""

import copy
from functools import partial

import pytest
import torch
from lightning import seed_everything
from transformers import AutoModelForSequenceClassification

from lit_rlhf.models import Sampling, policy_from_config
from lit_rlhf.text import ensure_chat_template, train_bpe
from lit_rlhf.text.world import World
from lit_rlhf.training import LastCheckpoint, RandomState, adamw, make_trainer

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="session")
def world():
    return World(0)


@pytest.fixture(scope="session")
def tokenizer(world):
    tokenizer = train_bpe(world.corpus(400, 0), vocab_size=600)
    ensure_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def policy(tokenizer):
    seed_everything(0, verbose=False)
    return policy_from_config(LLAMA, tokenizer)


@pytest.fixture
def reward_model(policy):
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model.eval()


@pytest.fixture
def fit(tmp_path):
    """Train a module; resumable, like a stage of a run."""

    def run(module, data, folder="run", callbacks=(), resume=False, **settings):
        last = LastCheckpoint(tmp_path / folder, settings.pop("every", 10**6))
        trainer = make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
            callbacks=[RandomState(), *callbacks, last], **settings,
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


@pytest.fixture(autouse=True)
def _no_leftover_randomness():
    seed_everything(1, verbose=False)
