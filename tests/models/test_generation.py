import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Generator, tensor
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import (
    LoRA,
    add_lora,
    end_tokens,
    next_token_logits,
    packed_hidden,
    policy_from_config,
    use_kernels,
)
from lit_rlhf.models.adapters import adapters_off, lora_layers
from lit_rlhf.models.kernels import forward_pass
from lit_rlhf.models.kernels.decoding import StaticDecoder
from lit_rlhf.models.kernels.forward_pass import ForwardPass
from lit_rlhf.models.policy import context_length, predicting_positions, response_positions
from lit_rlhf.rollouts import (
    Ended,
    FastEngine,
    Request,
    Sampling,
    TransformersEngine,
    answer_texts,
    draw_seeds,
    fast,
    generate,
    sample,
    stream_response,
)
from lit_rlhf.text import encode_prompts, ensure_chat_template, pack, train_characters
from lit_rlhf.text.chat import ROLE_TEMPLATE
from lit_rlhf.text.packing import left_pad
from lit_rlhf.training import seeded

FAMILIES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
}  # fmt: skip
for _family in FAMILIES.values():
    _family["initializer_range"] = 0.3
NO_END = -7  # no token has this id: answers never end
LENGTHS = [3, 11, 1, 7, 11, 5]


@pytest.fixture
def prompts(tokenizer):
    generator = Generator().manual_seed(2)
    return [torch.randint(5, len(tokenizer), (n,), generator=generator).tolist() for n in LENGTHS]


def whole_answer(policy, tokenizer, prompts, sampling, generator):
    return sample(FastEngine(), policy, tokenizer, prompts, sampling, generator)


def seeds_of(prompts, seed=0, shard=(0, 1)):
    return draw_seeds(len(prompts), Generator().manual_seed(seed), shard)


def answer(policy, prompts, sampling, seed=0, eos_id=NO_END):
    return generate(policy, prompts, sampling, eos_id=eos_id, pad_id=1, seeds=seeds_of(prompts, seed))


@torch.no_grad()
def full_logits(policy, prompt, response):
    """Logits (T, V) of one answer, by transformers' own forward pass: no padding, no mask, no cache."""
    logits = policy(input_ids=tensor([prompt + response]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]


def an_end(tokens):
    """A token that ends some of the answers (B, T), at different steps, and not all."""
    for token in tokens.flatten().tolist():
        firsts = [row.index(token) for row in tokens.tolist() if token in row]
        if len(set(firsts)) > 1 and len(firsts) < len(tokens):
            return token
    raise AssertionError("no such token; choose another seed")


def test_greedy_is_that_of_transformers(policy, prompts):
    tokens, mask = left_pad(prompts, 1)
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 1}
    policy.generation_config.eos_token_id = None
    endless = policy.generate(tokens, attention_mask=mask.long(), **settings)[:, tokens.shape[1] :]
    assert torch.equal(answer(policy, prompts, Sampling(20).greedy()).tokens, endless)

    eos = an_end(endless)
    expected = policy.generate(tokens, attention_mask=mask.long(), eos_token_id=eos, **settings)[:, tokens.shape[1] :]
    found = answer(policy, prompts, Sampling(20, temperature=0), eos_id=eos)
    assert torch.equal(found.tokens, expected)
    assert found.finished.tolist() == [eos in row for row in expected.tolist()]


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", ["eager attention", "sliding window"])
def test_greedy_with_another_kind_of_attention(policy, model_config, prompts, tokenizer, kind):
    if kind == "sliding window":
        policy = policy_from_config({**model_config, "model_type": "mistral", "sliding_window": 6}, tokenizer).eval()
    else:
        policy.set_attn_implementation("eager")
    policy.generation_config.eos_token_id = None
    tokens, mask = left_pad(prompts, 1)
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    expected = policy.generate(tokens, attention_mask=mask.long(), **settings)[:, tokens.shape[1] :]
    assert torch.equal(answer(policy, prompts, Sampling(12).greedy()).tokens, expected)
    eos = an_end(expected)
    for row, response in zip(expected.tolist(), answer(policy, prompts, Sampling(12, 0), eos_id=eos).token_lists()):
        assert response == row[: len(response)]


