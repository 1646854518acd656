"""vLLM's side of the interface. Where vLLM is installed it samples; the mapping is tested without it."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, add_lora, policy_from_config
from lit_rlhf.models.adapters import adapters_off, lora_layers, merged, plain_weights
from lit_rlhf.rollouts import Ended, FastEngine, Request, Sampling, VLLMEngine, draw_seeds, padded_responses, sample
from lit_rlhf.rollouts.vllm import response_of, settings_of

THERE = importlib.util.find_spec("vllm") is not None


def test_what_vllm_is_asked_for():
    sampling = Sampling(7, temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2, stop=["\n"])
    assert settings_of(Request([4], sampling, 5), {9, 3}) == {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_tokens": 2, "max_tokens": 7, "stop": ["\n"],
        "include_stop_str_in_output": True, "detokenize": True, "seed": 5, "logprobs": 0,
        "stop_token_ids": [3, 9],
    }  # fmt: skip
    plain = settings_of(Request([4], Sampling(), 5))
    assert plain["stop"] is None and not plain["detokenize"]


def test_an_answers_seed_is_its_own():
    whole = draw_seeds(6, Generator().manual_seed(3), (0, 1))
    assert len(set(whole)) == 6 and all(0 <= seed < 2**31 for seed in whole)
    assert draw_seeds(6, Generator().manual_seed(4), (0, 1)) != whole
    for rank in range(2):  # dealt out to two processes
        assert draw_seeds(3, Generator().manual_seed(3), (rank, 2)) == whole[rank::2]


def completion(tokens, logprobs, reason):
    """A ``CompletionOutput``: at each position the sampled token, and perhaps a likelier one."""
    positions = [
        {99: SimpleNamespace(logprob=-0.1), token: SimpleNamespace(logprob=logprob)}
        for token, logprob in zip(tokens, logprobs)
    ]
    return SimpleNamespace(token_ids=tuple(tokens), logprobs=positions, finish_reason=reason)


def test_what_vllm_answers():
    outputs = [completion([4, 5, 2], [-1.0, -2.0, -0.5], "stop"), completion([7], [-3.0], "length")]
    drawn = [response_of(output, {2}) for output in outputs]
    requests = [Request([5], Sampling(stop=["x"]), seed) for seed in range(2)]
    found = padded_responses(drawn, requests, 1, {2}, 3, torch.device("cpu"))
    assert found.tokens.tolist() == [[4, 5, 2], [7, 1, 1]]
    assert found.mask.tolist() == [[True] * 3, [True, False, False]]
    assert_close(found.logprobs, torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0, 0]]))
    assert found.entropy.isnan().tolist() == found.mask.tolist()  # vLLM does not tell it
    assert found.entropy[1, 1:].tolist() == [0, 0]
    assert found.finished.tolist() == [True, False]
    assert found.ended.tolist() == [Ended.TOKEN, Ended.LENGTH] and found.version == 3
    assert found.stops == [("x",)] * 2 and found.token_lists() == [[4, 5, 2], [7]]


def test_weights_are_handed_over_as_a_checkpoint_has_them(policy):
    state = policy.state_dict()
    handed = dict(plain_weights(policy))
    assert list(handed) == list(state) and all(torch.equal(handed[name], state[name]) for name in state)


def test_adapters_are_handed_over_within_the_weights(policy):
    pytest.importorskip("peft")
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    policy = add_lora(policy, LoRA(r=2))
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    expected = merged(policy).state_dict()
    assert_close(dict(plain_weights(policy)), dict(expected))
    with adapters_off(policy):
        assert_close(dict(plain_weights(policy)), before)
    assert any(not torch.equal(expected[name], before[name]) for name in before)


@pytest.mark.skipif(THERE, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'lit_rlhf\[vllm\]'.*engine=own"):
        VLLMEngine()


@pytest.mark.skipif(not THERE, reason="needs vLLM")
@pytest.mark.parametrize("model_config", ["llama", "gpt2"], indirect=True)
def test_vllm_writes_what_the_own_engine_writes(model_config, tokenizer):
    torch.manual_seed(0)
    width = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}  # its kernels want wide heads
    if model_config["model_type"] == "gpt2":
        width = {"n_embd": 128, "n_head": 2}
    policy = policy_from_config({**model_config, **width}, tokenizer).eval()
    prompts, engine = [[5, 6, 7], [8], [9, 10, 11, 12]], VLLMEngine(eager=True)
    greedy = Sampling(8, temperature=0)
    for _ in range(2):  # the second time after an update
        mine, theirs = (sample(e, policy, tokenizer, prompts, greedy) for e in (FastEngine(), engine))
        assert torch.equal(theirs.tokens, mine.tokens) and torch.equal(theirs.mask, mine.mask)
        # Of one token alone, it is the certainty; so the temperature is 1 where log-probs are compared.
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
    mine = sample(FastEngine(), policy, tokenizer, prompts, Sampling(8, top_k=1))
    theirs = sample(engine, policy, tokenizer, prompts, Sampling(8, top_k=1))
    assert torch.equal(theirs.tokens, mine.tokens)
    assert_close(theirs.logprobs, mine.logprobs, rtol=0, atol=1e-4)
    drawn = [sample(engine, policy, tokenizer, prompts, Sampling(8), [s, s + 9, s + 99]) for s in (1, 1, 2)]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens) and not torch.equal(drawn[0].tokens, drawn[2].tokens)
    ended = Sampling(8, stop=[tokenizer.decode([int(drawn[0].tokens[0, 2])])])
    stopped = sample(engine, policy, tokenizer, prompts, ended, [1, 10, 100])
    assert stopped.finished[0] and stopped.lengths[0] <= 3
