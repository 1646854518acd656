import copy
import json
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import load_policy, load_policy_and_tokenizer, next_token_logits, packed_hidden, policy_from_config
from lit_rlhf.models.kernels import onednn
from lit_rlhf.models.policy import context_length, freeze, layers, packs, predicting_positions, response_positions
from lit_rlhf.text import pack, train_bpe
from lit_rlhf.text.chat import BASE_TEMPLATE

LENGTHS = [7, 2, 12, 1, 5, 9]


def sequences(tokenizer, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(len(tokenizer), (n,), generator=generator).tolist() for n in lengths]


# Packed sequences


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("block, padded", [(1, False), (6, False), (6, True)])
def test_packed_sequences_see_themselves_alone(norms_in_float64, policy, tokenizer, monkeypatch, block, padded, kind):
    monkeypatch.setattr("lit_rlhf.text.packing.BLOCK", block)
    policy = policy.double()
    policy.set_attn_implementation(kind)
    given = sequences(tokenizer)
    packed = pack(given, tokenizer.pad_token_id, padded=padded)
    hidden = packed_hidden(policy, packed)
    for sequence, start in zip(given, packed.starts.tolist()):
        alone = policy.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        assert_close(hidden[start : start + len(sequence)], alone, rtol=0, atol=1e-12)


def test_packed_loss_and_gradients_are_those_of_each_sequence_alone(norms_in_float64, policy, tokenizer):
    policy = policy.double()
    given = sequences(tokenizer)
    count = sum(len(s) - 1 for s in given)

    other = copy.deepcopy(policy)
    expected = torch.zeros((), dtype=torch.float64)
    for sequence in given:
        ids = torch.tensor([sequence])
        logprobs = other(input_ids=ids).logits[0].log_softmax(-1)
        expected = expected - sum(logprobs[i, token] for i, token in enumerate(sequence[1:])) / count
    expected.backward()

    packed = pack(given, tokenizer.pad_token_id)
    assert len(packed.tokens) < len(given) * max(map(len, given))
    learned = torch.cat([start + torch.arange(1, n) for start, n in zip(packed.starts, packed.lengths)])
    logits = next_token_logits(policy, packed_hidden(policy, packed)[learned - 1])
    loss = -token_logprobs(logits, packed.tokens[learned]).mean()
    loss.backward()

    assert_close(loss, expected, rtol=0, atol=1e-12)
    for (name, a), b in zip(policy.named_parameters(), other.parameters()):
        assert b.grad.abs().max() > 0, name
        assert_close(a.grad, b.grad, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("share", [False, True])
def test_rows_that_are_added_change_nothing(norms_in_float64, policy, share, monkeypatch):
    """Values and gradients in float64, though only products of oneDNN have rows added."""
    policy, sizes, rows = policy.double(), [3, 5, 1, 4], []
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    packed = pack([prompts[i % 2] + [20 + i] * n for i, n in enumerate(sizes)], 0, sizes, share_prompts=share)
    before, mask = predicting_positions(packed, packed.response_lengths)
    embeddings = policy.get_input_embeddings().weight[packed.tokens].detach().requires_grad_()
    for module in (policy.get_output_embeddings(), layers(policy.base_model)[-1]):
        module.register_forward_hook(lambda _, __, out: rows.append(out.shape[-2]))
    found, seen = [], []
    for width in (33, 32):
        monkeypatch.setattr(onednn, "WIDTH", width)
        monkeypatch.setattr(onednn, "by_intel", lambda: False)
        packed_hidden(policy, packed)  # which checks the model, once
        rows.clear()
        everything, again = packed_hidden(policy, packed), packed_hidden(policy, packed, embeddings)
        logits = next_token_logits(policy, packed_hidden(policy, packed, at=before[mask]))
        seen.append(list(rows))
        total = logits.square().sum() + (everything - 2 * again).pow(3).sum()
        gradients = torch.autograd.grad(total, [*policy.parameters(), embeddings])
        found.append((everything, again, logits, *gradients))
    for one, two in zip(*found, strict=True):
        assert_close(one, two, rtol=0, atol=1e-11)
    size, read = len(packed.tokens), int(mask.sum())
    assert seen == [[size] * 3 + [read], [-(-size // 32) * 32] * 3 + [32]]


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 12), (torch.bfloat16, 32)])
def test_rows_are_added_where_products_are_of_16_bit_numbers(policy, dtype, rows):
    packed, seen = pack([[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15]], 0), []
    assert packs(policy.base_model)  # which is found out on a few tokens, once
    policy.base_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert packed_hidden(policy.float(), packed).shape[0] == 12
    packed_hidden(policy.to(dtype), packed)
    assert seen == [rows, rows]


def test_response_positions_by_hand():
    packed = pack([[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]], 0)  # [4 5 6 7 8], [1 2 3], [9 10 0]
    positions, mask = response_positions(packed, torch.tensor([2, 3, 1]))
    assert mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert packed.tokens[positions[mask]].tolist() == [2, 3, 6, 7, 8, 10]
    assert positions[~mask].tolist() == [0, 0, 0]


# From a config


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(policy, tokenizer):
    assert policy.get_input_embeddings().num_embeddings == policy.get_output_embeddings().out_features == len(tokenizer)
    config = policy.config
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert context_length(policy) == 64
    for unknown in (-1, 0):  # XLNet says -1
        policy.config.max_position_embeddings = policy.config.n_positions = unknown
        assert context_length(policy) == 2**31


def test_the_config_is_not_changed_and_models_share_none(model_config, tokenizer):
    before = copy.deepcopy(model_config)
    one, two = (policy_from_config(model_config, tokenizer) for _ in range(2))
    assert model_config == before and one.config is not two.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 4}, "has no setting 'n_heads'; it has"),
        ({"hidden_dim": 4}, "has no setting 'hidden_dim'"),
        ({"model_type": "gpt7"}, "model.config: .*gpt7"),
        ({"model_type": None}, "model.config: "),
    ],
)
def test_a_wrong_config(model_config, tokenizer, change, message):
    with pytest.raises(UserError, match=message):
        policy_from_config({**model_config, **change}, tokenizer)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 30, "n_layer": 1, "n_head": 4},
        {"model_type": "llama", "hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 4},
    ],
)
def test_heads_that_do_not_divide_the_width(tokenizer, config):
    with pytest.raises(UserError, match=r"model\.config: "):
        policy_from_config(config, tokenizer)


