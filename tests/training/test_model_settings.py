import copy

import pytest
import torch
from lightning import LightningModule
from torch.testing import assert_close

from lit_rlhf.errors import say_once
from lit_rlhf.functional import lm_loss
from lit_rlhf.models import LoRA, add_lora, next_token_logits, save_model
from lit_rlhf.models.kernels import fast_kernels
from lit_rlhf.models.kernels.attention import BY_BLOCKS
from lit_rlhf.models.kernels.gelu import GELUTanh
from lit_rlhf.models.policy import freeze, layers
from lit_rlhf.training import adamw, make_trainer
from lit_rlhf.training.batches import BatchLoader, in_order
from lit_rlhf.training.optim import decay_groups
from lit_rlhf.training.trainer import precision_of


class Learner(LightningModule):
    """A policy that learns in evaluation mode, as PPO's does, beside a frozen one."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.frozen = policy, freeze(copy.deepcopy(policy))
        self.runs = []  # (gradients are on, the layer is trained) of each pass through a layer
        for model in (self.policy, self.frozen):
            for layer in layers(model):
                trained = model is self.policy
                layer.register_forward_pre_hook(lambda *_, t=trained: self.runs.append((torch.is_grad_enabled(), t)))

    def training_step(self, rows, batch_idx):
        with torch.no_grad():
            self.frozen.base_model(input_ids=rows, use_cache=False)
        hidden = self.policy.base_model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        return lm_loss(next_token_logits(self.policy, hidden), rows[:, 1:])

    def configure_optimizers(self):
        return adamw(decay_groups(self.policy), lr=1e-2)


def fit(policy, steps=2, **settings):
    learner = Learner(copy.deepcopy(policy))
    data = torch.randint(5, 250, (2 * steps, 12), generator=torch.Generator().manual_seed(0))
    loader = BatchLoader(in_order(len(data)), 2, lambda mine, _: data[mine])
    settings = {"precision": "64-true", **settings}
    make_trainer("cpu", logger=False, enable_progress_bar=False, **settings).fit(learner, loader)
    return learner


def weights(learner):
    return dict(learner.policy.state_dict())


def test_activation_checkpointing_computes_layers_again_and_learns_the_same(policy):
    plain, again = fit(policy), fit(policy, activation_checkpointing=True)
    assert list(weights(again)) == list(weights(plain))
    assert_close(weights(again), weights(plain), rtol=0, atol=0)
    count = 2 * len(layers(policy))  # steps, layers
    assert plain.runs.count((True, True)) == count
    assert again.runs.count((True, True)) == 2 * count  # though they are in evaluation mode
    assert plain.runs.count((False, False)) == again.runs.count((False, False)) == count
    assert saved_numbers(again) < 0.6 * saved_numbers(plain)


def saved_numbers(learner):
    """Numbers that a forward pass keeps for the backward pass."""
    kept = []
    rows = torch.full((2, 30), 7)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        learner.policy.double().base_model(input_ids=rows, use_cache=False)
    return sum(kept)


def test_a_model_may_be_set_up_twice_copied_and_saved(policy, tokenizer, tmp_path):
    once = fit(policy, activation_checkpointing=True)
    twice = make_trainer("cpu", logger=False, enable_progress_bar=False, max_steps=2, activation_checkpointing=True)
    data = torch.full((4, 12), 7)
    twice.fit(once, BatchLoader(in_order(4), 2, lambda mine, _: data[mine]))
    copied = copy.deepcopy(once.policy)
    assert_close(dict(copied.state_dict()), weights(once), rtol=0, atol=0)
    save_model(once.policy, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_adapters_learn_the_same(policy):
    torch.manual_seed(1)
    policy = add_lora(policy, LoRA(r=2))
    plain, again = fit(policy), fit(policy, activation_checkpointing=True)
    changed = [n for n, x in weights(plain).items() if not torch.equal(x, policy.double().state_dict()[n])]
    assert changed and all("lora_" in name for name in changed)
    assert_close(weights(again), weights(plain), rtol=0, atol=0)


@pytest.mark.slow  # the compiler takes its time: one family is enough
@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_compiled_layers_learn_the_same_under_the_same_names(policy, tokenizer, tmp_path):
    plain, fast = fit(policy), fit(policy, compile=True)
    assert all(layer._compiled_call_impl is not None for layer in layers(fast.policy))
    assert all(layer._compiled_call_impl is None for layer in layers(fast.frozen))
    assert list(weights(fast)) == list(weights(plain))
    assert_close(weights(fast), weights(plain), rtol=1e-6, atol=1e-6)  # Llama's norms are in float32
    copy.deepcopy(fast.policy)
    save_model(fast.policy, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("kernels", "attention"), [("fast", BY_BLOCKS), ("plain", "sdpa")])
def test_kernels_are_a_setting_for_all_models_of_a_module(policy, precision, kernels, attention):
    learner = fit(policy, precision=precision, kernels=kernels)
    assert fast_kernels() == (kernels == "fast")
    for model in (learner.policy, learner.frozen):
        assert model.config._attn_implementation == attention
        assert model.base_model.config._attn_implementation == attention
    assert policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("precision", "lines"), [("bf16-true", 1), ("bf16-mixed", 0), ("32-true", 0)])
def test_weights_that_are_trained_in_half_precision_are_said(policy, precision, lines, capsys):
    say_once.cache_clear()
    fit(policy, steps=1, precision=precision)
    said = "weights are trained in bfloat16: of each step, what is below 0.004 of a weight is lost"
    assert capsys.readouterr().out.count(said) == lines


def test_plain_kernels_learn_the_same(policy):
    fast, plain = (fit(policy, kernels=kernels) for kernels in ("fast", "plain"))
    assert any(isinstance(m, GELUTanh) for m in fast.policy.modules()) == (policy.config.model_type == "gpt2")
    assert not any(isinstance(m, GELUTanh) for m in plain.policy.modules())
    assert_close(weights(fast), weights(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_mixed_precision_too(policy, precision):
    begun = policy.float().state_dict()
    [clipped, free] = (fit(policy, steps=1, precision=precision, gradient_clip_val=clip) for clip in (1e-9, None))
    # AdamW's epsilon of 1e-8 is then larger than a gradient, and the step far shorter.
    far, near = (max((x - begun[n]).abs().max() for n, x in weights(m).items()) for m in (free, clipped))
    assert 0 < near < 0.2 * far


def test_matmul_precision_is_the_last_trainers():
    try:
        make_trainer("cpu", matmul_precision="medium", logger=False)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        make_trainer("cpu", logger=False)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("accelerator", "cuda", "avx512_bf16", "amx", "expected"),
    [
        ("cpu", None, False, False, "32-true"),
        ("cpu", None, True, False, "bf16-mixed"),
        ("cpu", None, False, True, "bf16-mixed"),
        ("cpu", True, False, False, "32-true"),
        ("gpu", True, False, False, "bf16-mixed"),
        ("gpu", False, True, False, "32-true"),
        ("auto", True, False, False, "bf16-mixed"),
        ("auto", None, True, False, "bf16-mixed"),
        ("mps", None, True, False, "32-true"),
    ],
)
def test_auto_asks_the_processor(accelerator, cuda, avx512_bf16, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision_of("auto", accelerator) == expected


def test_auto_is_a_precision_of_the_trainer():
    assert make_trainer("cpu", precision="auto", logger=False).precision == precision_of("auto", "cpu")


def test_the_fused_optimizer_is_pytorchs_own():
    parameters = [torch.nn.Parameter(torch.arange(6.0).view(2, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = adamw(parameters, lr=0.1, weight_decay=0.1)
    reference = copy.deepcopy(parameters)
    theirs = torch.optim.AdamW(reference, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=False, foreach=False)
    assert optimizer.defaults["fused"]
    for step in range(3):
        for x, y in zip(parameters, reference):
            x.grad = y.grad = torch.sin(x.detach() + step)
        optimizer.step()
        theirs.step()
    assert_close(parameters, reference)