def test_answers_that_end_leave_the_batch_without_changing_the_others(policy, prompts):
    endless = answer(policy, prompts, Sampling(20).greedy())
    eos = an_end(endless.tokens)
    together = answer(policy, prompts, Sampling(20).greedy(), eos_id=eos)
    for i, prompt in enumerate(prompts):
        alone = answer(policy, [prompt], Sampling(20).greedy(), eos_id=eos)
        n = int(together.lengths[i])
        assert together.token_lists()[i] == alone.token_lists()[0]
        assert_close(together.logprobs[i, :n], alone.logprobs[0], rtol=0, atol=1e-5)
        row = endless.tokens[i].tolist()
        assert together.token_lists()[i] == (row[: row.index(eos) + 1] if eos in row else row)
        assert (together.tokens[i, n:] == 1).all()
        assert together.mask[i].tolist() == [t < n for t in range(together.tokens.shape[1])]
        assert not together.logprobs[i, n:].any() and not together.entropy[i, n:].any()


def test_logprobs_and_entropy_are_those_of_a_full_forward_pass(policy, prompts):
    eos = an_end(answer(policy, prompts, Sampling(20)).tokens)
    responses = answer(policy, prompts, Sampling(20), eos_id=eos)
    assert set(responses.finished.tolist()) == {True, False}
    for i, (prompt, response) in enumerate(zip(prompts, responses.token_lists())):
        logprobs = full_logits(policy, prompt, response).log_softmax(-1)
        expected = tensor([row[token] for row, token in zip(logprobs, response)])
        assert_close(responses.logprobs[i, : len(response)], expected, rtol=0, atol=1e-5)
        assert_close(responses.entropy[i, : len(response)], -(logprobs.exp() * logprobs).sum(-1), rtol=0, atol=1e-5)


def test_logprobs_are_those_of_training_in_packed_rows(policy, prompts):  # else the first PPO ratio is not 1
    responses = answer(policy, prompts, Sampling(9, temperature=0.7))
    packed = pack([p + r for p, r in zip(prompts, responses.token_lists())], 1)
    assert len(packed.blocks) < len(prompts)
    positions, mask = response_positions(packed, responses.lengths)
    logits = next_token_logits(policy, packed_hidden(policy, packed)[positions - 1]) / 0.7
    assert torch.equal(packed.tokens[positions][mask], responses.tokens[mask])
    assert_close(token_logprobs(logits, responses.tokens)[mask], responses.logprobs[mask], rtol=0, atol=1e-5)


def test_more_padding_and_other_prompts_change_nothing(policy, prompts):
    short = answer(policy, prompts[:1], Sampling(12).greedy())
    long = prompts[1] * 4  # 44 tokens
    mixed = answer(policy, [long, *prompts[1:], prompts[0]], Sampling(12).greedy())
    assert torch.equal(mixed.tokens[-1], short.tokens[0])
    assert_close(mixed.logprobs[-1], short.logprobs[0], rtol=0, atol=1e-5)


