import os

# Containers set it; each command that a test starts would compile this package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported
os.environ["WANDB_MODE"] = "offline"

import gc
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_rlhf.errors import Interrupted
from lit_rlhf.models import policy_from_config
from lit_rlhf.models.kernels import use_kernels
from lit_rlhf.pipeline.failures import MISTAKE, code_of, reason
from lit_rlhf.text import train_bpe

torch.set_num_threads(1)  # two tests run at a time

# Far from initialization's near-uniform outputs: what a token attends to is felt in every figure.
FAMILIES = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "initializer_range": 0.3, "tie_word_embeddings": False,
    },
}  # fmt: skip


def pytest_collection_finish():
    """What imports and collected tests have made stays to the end: collections of garbage need not look at it."""
    gc.freeze()


class Killed(Exception):
    pass


class Stop(Callback):
    """Ends a training at its ``moment``-th hook: by Ctrl-C, or as a SIGKILL does, after which the disk is as it was."""

    def __init__(self, folder, moment, killed):
        self.folder, self.moment, self.killed = folder, moment, killed

    def hook(self, *_):
        self.moment -= 1
        if self.moment == 0 and self.killed:
            shutil.copytree(self.folder, f"{self.folder}-killed")
            raise Killed
        if self.moment == 0:
            signal.raise_signal(signal.SIGINT)

    on_train_start = on_train_epoch_start = on_train_batch_start = on_before_optimizer_step = hook
    on_train_batch_end = on_validation_start = on_validation_end = on_train_epoch_end = on_train_end = hook


@pytest.fixture
def stop_at():
    """with stop_at(folder, moment, killed) as callback: what the training of ``folder`` was stopped in is there."""

    @contextmanager
    def stop(folder, moment, killed):
        try:
            yield Stop(folder, moment, killed)
        except (Interrupted, KeyboardInterrupt, SystemExit):  # outside of training Ctrl-C ends it at once
            pass
        except Killed:
            shutil.rmtree(folder)
            shutil.move(f"{folder}-killed", folder)

    return stop


@pytest.fixture(autouse=True)
def fast_kernels():
    """What a test has switched off is on again for the next one."""
    yield
    use_kernels("fast")


@pytest.fixture
def norms_in_float64(monkeypatch):
    """transformers computes RMSNorm in float32 throughout; PyTorch's own stands in for it where a test is exact."""
    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(
            norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        )


class Hangs(BaseException):
    pass


@pytest.fixture(scope="session")
def ends_well():
    """with ends_well(naming="file"): it ends within its time, either well or with one line that names the file."""

    def hang(*_):
        raise Hangs

    @contextmanager
    def ends(seconds=60, naming=""):
        begun, before = time.monotonic(), signal.signal(signal.SIGALRM, hang)  # the test's own limit is one, too
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except Exception as error:
            said = reason(error)
            assert code_of(error) == MISTAKE and naming in said and len(said) < 2000 and said.isprintable(), said
        finally:
            signal.signal(signal.SIGALRM, before)
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - time.monotonic() + begun) if left else 0)

    return ends


@pytest.fixture
def test_data():
    """Real data that is not part of the project (LIT_RLHF_TEST_DATA names its folder)."""
    folder = os.environ.get("LIT_RLHF_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")
    folder = Path(folder).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set LIT_RLHF_TEST_DATA to its folder")
    return folder


@pytest.fixture
def test_checkpoint():
    """A real checkpoint of some hundred million parameters (LIT_RLHF_TEST_CHECKPOINT names its folder)."""
    folder = os.environ.get("LIT_RLHF_TEST_CHECKPOINT")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("no real checkpoint: set LIT_RLHF_TEST_CHECKPOINT to the folder of one in bfloat16")
    return Path(folder)


@pytest.fixture(params=FAMILIES)
def model_config(request):
    """A small config of each family of architectures."""
    return dict(FAMILIES[request.param])


@pytest.fixture
def tokenizer():
    return train_bpe(["What is 12 + 30? It is 42.", "Who are you? I am the cat.", "You are the cat!"] * 3, 300)


@pytest.fixture(scope="session")
def sentencepiece():
    """A tokenizer of characters and bytes that puts a space before the first word of a text, as SentencePiece does."""
    names = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")


@pytest.fixture
def policy(model_config, tokenizer):
    """A random language model of each family, in evaluation mode."""
    torch.manual_seed(0)
    return policy_from_config(model_config, tokenizer).eval()
