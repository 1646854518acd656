import pytest
import torch

from lit_rlhf.apps.chat import Conversation, Judgements, load_assistant
from lit_rlhf.models import policy_from_config, save_model
from lit_rlhf.rollouts import Sampling
from lit_rlhf.text import Transcript, ensure_chat_template, train_bpe

TEXTS = ["What is 12 + 30? It is 42.", "Who are you? I am the cat.", "You are the cat! Hello there, Human: and others."]
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of three tiny random models: "base" knows no turns, "sft" and "ppo" do."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("pretrain", "sft", "ppo")):
        torch.manual_seed(seed)
        tokenizer = train_bpe(TEXTS * 3, 300)
        if name != "pretrain":
            ensure_chat_template(tokenizer)
        save_model(policy_from_config(CONFIG, tokenizer), tokenizer, folder / name / "model")
    stages = {"ppo": "ppo", "sft": "sft", "base": "pretrain"}
    return {name: str(folder / stage / "model") for name, stage in stages.items()}


@pytest.fixture
def judgements(tmp_path):
    return Judgements(tmp_path / "data", round=2, annotator="anna")


@pytest.fixture
def converse(models, judgements):
    """converse("ppo", "sft", ...) -> a conversation with these models."""

    def begin(*names, **settings):
        assistants = [load_assistant(name, models[name], Transcript()) for name in names]
        settings = {"sampling": Sampling(8), **settings}
        return Conversation(assistants, judgements, **settings)

    return begin
