import copy
import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.models import LoRA, add_lora, policy_from_config
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import DPODataModule, DPOModule
from lit_rlhf.text.records import write_jsonl

ROWS = [  # rankings of three, one of them with a tie, and pairs
    {"prompt": f"Question {i}?", "responses": ["good " * (i % 3 + 1), "bad", "so so"], "ranks": [1, 3, 2 + i % 2]}
    if i % 4
    else {"prompt": f"Question {i}?", "chosen": "good", "rejected": "bad bad"}
    for i in range(40)
]


@pytest.fixture
def data(tmp_path, tokenizer):
    def make(rows=ROWS, **settings):
        write_jsonl(tmp_path / "r.jsonl", rows)
        module = DPODataModule(tmp_path / "r.jsonl", tokenizer, **{"batch_size": 8, "held_out": 0.2, **settings})
        module.setup()
        return module

    return make


@pytest.fixture
def step():
    """One training step by hand: (loss, what was logged)."""

    def run(module, batch):
        logged = {}
        module.log = lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        told = {"world_size": 1, "accumulate_grad_batches": 1, "strategy": None}
        module._trainer = SimpleNamespace(optimizers=[optimizer], **told)
        return module.training_step(batch, 0), logged

    return run


def moved(module):
    """The module, its policy no longer the reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def answer_logprob(model, tokens, length):
    """By plain transformers, the sequence alone: log-prob of its last ``length`` tokens."""
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(logprobs[t - 1, tokens[t]].item() for t in range(len(tokens) - length, len(tokens)))


def test_loss_is_the_mean_over_pairs_by_plain_transformers(data, tokenizer, model_config, step):
    torch.manual_seed(0)
    module = moved(DPOModule(policy_from_config(model_config, tokenizer), tokenizer, beta=0.3))
    made = data()
    losses, chosen, rejected, right = [], [], [], []
    for i in made.train_dataloader().order(0)[:8]:
        item = made.train_set[i]
        ratios = [
            answer_logprob(module.policy, s, n) - answer_logprob(module.reference.start, s, n)
            for s, n in zip(item.sequences, item.response_lengths)
        ]
        pairs = [
            (ratios[a], ratios[b]) if item.ranks[a] < item.ranks[b] else (ratios[b], ratios[a])
            for a, b in combinations(range(len(ratios)), 2)
            if item.ranks[a] != item.ranks[b]
        ]
        losses.append(sum(math.log(1 + math.exp(-0.3 * (w - v))) for w, v in pairs) / len(pairs))
        chosen += [w for w, _ in pairs]
        rejected += [v for _, v in pairs]
        right += [w > v for w, v in pairs]
    assert max(map(abs, chosen)) > 0.5  # the policy did move
    loss, logged = step(module, next(iter(made.train_dataloader())))
    near = {"atol": 1e-4, "rtol": 1e-4}
    assert_close(loss.item(), sum(losses) / 8, **near)
    assert_close(logged["dpo/loss"], sum(losses) / 8, **near)
    assert_close(logged["dpo/accuracy"], sum(right) / len(right))
    assert_close(logged["dpo/chosen_log_ratio"], sum(chosen) / len(chosen), **near)
    assert_close(logged["dpo/rejected_log_ratio"], sum(rejected) / len(rejected), **near)
    assert_close(logged["dpo/margin"], 0.3 * (sum(chosen) - sum(rejected)) / len(chosen), **near)


def test_the_first_loss_is_log_2_dropout_or_not(data, tokenizer, step):
    dropping = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.5}
    module = DPOModule(policy_from_config(dropping, tokenizer).train(), tokenizer).train()
    loss, logged = step(module, next(iter(data().train_dataloader())))
    assert_close(loss.item(), math.log(2))
    assert (logged["dpo/accuracy"], logged["dpo/margin"]) == (0.5, 0.0)
    assert not any(m.training for m in module.modules())


def test_only_the_policy_learns(data, tokenizer, policy, optimizer, fit):
    module = DPOModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer)
    fit(module, data(), max_steps=2)
    for begun, reference, now in zip(policy.parameters(), module.reference.parameters(), module.policy.parameters()):
        assert torch.equal(begun, reference)
        assert not torch.equal(begun, now)
    assert not any(m.training for m in module.modules())
    assert all(name.startswith("policy.") for name in module.state_dict())


def test_with_lora_the_reference_is_the_policy_without_its_adapters(data, tokenizer, policy, optimizer, fit, step):
    module = DPOModule(add_lora(copy.deepcopy(policy), LoRA(r=4)), tokenizer, optimizer=optimizer)
    made = data()
    assert_close(step(module, next(iter(made.train_dataloader())))[0].item(), math.log(2))
    fit(DPOModule(module.policy, tokenizer, optimizer=optimizer), made, max_steps=2)
    batch = next(iter(made.train_dataloader()))
    logprobs, ref_logprobs = module.logprobs(batch)
    assert_close(ref_logprobs, DPOModule(policy, tokenizer).logprobs(batch)[0].detach())
    assert (logprobs - ref_logprobs).abs().max() > 0.01


def test_accumulated_micro_batches_equal_a_full_batch(data, tokenizer, policy, optimizer, fit):
    tied = [dict(r, ranks=[1, 1, 1]) if "ranks" in r and i % 5 == 0 else r for i, r in enumerate(ROWS)]
    one, two = (DPOModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer) for _ in range(2))
    fit(one, data(tied, batch_size=8), max_steps=3)
    fit(two, data(tied, batch_size=2), max_steps=3, accumulate_grad_batches=4)
    for a, b in zip(one.parameters(), two.parameters()):  # Adam makes the rounding of tiny gradients count
        assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_it_learns_the_order_and_plain_transformers_loads_it(tmp_path, data, tokenizer, policy, optimizer, fit):
    module = DPOModule(policy, tokenizer, optimizer=optimizer)
    made = data()
    trainer = fit(module, made, max_epochs=8)
    trainer.validate(module, datamodule=made, verbose=False)
    figures = module.figures()
    assert figures["val_accuracy"] == 1.0 and figures["val_loss"] < 0.3
    assert figures["gold_accuracy"] is None  # nobody here knows better than the annotator
    assert figures["val_pairs"] == sum(
        r.ranks[a] != r.ranks[b] for r in made.val_records for a, b in combinations(range(len(r.ranks)), 2)
    )
    module.export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    question = [{"role": "user", "content": "Question 1?"}]
    prompt = loaded.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert_close(model(**prompt).logits, module.policy(**prompt).logits)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3


def test_samples_are_written_also_where_prompts_are_long(data, tokenizer, policy, optimizer, fit):
    long = [dict(row, prompt=row["prompt"] + " word" * 200) for row in ROWS]  # the context holds 128 tokens
    made = data(long, max_length=100)
    module = DPOModule(policy, **made.for_module(), optimizer=optimizer, sampling=Sampling(max_new_tokens=48))
    fit(module, made, max_steps=1)
    samples = module.write_samples()
    assert len(samples) == 4 and all(prompt.startswith("Question") for prompt, _ in samples)