def shaped(logits, temperature, top_k, top_p):
    """The distribution that ``Sampling`` describes, by loops over one row of logits."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p * total:
            kept.append(i)
        mass += weights[i]
    return {i: weights[i] / sum(weights[j] for j in kept) for i in kept}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8, temperature=0.5),
        Sampling(8, temperature=2.0),
        Sampling(8, top_k=5),
        Sampling(8, top_p=0.6),
        Sampling(8, temperature=1.7, top_k=20, top_p=0.8),
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_sampled_from(policy, prompts, sampling):
    responses = answer(policy, prompts, sampling)
    plain = answer(policy, prompts, Sampling(8))
    assert not torch.equal(responses.logprobs, plain.logprobs)
    for i, (prompt, response) in enumerate(zip(prompts, responses.token_lists())):
        for t, (logits, token) in enumerate(zip(full_logits(policy, prompt, response), response)):
            probs = shaped(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            assert responses.logprobs[i, t].item() == pytest.approx(math.log(probs[token]), abs=1e-4)
            entropy = -sum(p * math.log(p) for p in probs.values())
            assert responses.entropy[i, t].item() == pytest.approx(entropy, abs=1e-4)


def test_answers_are_drawn_from_the_exact_distribution(model_config):
    """Two tokens of two prompts of unequal length, 10,000 times: every pair as often as the model says."""
    torch.manual_seed(0)
    tokenizer = train_characters(["abcd"])
    policy = policy_from_config(model_config, tokenizer).eval()
    with torch.no_grad():  # flatter, so that most pairs are seen
        policy.get_output_embeddings().weight /= 3
    size, eos, draws = len(tokenizer), tokenizer.eos_token_id, 10_000
    prompts = [[6, 7, 8, 9, 6], [8]]
    responses = answer(policy, [p for p in prompts for _ in range(draws)], Sampling(2), seed=1, eos_id=eos)
    for i, prompt in enumerate(prompts):
        lists = responses.token_lists()[i * draws : (i + 1) * draws]
        expected = {}
        for first in range(size):
            rows = full_logits(policy, prompt, [first, 0]).double().softmax(-1)
            if first == eos:
                expected[(eos,)] = rows[0, eos].item() * draws
            else:
                expected |= {
                    (first, second): (rows[0, first] * rows[1, second]).item() * draws for second in range(size)
                }
        counts = dict.fromkeys(expected, 0)
        for response in lists:
            counts[tuple(response)] += 1
        seldom = [pair for pair, n in expected.items() if n < 5]
        common = [pair for pair in expected if pair not in seldom]
        assert len(common) > 30
        cells = [*([pair] for pair in common), *([seldom] if seldom else [])]
        observed, wanted = ([sum(table[pair] for pair in cell) for cell in cells] for table in (counts, expected))
        assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_the_seed_decides(policy, prompts):
    state = torch.get_rng_state()
    one, again, other = (answer(policy, prompts, Sampling(10), seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    default = [generate(policy, prompts, Sampling(10), eos_id=NO_END, pad_id=1).tokens for _ in range(2)]
    assert not torch.equal(*default)
    torch.manual_seed(5)
    assert torch.equal(default[0], generate(policy, prompts, Sampling(10), eos_id=NO_END, pad_id=1).tokens)


def test_an_answers_random_numbers_are_its_own(policy, prompts):
    endless = answer(policy, prompts, Sampling(20))
    eos = an_end(endless.tokens)
    for row, response in zip(endless.tokens.tolist(), answer(policy, prompts, Sampling(20), eos_id=eos).token_lists()):
        assert response == row[: len(response)]  # whenever others end
    for rank in range(3):  # and whichever process has it
        settings = {
            "eos_id": NO_END,
            "pad_id": 1,
            "seeds": seeds_of(prompts[rank::3], shard=(rank, 3)),
        }
        assert torch.equal(generate(policy, prompts[rank::3], Sampling(20), **settings).tokens, endless.tokens[rank::3])


def test_generation_stops_when_all_have_ended(policy, prompts):
    first = answer(policy, prompts[:1], Sampling(20).greedy()).tokens[0, 0].item()
    responses = answer(policy, prompts[:1] * 3, Sampling(20).greedy(), eos_id=first)
    assert responses.token_lists() == [[first]] * 3
    assert responses.tokens.shape == responses.logprobs.shape == (3, 1) and responses.finished.all()


def test_end_of_text_as_the_last_possible_token_counts_as_finished(policy, prompts):
    tokens = answer(policy, prompts[:1], Sampling(20).greedy()).tokens[0].tolist()
    last = next(t for t in range(1, 20) if tokens[t] not in tokens[:t])
    for limit, finished in ((last, False), (last + 1, True)):
        responses = answer(policy, prompts[:1], Sampling(limit).greedy(), eos_id=tokens[last])
        assert (responses.lengths.tolist(), responses.finished.tolist()) == ([limit], [finished])


def test_padding_and_end_of_text_within_a_prompt_are_read_as_tokens(policy):
    prompts = [[1, 0, 7, 1], [9, 8, 7, 6, 5, 4]]
    responses = answer(policy, prompts, Sampling(6).greedy())
    for prompt, response in zip(prompts, responses.token_lists()):
        assert response == full_logits(policy, prompt, response).argmax(-1).tolist()


def test_a_later_backward_pass_works(policy, prompts):  # inference-mode tensors would fail in it
    responses = answer(policy, prompts[:1], Sampling(4))
    assert not responses.tokens.is_inference() and not responses.logprobs.requires_grad
    logits = policy(input_ids=tensor([prompts[0] + responses.token_lists()[0]])).logits
    (logits.sum() * responses.logprobs.sum()).backward()


@pytest.mark.parametrize("new", [20, 21])
def test_prompt_and_answer_must_fit_into_the_context(policy, new):
    prompts = [[5] * 44, [5]]
    if new == 20:  # 64 in all
        assert answer(policy, prompts, Sampling(new)).tokens.shape == (2, 20)
        return
    with pytest.raises(UserError, match=r"a prompt of 44 tokens and 21 new ones .* context of 64"):
        answer(policy, prompts, Sampling(new))


def test_all_tokens_are_possible_by_default():
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert Sampling(7, 0.5, top_k=3, top_p=0.5).greedy() == Sampling(7, temperature=0.0)


QUESTION = [{"role": "user", "content": "Who are you?"}]


def as_an_end(tokenizer, token):
    """The tokenizer with another end-of-text: random models hardly ever draw the real one."""
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, 0), Sampling(20, 0.7, top_k=30, top_p=0.8)])
def test_a_stream_ends_with_the_answer_of_the_same_seed(policy, tokenizer, sampling):
    tokenizer.chat_template = ROLE_TEMPLATE
    prompt = encode_prompts(tokenizer, [QUESTION])
    for end in (None, 7):  # cut off; ended by the model
        if end is not None:
            row = whole_answer(policy, tokenizer, prompt, sampling, Generator().manual_seed(4)).tokens[0].tolist()
            as_an_end(tokenizer, row[end])
        whole = whole_answer(policy, tokenizer, prompt, sampling, Generator().manual_seed(4))
        *growing, last = stream_response(policy, tokenizer, QUESTION, sampling, Generator().manual_seed(4))
        assert [last.text] == whole.texts(tokenizer)
        assert [last.finished] == whole.finished.tolist() == [end is not None]
        assert len(growing) + 1 == whole.tokens.shape[1]  # something after each token
        assert not any(g.finished for g in growing)
        assert all(last.text.startswith(g.text) for g in growing)
        for n, g in enumerate(growing, start=1):  # bytes that may become a character are held back
            so_far = tokenizer.decode(whole.tokens[0, :n], skip_special_tokens=True)
            assert g.text == so_far.rstrip("\ufffd").strip()


@pytest.mark.parametrize("model_config", ["gpt2"], indirect=True)
def test_texts_are_those_of_the_answers_to_each_dialogue(policy, tokenizer):
    dialogues = [[{"role": "user", "content": text}] for text in ("Who are you?", "What is 12 + 30? " * 20)]
    ensure_chat_template(tokenizer)
    sampling = Sampling(max_new_tokens=8)
    room = context_length(policy) - 8
    tokens = encode_prompts(tokenizer, dialogues)
    assert len(tokens[1]) > room
    drawn = whole_answer(policy, tokenizer, [t[-room:] for t in tokens], sampling, seeded(3))
    assert answer_texts(policy, tokenizer, dialogues, sampling, seeded(3)) == drawn.texts(tokenizer)


def test_a_stream_ends_before_a_stop_text_and_shows_no_part_of_it(policy, tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    whole = [*stream_response(policy, tokenizer, QUESTION, Sampling(30), Generator().manual_seed(1))][-1].text
    at = next(i for i in range(8, 20) if whole.index(whole[i : i + 5]) == i and whole[i - 1].strip())
    seen = [
        *stream_response(
            policy, tokenizer, QUESTION, Sampling(30, stop=[whole[at : at + 5]]), Generator().manual_seed(1)
        )
    ]
    assert seen[-1] == (whole[:at].strip(), True)
    assert all(len(g.text) <= at for g in seen)


def test_a_stream_leaves_gradients_on_outside(policy, tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    growing = stream_response(policy, tokenizer, QUESTION, Sampling(3))
    next(growing)
    assert torch.is_grad_enabled()
    growing.close()
    assert torch.is_grad_enabled()


def by_both(policy, prompts, sampling, **settings):
    """The same answers by our own forward pass and by transformers'."""
    ends = {"eos_id": NO_END, "pad_id": 1} | settings
    found = []
    for kernels in ("fast", "plain"):
        use_kernels(kernels)
        found.append(generate(policy, prompts, sampling, **ends, seeds=seeds_of(prompts, 4)))
    use_kernels("fast")
    return found


