import os
import threading
import time
from pathlib import Path

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


@pytest.fixture(scope="package")
def chromium():
    """A browser without a window; the test is left out where there is none. Only one can be started at a time."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with playwright.sync_playwright() as started:
        found = path if Path(path).exists() else started.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no chromium: CHROMIUM names its program, or `playwright install chromium` brings one")
        # Chromium's own sandbox needs rights that containers do not have.
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served():
    """Serve a page in a thread of this process: served(guarded, server) -> a function that ends it."""
    running = []

    def start(guarded, server):
        running.append(server.server(guarded))
        thread = threading.Thread(target=running[-1].run, kwargs={"sockets": [server.listener]}, daemon=True)
        thread.start()
        while not running[-1].started:
            time.sleep(0.01)

        def stop(uvicorn=running[-1]):
            uvicorn.should_exit = True
            thread.join(10)

        running[-1] = stop
        return stop

    yield start
    for stop in running:
        stop()


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