TINY = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
MOE = {"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
DENSE = {"intermediate_size": 8}


@pytest.mark.parametrize(
    "config, width, said",
    [
        (MOE, 24, ""),
        (MOE | {"head_dim": 32}, 32, ""),  # which its code takes, though its config does not list it
        (DENSE | {"model_type": "ministral"}, 24, ""),  # no model can be made where this is null, as it is by default
        (DENSE | {"model_type": "qwen3", "head_dim": 32}, 32, ""),
        (DENSE | {"model_type": "qwen3"}, 128, "heads of qwen3 are 128 wide .* num_attention_heads = 24"),
    ],
)
def test_the_width_of_heads(tokenizer, tmp_path, capsys, config, width, said):
    say_once.cache_clear()
    policy_from_config({**TINY, **config}, tokenizer).save_pretrained(tmp_path)
    assert bool(re.search(said, found := capsys.readouterr().out)) and bool(found) == bool(said)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (4 * width, 96)
    assert loaded.model.layers[0].self_attn.k_proj.weight.shape == (2 * width, 96)


@pytest.mark.parametrize(
    "config, message",
    [
        (MOE | {"head_width": 32}, "qwen3_moe has no setting 'head_width'"),
        (DENSE | {"model_type": "llama", "hidden_size": 97}, r"hidden size \(97\) is not a multiple of .* heads \(4\)"),
        (
            DENSE | {"model_type": "llama", "num_key_value_heads": 3},
            "LlamaForCausalLM: it cannot read a text with these settings: it stops with RuntimeError",
        ),
        (MOE | {"num_experts_per_tok": 3}, "Qwen3MoeForCausalLM: it cannot read a text with these settings"),
        (DENSE | {"model_type": "llama4_text"}, "Llama4ForCausalLM names no part without the head"),
        ({"model_type": "emu3", "text_config": DENSE}, r"emu3 would have \d+ words, and the tokenizer has \d+: its"),
    ],
)
def test_settings_of_which_no_model_can_be_made(tokenizer, config, message):
    tiny = {} if "text_config" in config else TINY
    with pytest.raises(UserError, match=f"^model.config: .*{message}"):
        policy_from_config({**tiny, **config}, tokenizer)


def test_freeze(policy):
    frozen = freeze(policy.train())
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


# From a folder


def test_a_saved_model_loads_as_it_was(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_policy_and_tokenizer(tmp_path)
    ids = torch.tensor(sequences(tokenizer, [8]))
    assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer.chat_template == BASE_TEMPLATE


def test_a_template_of_the_folder_is_kept(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert load_policy_and_tokenizer(tmp_path)[1].chat_template == tokenizer.chat_template


def test_weights_in_half_precision_are_read_as_asked(policy, tmp_path):
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_policy(tmp_path).dtype == torch.float32
    assert load_policy(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_the_embedding_grows_for_an_added_padding_token(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<own-pad>"})
    loaded = load_policy(tmp_path, tokenizer)
    assert loaded.get_input_embeddings().num_embeddings == loaded.get_output_embeddings().out_features == len(tokenizer)
    assert loaded.config.pad_token_id == loaded.generation_config.pad_token_id == len(tokenizer) - 1
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[5, 6, 7]])
    grown = loaded(input_ids=ids).logits[..., : len(tokenizer) - 1]
    assert torch.equal(grown, policy(input_ids=ids).logits)
    loaded.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(tokenizer)


def test_a_larger_embedding_than_the_tokenizer_stays(policy, tokenizer, tmp_path):
    policy.resize_token_embeddings(512, mean_resizing=False)  # checkpoints round up
    policy.save_pretrained(tmp_path)
    assert load_policy(tmp_path, tokenizer).get_input_embeddings().num_embeddings == 512


def test_a_tokenizer_of_another_family_is_refused(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    strange = train_bpe(["some longer text, of other words. " + " ".join(map(str, range(100, 999)))], 340)
    rows = policy.get_input_embeddings().num_embeddings
    size = len(strange)
    with pytest.raises(UserError, match=rf"knows {rows} tokens and the tokenizer has {size}, up to {size - 1}; they"):
        load_policy(tmp_path, strange)


def test_no_model_there(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no model there \(config\.json and \*\.safetensors were expected\)"):
            load_policy(path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"no weights there \(\*\.safetensors were expected\)"):
        load_policy(tmp_path)


def test_a_hub_name_without_a_network():
    with pytest.raises(UserError, match=r"some-one/some-model: no model could be loaded .*a Hub name needs a network"):
        load_policy("some-one/some-model")


def test_the_real_gpt2_tokenizer_with_a_small_model(test_data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "gpt2-tokenizer")  # no padding token
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    policy_from_config(config, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, loaded = load_policy_and_tokenizer(tmp_path)
    assert policy.get_input_embeddings().num_embeddings == len(loaded) == 50258
    assert policy.config.pad_token_id == loaded.pad_token_id == 50257 != policy.config.eos_token_id