def exactness(policy):
    """Transformers' RMSNorm and rotary angles are float32 in float64 models, too."""
    return 1e-12 if policy.config.model_type == "gpt2" else 5e-5


def close(one, other, atol):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
    assert_close(one.logprobs, other.logprobs, rtol=0, atol=atol)
    assert_close(one.entropy, other.entropy, rtol=0, atol=10 * atol)


VARIANTS = {
    "gelu_new": {"activation_function": "gelu_new"},
    "relu": {"activation_function": "relu"},
    "biases on queries, keys and values": {"model_type": "qwen2", "num_key_value_heads": 2},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "another width of heads": {"head_dim": 12},
    "longer waves": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_forward_pass_is_that_of_transformers(tokenizer, prompts, variant):
    changed = VARIANTS[variant]
    family = FAMILIES["gpt2" if "activation_function" in changed else "llama"]
    torch.manual_seed(0)
    policy = policy_from_config({**family, **changed}, tokenizer).eval().double()
    for name, parameter in policy.named_parameters():  # biases and gains that do something
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.2)
    assert ForwardPass.of(policy, 40) is not None
    close(*by_both(policy, prompts, Sampling(20, 0.8)), atol=exactness(policy))


def test_our_forward_pass_follows_the_weights_and_their_adapters(policy, prompts):
    add_lora(policy, LoRA(r=2))
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    adapted, again = by_both(policy.double(), prompts, Sampling(12))
    close(adapted, again, atol=exactness(policy))
    with adapters_off(policy):
        plain = by_both(policy, prompts, Sampling(12))
    close(*plain, atol=exactness(policy))
    assert not torch.equal(plain[0].logprobs, adapted.logprobs)


def test_our_forward_pass_in_half_precision(policy, prompts):
    exact = by_both(policy, prompts, Sampling(6).greedy())[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = by_both(policy, prompts, Sampling(6).greedy())[0]
    assert half.logprobs.dtype == torch.float32
    assert (half.logprobs[:, 0] - exact.logprobs[:, 0]).abs().max().item() < 0.2
    assert not torch.equal(half.logprobs, exact.logprobs)


@pytest.mark.parametrize("plain", [False, True])
def test_new_prompts_take_the_places_of_answers_that_end(policy, prompts, plain):
    prompts = [*prompts, [7], [9] * 30, *prompts[::-1]]
    policy = policy.double()
    endless = by_both(policy, prompts, Sampling(20))[0]
    eos = an_end(endless.tokens)
    whole = by_both(policy, prompts, Sampling(20), eos_id=eos)[0]
    assert len(set(whole.lengths.tolist())) > 2
    for rows in (1, 3, 5):
        few = by_both(policy, prompts, Sampling(20), eos_id=eos, rows=rows)[plain]
        close(few, whole, atol=exactness(policy))
        assert torch.equal(few.finished, whole.finished)


def test_as_many_answers_at_a_time_as_fit_into_memory(policy, prompts, monkeypatch):
    prompts, begun, policy = [*prompts, *prompts[::-1]], [], policy.double()
    real = fast.make_decoder
    monkeypatch.setattr(fast, "make_decoder", lambda model, rows, *rest: begun.append(rows) or real(model, rows, *rest))
    whole = by_both(policy, prompts, Sampling(20))[0]
    # Keys and values in float64, for prompts of 11 tokens and 20 new ones; float32 logits, and three as large.
    backbone = ForwardPass.of(policy, 31)
    row = 8 * 2 * len(backbone.layers) * backbone.kv_heads * backbone.head_size * 31 + 4 * 4 * policy.config.vocab_size
    for result in by_both(policy, prompts, Sampling(20), cache_gib=5.5 * row / 2**30):
        close(result, whole, atol=exactness(policy))
    by_both(policy, prompts, Sampling(20), cache_gib=1e-9)
    assert begun == [12, 12, 5, 5, 1, 1]


def test_a_prompt_that_is_shared_is_read_once(policy, prompts, monkeypatch):
    seen = []
    real = ForwardPass.__call__

    def counting(self, tokens, *others):
        seen.append(len(tokens))
        return real(self, tokens, *others)

    monkeypatch.setattr(ForwardPass, "__call__", counting)
    prompt = prompts[1]
    shared = answer(policy, [prompt] * 8, Sampling(5))
    assert seen == [len(prompt), 8, 8, 8, 8]
    monkeypatch.undo()
    close(shared, by_both_seed_zero(policy, [prompt] * 8, Sampling(5)), atol=1e-5)


def by_both_seed_zero(policy, prompts, sampling):
    seeds = seeds_of(prompts)
    use_kernels("plain")
    return generate(policy, prompts, sampling, eos_id=NO_END, pad_id=1, seeds=seeds)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("settings", [{}, {"rows": 2}], ids=str)
def test_an_answer_ends_with_any_of_several_tokens(policy, prompts, settings, kernels):
    use_kernels(kernels)
    seeds = seeds_of(prompts)
    endless = generate(policy, prompts, Sampling(20), eos_id=NO_END, pad_id=1, seeds=seeds)
    rows = endless.tokens.tolist()
    ends = {rows[0][5], rows[1][3]}
    found = generate(policy, prompts, Sampling(20), eos_id=ends, pad_id=1, seeds=seeds, **settings)
    for row, answered, finished in zip(rows, found.token_lists(), found.finished.tolist()):
        first = next((i for i, token in enumerate(row) if token in ends), None)
        assert answered == (row if first is None else row[: first + 1])  # the token that came is kept
        assert finished == (first is not None)


CHATML = "{% for m in messages %}{{ m['content'] + '<|pad|>\n' }}{% endfor %}"


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_end_tokens_come_from_model_tokenizer_and_template(policy, tokenizer):
    eos, other, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|pad|>"])
    tokenizer.chat_template = CHATML
    for known, expected in ((None, {eos, turn}), (other, {eos, turn, other}), ([other, 7], {eos, turn, other, 7})):
        policy.generation_config.eos_token_id = known
        assert end_tokens(policy, tokenizer) == expected
    prompts = encode_prompts(tokenizer, [QUESTION] * 64)
    drawn = whole_answer(policy, tokenizer, prompts, Sampling(40), Generator().manual_seed(0))
    lasts = {row[-1] for row, ended in zip(drawn.token_lists(), drawn.finished.tolist()) if ended}
    assert len(lasts) > 1 and lasts <= expected == drawn.ends
    assert not any(expected & {*row[:-1]} for row in drawn.token_lists())
    for i, row in enumerate(drawn.token_lists()):  # 7 is no special token, and yet no part of what is said
        said = row[:-1] if row[-1] in expected else row
        assert drawn.texts(tokenizer)[i] == tokenizer.decode(said, skip_special_tokens=True).strip()
    for seed in range(8):
        alone = whole_answer(policy, tokenizer, prompts[:1], Sampling(40), Generator().manual_seed(seed))
        *_, last = stream_response(policy, tokenizer, QUESTION, Sampling(40), Generator().manual_seed(seed))
        assert ([last.text], [last.finished]) == (alone.texts(tokenizer), alone.finished.tolist())


def test_all_ends_wait_for_the_least_length(policy, prompts):
    ends = set(range(10, 250))
    found = generate(policy, prompts * 20, Sampling(6, min_new_tokens=3), eos_id=ends, pad_id=1)
    assert found.lengths.min() == 4 and not torch.isin(found.tokens[:, :3], tensor(sorted(ends))).any()


def test_end_of_text_waits_for_the_least_length(policy, prompts):
    greedy = answer(policy, prompts[:1], Sampling(6).greedy()).tokens[0].tolist()
    eos = greedy[0]
    early = answer(policy, prompts[:1], Sampling(6, 0), eos_id=eos)
    assert early.lengths.tolist() == [1]
    late = answer(policy, prompts[:1], Sampling(6, 0, min_new_tokens=3), eos_id=eos)
    tokens = late.token_lists()[0]
    assert eos not in tokens[:3] and late.lengths[0] > 3
    logits = full_logits(policy, prompts[0], tokens)
    logits[:3, eos] = -torch.inf
    assert tokens == logits.argmax(-1).tolist()
    assert_close(late.logprobs[0], logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-5)
    assert torch.isfinite(late.entropy).all()


def test_an_answer_ends_before_a_stop_text(policy, tokenizer, prompts):
    sampling = Sampling(30, stop=[])
    whole = whole_answer(policy, tokenizer, prompts, sampling, Generator().manual_seed(1))
    texts = tokenizer.batch_decode(whole.token_lists(), skip_special_tokens=True)
    # Whole characters: more bytes may turn what is none into another.
    parts = [[text[i : i + 3] for i in range(1, len(text) - 2)] for text in (texts[0], texts[3])]
    stop = [next(part for part in candidates if "\ufffd" not in part) for candidates in parts]
    cut = whole_answer(policy, tokenizer, prompts, Sampling(30, stop=stop), Generator().manual_seed(1))
    ends = [min((text.index(s) for s in stop if s in text), default=None) for text in texts]
    assert cut.texts(tokenizer) == [text[:end].strip() for text, end in zip(texts, ends)]
    for i, (end, tokens, all_tokens) in enumerate(zip(ends, cut.token_lists(), whole.token_lists())):
        assert tokens == all_tokens[: len(tokens)]
        assert cut.finished[i] == (end is not None or whole.finished[i])
        if end is not None:  # it ends with the token that completes the text
            assert any(s in tokenizer.decode(tokens, skip_special_tokens=True) for s in stop)
            assert not any(s in tokenizer.decode(tokens[:-1], skip_special_tokens=True) for s in stop)


@pytest.mark.parametrize("model_config", ["gpt2", "llama"], indirect=True)
def test_large_matrices_are_multiplied_as_small_ones_are(policy, prompts, monkeypatch):
    plain = by_both(policy, prompts, Sampling(8))
    monkeypatch.setattr(forward_pass, "LARGE", 1)
    backbone = ForwardPass.of(policy, 40)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    assert all(layer.qkv.packed and layer.down.packed for layer in backbone.layers)
    packed = by_both(policy, prompts, Sampling(8))
    close(packed[0], plain[0], atol=1e-5)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not ForwardPass.of(policy, 40).layers[0].qkv.packed


def test_states_are_those_that_the_answers_were_drawn_from(policy, prompts):
    eos = an_end(answer(policy, prompts, Sampling(12)).tokens)
    kept = by_both(policy, prompts, Sampling(12), eos_id=eos, states=True)
    assert answer(policy, prompts, Sampling(12)).states is None
    packed = pack([p + r for p, r in zip(prompts, kept[0].token_lists())], 1)
    positions, mask = predicting_positions(packed, kept[0].lengths)
    with torch.no_grad():
        expected = packed_hidden(policy, packed)[positions]
    for responses in kept:
        assert_close(responses.states[mask], expected[mask], rtol=1e-4, atol=1e-4)
        assert not responses.states[~mask].any()


@pytest.fixture
def static_steps(monkeypatch):
    """Steps in fixed shapes, as a GPU replays them; here they run as they are. The rows of each step."""
    taken, run = [], StaticDecoder._run
    monkeypatch.setattr(StaticDecoder, "_run", lambda self, rows: taken.append(rows) or run(self, rows))
    monkeypatch.setattr(fast, "CachedDecoder", StaticDecoder)
    return taken


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("sampling", [Sampling(20, temperature=0), Sampling(20)])
def test_steps_of_fixed_shape_give_the_same(policy, prompts, sampling, rows, request):
    prompts = [*prompts, [7], [9] * 30]  # longer than those before: with few rows, all that is held moves to the right
    eos = an_end(answer(policy, prompts, sampling).tokens)

    def drawn():
        settings = {
            "eos_id": eos,
            "pad_id": 1,
            "seeds": seeds_of(prompts),
            "rows": rows,
        }
        return generate(policy, prompts, sampling, **settings)

    plain = drawn()
    taken = request.getfixturevalue("static_steps")
    static = drawn()
    assert torch.equal(static.tokens, plain.tokens) and torch.equal(static.mask, plain.mask)
    assert torch.equal(static.finished, plain.finished)
    assert_close(static.logprobs, plain.logprobs, rtol=0, atol=1e-5)
    assert taken and set(taken) <= ({1, 2, 4, 8} if rows is None else {1, 2, 3})  # powers of two, and all there are


def test_steps_of_fixed_shape_in_half_precision(policy, prompts, request):
    with torch.autocast("cpu", torch.bfloat16):
        plain = answer(policy, prompts, Sampling(6))
        taken = request.getfixturevalue("static_steps")
        static = answer(policy, prompts, Sampling(6))
    assert len(taken) == 5
    same = (static.tokens == plain.tokens).cummin(1).values  # rounding may choose another token, and all differs then
    assert same[:, 0].all() and same[:, 1:].any()
    assert (static.logprobs - plain.logprobs)[same].abs().max().item() < 0.2


def test_a_cpu_takes_no_cuda_graphs(policy, prompts, monkeypatch):
    monkeypatch.setattr(fast, "StaticDecoder", None)
    settings = {"eos_id": NO_END, "pad_id": 1, "cuda_graphs": True}
    assert generate(policy, prompts, Sampling(2), **settings).tokens.shape == (len(prompts), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_steps_give_the_same(policy, prompts):
    policy = policy.cuda()

    def drawn(**settings):
        return generate(
            policy,
            prompts,
            Sampling(20),
            eos_id=NO_END,
            pad_id=1,
            seeds=seeds_of(prompts),
            **settings,
        )

    plain, replayed = drawn(), drawn(cuda_graphs=True)
    assert torch.equal(replayed.tokens, plain.tokens)
    assert_close(replayed.logprobs, plain.logprobs, rtol=0, atol=1e-4)


def test_each_request_is_drawn_by_its_own_settings(policy, tokenizer, prompts):
    engine = FastEngine()
    assert [engine.sync(policy, tokenizer) for _ in range(2)] == [1, 2]
    kinds = [Sampling(9), Sampling(4, temperature=0.0), Sampling(9, temperature=0.5)]
    requests = [Request(prompt, kinds[i % 3], seed=i) for i, prompt in enumerate(prompts * 2)]
    together = engine.generate(requests, states=True)
    assert together.version == 2 and together.tokens.shape[1] <= 9
    for i, request in enumerate(requests):
        alone = engine.generate([request], states=True)
        n = int(alone.lengths)
        assert together.token_lists()[i] == alone.token_lists()[0]
        assert together.ended[i] == alone.ended[0] and not together.mask[i, n:].any()
        assert_close(together.logprobs[i, :n], alone.logprobs[0, :n], rtol=0, atol=1e-5)
        assert_close(together.states[i, :n], alone.states[0, :n], rtol=0, atol=1e-4)


def test_the_reference_engine_writes_the_same(policy, tokenizer, prompts):
    greedy = Sampling(12, temperature=0.0, min_new_tokens=2)
    engines = FastEngine(), TransformersEngine()
    fast_one, reference = (sample(engine, policy, tokenizer, prompts, greedy) for engine in engines)
    assert torch.equal(fast_one.tokens, reference.tokens) and torch.equal(fast_one.mask, reference.mask)
    assert torch.equal(fast_one.ended, reference.ended)
    assert_close(fast_one.logprobs, reference.logprobs, rtol=0, atol=1e-4)
    assert_close(fast_one.entropy, reference.entropy, rtol=0, atol=1e-4)
    asked = {"sampling": Sampling(8, temperature=0.7, top_k=20), "seeds": range(len(prompts))}
    drawn, again = (sample(engines[1], policy, tokenizer, prompts, **asked) for _ in range(2))
    assert torch.equal(drawn.tokens, again.tokens) and drawn.version == 2
    alone = sample(engines[1], policy, tokenizer, prompts[1:2], asked["sampling"], [1])
    assert alone.token_lists()[0] == drawn.token_lists()[1]  # its seed alone decides
    policy.generation_config.update(repetition_penalty=9.0, num_beams=2, stop_strings=["a"])  # as a checkpoint may say
    assert torch.equal(sample(engines[1], policy, tokenizer, prompts, greedy).tokens, reference.tokens)
    assert policy.generation_config.num_beams == 2


@pytest.mark.parametrize("engine", [FastEngine(), TransformersEngine()], ids=lambda e: type(e).__name__)
def test_why_a_response_ended(policy, tokenizer, prompts, engine, monkeypatch):
    greedy = Sampling(6, temperature=0.0)
    endless = sample(engine, policy, tokenizer, prompts[:1], greedy)
    tokens = endless.token_lists()[0]
    assert endless.ended.tolist() == [Ended.LENGTH] and not endless.finished.any()
    first, text = next((i, text) for i, t in enumerate(tokens) if "\ufffd" not in (text := tokenizer.decode([t])))
    stopped = sample(engine, policy, tokenizer, prompts[:1], Sampling(6, temperature=0.0, stop=[text]))
    assert stopped.ended.tolist() == [Ended.STOP] and stopped.lengths == first + 1 and stopped.finished.all()
    monkeypatch.setattr(policy.generation_config, "eos_token_id", tokens[3])
    assert sample(engine, policy, tokenizer, prompts[:1], greedy).ended.tolist() == [Ended.TOKEN]


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_a_text_does_not_grow_to_where_its_positions_change(model_config, tokenizer, capsys):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 16, "factor": 4.0}
    policy = policy_from_config({**model_config, "rope_parameters": rope}, tokenizer).eval()
    ends = {"eos_id": [], "pad_id": 1, "seeds": [3]}
    text = torch.arange(5, 22)[None]
    whole, begun = policy(text).logits[0, :16], policy(text[:, :16]).logits[0]
    assert (whole - begun).abs().max() > 0.1  # a text of 17 tokens is no longer one of 16 tokens and one more
    assert context_length(policy) == 16
    assert "texts of up to 16 tokens, for its positions change behind (longrope)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a prompt of 12 tokens and 5 new ones .* context of 16"):
        generate(policy, [[*range(5, 17)]], Sampling(max_new_tokens=5), **ends)
    drawn = generate(policy, [[*range(5, 17)]], Sampling(max_new_tokens=4), **ends)
    whole = torch.tensor([[*range(5, 17), *drawn.token_lists()[0]]])
    own = policy(whole).logits[0, 11:-1].log_softmax(-1).gather(1, whole[0, 12:, None])[:, 0]
    assert_close(drawn.logprobs[0], own, rtol=1e-4, atol=1e-4)
