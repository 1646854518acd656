"""What a checkpoint holds arrives whole, or is refused by name, whoever asks for it."""

import copy
import json
import os
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.models import (
    LoRA,
    RewardHead,
    load_policy,
    load_policy_and_tokenizer,
    load_reward_model,
    policy_from_config,
    reward_model_from_config,
    save_model,
)
from lit_rlhf.models.heads import critic_from_policy, packed_scores
from lit_rlhf.models.loading import (
    cast_to_intended,
    check_finite,
    copied,
    intended_dtype,
    is_intended,
    loading_as_stored,
    match_tokenizer,
)
from lit_rlhf.models.reference import Reference, ReferenceUpdate
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.stages.preference.annotators import RewardModelAnnotator
from lit_rlhf.text import load_tokenizer
from lit_rlhf.text.packing import pack

UP = "model.layers.1.mlp.up_proj.weight"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture
def model_config():
    """One whose weights are not tied."""
    return {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.fixture
def folder(policy, tokenizer, tmp_path):
    """A language model with a chat template."""
    tokenizer.chat_template = TEMPLATE
    save_model(policy, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change, file="model.safetensors"):
    """Change the tensors of a folder in place."""
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def edit_json(folder, file="config.json", **settings):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def replace(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def classifier(folder, labels):
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    return AutoModelForSequenceClassification.from_config(config)


# Whoever loads a model: a policy, with its tokenizer, as the backbone of a reward model; and a reward model
POLICIES = {
    "load_policy": load_policy,
    "load_policy_and_tokenizer": load_policy_and_tokenizer,
    "new_head": lambda folder: load_reward_model(folder, new_head=True),
    "own_head": lambda folder: load_reward_model(folder, new_head=True, head=RewardHead("mlp")),
}
REWARD_MODELS = {"load_reward_model": load_reward_model, "annotator": RewardModelAnnotator.load}


def without_values(path, load=load_policy, **settings):
    """As ``stage=plan`` loads it."""
    with torch.device("meta"):
        return load(path, **settings)


def shard(folder):
    """The folder's weights in several files; returns the second one."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    return sorted(folder.glob("model-*.safetensors"))[1]


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def gguf(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    (folder / "config.json").unlink()


def adapter(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


FAULTS = {
    "missing": (lambda f: edit(f, lambda w: w.pop(UP)), rf"1 missing \({UP}\)"),
    "unexpected": (lambda f: edit(f, lambda w: w.update(odd=torch.ones(2))), r"1 unexpected \(odd\)"),
    "shape": (
        lambda f: edit(f, lambda w: w.update({UP: torch.ones(3, 32)})),
        rf"1 of another shape \({UP} is \[3, 32\] for \[64, 32\]\)",
    ),
    "deeper": (
        lambda f: edit_json(f, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"11 missing \(model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.\)",
    ),
    "shallower": (
        lambda f: edit_json(f, num_hidden_layers=1, layer_types=["full_attention"]),
        r"11 unexpected \(model\.layers\.1\.",
    ),
    "nan": (
        lambda f: edit(f, lambda w: w[UP].view(-1)[5:7].fill_(torch.nan)),
        rf"tensor \S*{UP[6:]} holds 2 of 2048 numbers that are NaN or infinite \(as float32\)",
    ),
    "infinite": (lambda f: edit(f, lambda w: w[UP].view(-1)[5].fill_(-torch.inf)), f"{UP[6:]} holds 1 of 2048"),
    "encoder": (
        lambda f: replace(f, BertForMaskedLM(BertConfig(vocab_size=300, **SIZES))),
        r"an encoder \(BertForMaskedLM\), where a decoder-only model was expected",
    ),
    "encoder-decoder": (
        lambda f: replace(f, T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=8, d_ff=8, num_layers=1))),
        r"an encoder-decoder \(T5ForConditionalGeneration\)",
    ),
    "cut": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors: cut off or damaged"),
    "cut shard": (lambda f: cut(shard(f)), r"model-00002-of-\d+\.safetensors: cut off"),
    "no shard": (lambda f: shard(f).unlink(), r"model-00002-of-\d+\.safetensors: missing, though .*json names it"),
    "pickle": (pickled, r"no weights .*pytorch_model\.bin is a pickle: convert it, python -c .*save_pretrained"),
    "gguf": (gguf, r"no model there .*model\.gguf is a GGUF file: convert it, python -c .*gguf_file=f"),
    "adapter": (adapter, r"adapter_config\.json: the adapter is for /gone/base, which is not there"),
    "wrong config": (lambda f: edit_json(f, num_attention_heads="four"), "no model could be loaded from there"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type'), r"config\.json: damaged \(not JSON"),
    "no settings": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: damaged \(holds"),
    "no end of layers": (lambda f: edit_json(f, num_hidden_layers=10**30), r"json: damaged \(num_hidden_layers"),
    "odd token": (lambda f: edit_json(f, eos_token_id={"a": 1}), r"config\.json: damaged \(eos_token_id"),
    "pipe": (lambda f: DAMAGED["pipe"](f / "model.safetensors"), "a pipe or a device"),
    "odd sizes": (lambda f: edit_json(f, model_type="llama", num_attention_heads=5), "not a multiple of the number of"),
    "broken generation": (
        lambda f: (f / "generation_config.json").write_text("{"),
        r"generation_config\.json: damaged \(not JSON",
    ),
    "no index": (
        lambda f: (shard(f).parent / "model.safetensors.index.json").write_text("[]"),
        r"index\.json: no index of weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_loader_of_a_language_model_refuses(folder, fault):
    break_it, message = FAULTS[fault]
    break_it(folder)
    for name, load in POLICIES.items():
        with pytest.raises(UserError, match=message) as error:
            load(folder)
        assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value), name
    if fault in ("encoder", "encoder-decoder", "cut", "no shard", "pickle", "gguf", "adapter"):
        with pytest.raises(UserError, match=message):
            without_values(folder)


DAMAGED = {
    "cut": lambda file: file.write_text(file.read_text()[: len(file.read_text()) // 2]),
    "no JSON": lambda file: file.write_text("hello"),
    "no object": lambda file: file.write_text("[1]"),
    "null": lambda file: file.write_text("null"),
    "empty": lambda file: file.write_text(""),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00\x80"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "unreadable": lambda file: instead(file, lambda: file.symlink_to("/proc/self/mem")),  # also for the superuser
    "pipe": lambda file: instead(file, lambda: os.mkfifo(file)),
}


def instead(file, put):
    file.unlink()
    put()


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_a_damaged_file_is_named(folder, tokenizer, file, damage, tmp_path):
    """By whoever reads it: as a policy, with and without its tokenizer, as a reward model of either kind."""
    kinds = [(folder, [load_tokenizer, load_policy_and_tokenizer])]
    for head in (None, RewardHead("mlp")):
        where = tmp_path / (head or RewardHead()).kind
        save_model(load_reward_model(folder, tokenizer, new_head=True, head=head), tokenizer, where)
        kinds.append((where, [RewardModelAnnotator.load, load_tokenizer]))
    if file in ("config.json", "generation_config.json"):
        kinds[0][1].extend([*POLICIES.values(), without_values])
    for where, loaders in kinds:
        if not (where / file).exists():
            continue
        DAMAGED[damage](where / file)
        for load in loaders:
            with pytest.raises(UserError) as error:
                load(where)
            assert re.match(rf"{where}(/{file}:|: .*\b{file})", str(error.value)) and "\n" not in str(error.value)
            assert "no tokenizer could be loaded" not in str(error.value)


@pytest.mark.parametrize("text", ['{"version": "1.0"}', '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_file_of_something_else_is_named(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"model/tokenizer\.json: cannot be read \("):
        load_tokenizer(folder)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_settings_of_an_adapter_are_named(folder, damage):
    adapter(folder)
    DAMAGED[damage](folder / "adapter_config.json")
    for load in (load_policy, load_tokenizer, load_policy_and_tokenizer, without_values, *REWARD_MODELS.values()):
        with pytest.raises(UserError, match=rf"^{folder}/adapter_config\.json(:1)?: damaged"):
            load(folder)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan", "cut"])
def test_every_loader_of_a_reward_model_refuses(folder, tokenizer, fault):
    save_model(load_reward_model(folder, tokenizer, new_head=True), tokenizer, folder)
    break_it, message = FAULTS[fault]
    for load in REWARD_MODELS.values():
        load(folder)
    break_it(folder)
    for load in REWARD_MODELS.values():
        with pytest.raises(UserError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("score.read.0.bias"), r"1 missing \(score\.read\.0\.bias\)"),
        (lambda w: w.update(odd=torch.ones(1)), r"1 unexpected \(odd\)"),
        (lambda w: w.update({"score.read.0.bias": torch.ones(2)}), r"score\.read\.0\.bias is \[2\] for \[32\]"),
        (lambda w: w["score.read.0.bias"][0].fill_(torch.nan), r"tensor score\.read\.0\.bias holds 1 of 32"),
    ],
)
def test_a_head_of_its_own_comes_whole_too(folder, tokenizer, change, message):
    save_model(load_reward_model(folder, tokenizer, new_head=True, head=RewardHead("mlp")), tokenizer, folder)
    load_reward_model(folder)
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load_reward_model(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("%}", "if m.role == 'user' %}", 1), "its chat template leaves out what the assistant says"),
        ("{{ messages[-1].content }}", "its chat template leaves out what the assistant and the user says"),
        ("{% for %}", r"its chat template \(chat_template.jinja\) fails on a plain dialogue"),
        ("{{ raise_exception('not me') }}", r"its chat template .* fails on a plain dialogue \(not me\)"),
    ],
)
def test_a_template_that_drops_or_fails_is_refused(folder, template, message):
    (folder / "chat_template.jinja").write_text(template)
    for load in (load_tokenizer, load_policy_and_tokenizer, RewardModelAnnotator.load):
        with pytest.raises(UserError, match=message):
            load(folder)


PARTS = "{% for m in messages %}{% for p in m.content if p is mapping %}{{ p.text }}{% endfor %}{% endfor %}"
WANTS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('system') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize("template", [TEMPLATE, PARTS, WANTS_SYSTEM, NO_SYSTEM])
def test_templates_that_have_their_ways_are_not_refused(folder, template, capsys):
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(folder).chat_template == template
    say_nothing(capsys)


def test_a_template_without_system_messages_says_so(folder, capsys):
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("%}", "if m.role != 'system' %}", 1))
    load_tokenizer(folder)
    assert capsys.readouterr().out == f"{folder}: its chat template leaves out system messages\n"


# Models of another kind


def test_what_scores_is_no_policy_and_what_classifies_no_reward_model(folder, tokenizer):
    for labels, found in ((1, "a reward model"), (3, "a classifier of 3 labels")):
        replace(folder, classifier(folder, labels))
        with pytest.raises(UserError, match=f"{found}, where a language model was expected"):
            load_policy(folder)
        with pytest.raises(UserError, match=f"{found}, where a language model was expected"):
            load_reward_model(folder, new_head=True, head=RewardHead("mlp"))
    for new_head in (False, True):
        with pytest.raises(UserError, match="a classifier of 3 labels, where a reward model was expected"):
            load_reward_model(folder, tokenizer, new_head=new_head)


def test_a_reward_model_with_a_head_of_its_own_is_no_policy(folder, tokenizer):
    save_model(load_reward_model(folder, tokenizer, new_head=True, head=RewardHead("mlp")), tokenizer, folder)
    for load in (load_policy, load_policy_and_tokenizer):
        with pytest.raises(UserError, match="a reward model with a head of its own, where a language model was"):
            load(folder)


def test_a_file_in_the_place_of_its_folder(folder):
    with pytest.raises(UserError, match=r"model\.safetensors is a file, and its folder was expected"):
        load_policy(folder / "model.safetensors")


# What differs and does no harm


@pytest.mark.parametrize("constant", ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias"])
def test_constants_of_older_releases_are_no_fault(folder, constant):
    before = load_policy(folder).state_dict()
    edit(folder, lambda w: w.update({constant: torch.ones(4)}))
    after = load_policy(folder).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_the_language_head_alone_is_dropped_for_a_scalar_one(folder, tokenizer, policy):
    loaded = load_reward_model(folder, tokenizer, new_head=True)
    assert torch.equal(loaded.base_model.embed_tokens.weight, policy.base_model.embed_tokens.weight)
    edit(folder, lambda w: w.update({"v_head.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"1 unexpected \(v_head\.weight\)"):
        load_reward_model(folder, tokenizer, new_head=True)


FAMILY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_language_head_is_known_by_the_name_in_the_file(tokenizer, tmp_path):
    """GPT-NeoX has ``lm_head``, and writes it as ``embed_out``."""
    policy = policy_from_config({"model_type": "gpt_neox", **FAMILY}, tokenizer)
    save_model(policy, tokenizer, tmp_path / "model")
    assert "embed_out.weight" in load_file(tmp_path / "model" / "model.safetensors")
    backbone = load_reward_model(tmp_path / "model", tokenizer, new_head=True).base_model.state_dict()
    assert_close(backbone, dict(policy.base_model.state_dict()))


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_a_family_without_a_classifier_has_a_reward_model_all_the_same(family, tokenizer, tmp_path, capsys):
    """Transformers has no sequence classifier of it: the head is ours, and so is the folder."""
    policy = policy_from_config({"model_type": family, **FAMILY}, tokenizer)
    save_model(policy, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="a language model, where a reward model was expected"):
        load_reward_model(tmp_path / "model", tokenizer)
    model = load_reward_model(tmp_path / "model", tokenizer, new_head=True, head=RewardHead(start="normal"))
    assert "transformers has no sequence classifier of this kind" in capsys.readouterr().out
    save_model(model, tokenizer, tmp_path / "reward")
    rows = pack([[7, 8, 9], [7, 8, 6, 5]], tokenizer.pad_token_id)
    with torch.no_grad():
        found = packed_scores(load_reward_model(tmp_path / "reward", tokenizer), rows)
        states = [policy.base_model(torch.tensor([t])).last_hidden_state[0, -1] for t in ([7, 8, 9], [7, 8, 6, 5])]
        expected = model.score.read(torch.stack(states)).squeeze(1)
    assert expected.abs().min() > 0
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    made = reward_model_from_config({"model_type": family, **FAMILY}, tokenizer)
    assert packed_scores(made, rows).tolist() == [0, 0]


def test_a_sharded_checkpoint_is_whole(folder, policy):
    shard(folder)
    assert torch.equal(load_policy(folder).lm_head.weight, policy.lm_head.weight)


def test_a_number_that_does_not_fit_the_precision_is_named(folder):
    edit(folder, lambda w: w[UP].view(-1)[0].fill_(1e6))
    load_policy(folder)
    with pytest.raises(UserError, match=r"holds 1 of 2048 numbers that are NaN or infinite \(as float16\)"):
        load_policy(folder, dtype="float16")


def test_a_number_that_does_not_fit_the_precision_is_exported_in_float32(folder, tokenizer, tmp_path, capsys):
    edit(folder, lambda w: w[UP].view(-1)[0].fill_(1e6))
    save_model(load_policy(folder, export_dtype="float16"), tokenizer, tmp_path / "sft" / "model")
    assert f"{tmp_path / 'sft'}: written in float32, for {UP} holds numbers beyond float16's" in capsys.readouterr().out
    assert load_file(tmp_path / "sft/model/model.safetensors")[UP].view(-1)[0] == 1e6
    assert json.loads((tmp_path / "sft/model/config.json").read_text())["dtype"] == "float32"


def test_integers_and_empty_tensors_are_finite():
    module = torch.nn.Module()
    module.register_buffer("steps", torch.arange(3))
    module.register_buffer("none", torch.empty(0))
    check_finite(module, "here")


# Formats


def test_a_pickle_is_converted_by_the_line_that_is_said(folder, policy):
    pickled(folder)
    with pytest.raises(UserError) as error:
        load_policy(folder)
    exec(re.search(r'python -c "(.*)"', str(error.value))[1])
    assert torch.equal(load_policy(folder).lm_head.weight, policy.lm_head.weight)


# Tokenizer and model


def say_nothing(capsys):
    assert not capsys.readouterr().out


def test_the_reward_model_of_another_tokenizer_is_refused(folder, tokenizer, tmp_path):
    """Sizes fit and every token has a meaning: only the vocabularies tell."""
    save_model(load_reward_model(folder, tokenizer, new_head=True), tokenizer, tmp_path / "reward")
    inner = json.loads((folder / "tokenizer.json").read_text())
    vocab = inner["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    swapped = load_tokenizer(folder)
    with pytest.raises(UserError, match=r"its tokenizer has token \d+ for '[ab]', and .* they are no pair"):
        load_reward_model(tmp_path / "reward", swapped)
    load_reward_model(tmp_path / "reward", load_tokenizer(tmp_path / "reward"))


def test_an_end_token_that_the_model_has_not_is_said(folder, tokenizer, capsys):
    edit_json(folder, "generation_config.json", eos_token_id=[tokenizer.eos_token_id, 99_999])
    rows = load_policy_and_tokenizer(folder)[0].get_input_embeddings().num_embeddings
    assert f"{folder}: eos_token_id names 99999, and the model has {rows} tokens\n" == capsys.readouterr().out


def test_special_tokens_that_contradict_are_said_once(folder, tokenizer, capsys):
    load_policy_and_tokenizer(folder)
    say_nothing(capsys)
    edit_json(folder, eos_token_id=7)
    edit_json(folder, "generation_config.json", eos_token_id=[7, 9])
    policy, _ = load_policy_and_tokenizer(folder)
    said = capsys.readouterr().out
    assert said == (
        f"{folder}: eos_token_id is 7, 9 in the model's settings and {tokenizer.eos_token_id} (<|endoftext|>) in the "
        "tokenizer: is it this model's?\n"
    )
    assert policy.generation_config.eos_token_id == [7, 9]
    edit_json(folder, "generation_config.json", eos_token_id=[7, tokenizer.eos_token_id])  # one of several ends
    load_policy_and_tokenizer(folder)
    say_nothing(capsys)


def test_padding_is_no_token_that_is_trained(folder, tokenizer):
    """Where padding was the end token, transformers drops the gradient of its embedding."""
    edit_json(folder, pad_token_id=tokenizer.eos_token_id)
    edit_json(folder, "tokenizer_config.json", pad_token=tokenizer.eos_token)
    policy, loaded = load_policy_and_tokenizer(folder)
    ids = torch.tensor([[loaded.eos_token_id, 5]])
    policy(input_ids=ids).logits.square().sum().backward()
    gradient = policy.get_input_embeddings().weight.grad
    assert gradient[loaded.eos_token_id].abs().sum() > 0
    assert policy.config.pad_token_id == policy.get_input_embeddings().padding_idx == loaded.pad_token_id


def test_positions_that_know_the_padding_of_the_config_are_exported_as_they_are(tmp_path, tokenizer):
    sizes = {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 32}
    config = AutoConfig.for_model("xglm", vocab_size=len(tokenizer), pad_token_id=20, **sizes)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.arange(5, 30)[None]
    before, found = model(tokens, use_cache=False).logits, []
    match_tokenizer(model, tokenizer, "the model")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id not in (None, 20)
    save_model(model, tokenizer, tmp_path / "exported")
    for loaded in (
        load_policy(tmp_path / "exported", tokenizer),
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported"),
    ):
        found.append(loaded.eval()(tokens, use_cache=False).logits)
    assert_close(found, [before, before])


@pytest.mark.parametrize("tied", [True, False])
def test_an_added_token_takes_no_probability(tokenizer, tied):
    """All logits of GPT-2 are far below 0: a row around zero would have taken all."""
    rows = len(tokenizer)
    sizes = {**FAMILY, "model_type": "gpt2", "vocab_size": rows, "tie_word_embeddings": tied}
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).eval()
    direction = torch.ones(FAMILY["hidden_size"]) / FAMILY["hidden_size"] ** 0.5
    policy.get_output_embeddings().weight.data += 2 * direction
    policy.transformer.ln_f.bias.data -= 16 * direction
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    tokens = torch.tensor([[7, 8, 9]])
    before = policy(tokens).logits
    assert before.max() < -20
    match_tokenizer(policy, tokenizer, "the model")
    assert tokenizer.pad_token_id == rows
    after = policy(tokens).logits
    assert_close(after[..., :rows], before)
    assert_close(after[..., rows], before.mean(-1))
    assert_close(after.log_softmax(-1)[..., :rows], before.log_softmax(-1), rtol=0, atol=2 / rows)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
@pytest.mark.parametrize("load", [load_policy, partial(load_reward_model, new_head=True), load_policy_and_tokenizer])
def test_weights_of_few_bits_are_refused(load, method, folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"weights of few bits \({method}, says its config.json\).*quantization=4bit"):
        load(folder)


def test_the_vocabulary_grows_by_what_was_added_and_says_so(folder, tokenizer, capsys):
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<own-pad>"})
    policy = load_policy(folder, tokenizer)
    assert policy.config.vocab_size == rows + 1
    assert f"the vocabulary grows from {rows} tokens to {rows + 1}, for <own-pad>\n" in capsys.readouterr().out
    match_tokenizer(policy, tokenizer, folder)
    say_nothing(capsys)


def shapes(model):
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_policy_without_values_has_the_shape_of_one_with_them(folder, tokenizer, lora):
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<own-pad>"})
    blank = without_values(folder, tokenizer=larger, lora=lora)
    assert shapes(blank) == shapes(load_policy(folder, larger, lora=lora))
    assert all(p.is_meta for p in blank.parameters())


@pytest.mark.parametrize(
    "head", [RewardHead(), RewardHead("mlp"), RewardHead("likelihood"), RewardHead(pooling="token")]
)
def test_a_reward_model_without_values_has_the_shape_of_one_with_them(folder, tokenizer, tmp_path, head):
    fresh = without_values(folder, load_reward_model, tokenizer=tokenizer, new_head=True, head=head)
    model = load_reward_model(folder, tokenizer, new_head=True, head=head)
    assert shapes(fresh) == shapes(model)
    save_model(model, tokenizer, tmp_path / "scores")
    loaded = without_values(tmp_path / "scores", load_reward_model, tokenizer=tokenizer)
    assert shapes(loaded) == shapes(load_reward_model(tmp_path / "scores", tokenizer))
    assert all(p.is_meta for p in loaded.parameters())


def test_what_is_to_be_sharded_stays_as_it_is_stored(policy, tokenizer, tmp_path):
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with loading_as_stored():
        lent = load_policy(tmp_path, tokenizer)
    plain = load_policy(tmp_path, tokenizer)
    assert (lent.dtype, intended_dtype(lent)) == (torch.bfloat16, torch.float32)
    assert plain.dtype == torch.float32
    assert [p.data_ptr() for p in copied(lent).parameters()] == [p.data_ptr() for p in lent.parameters()]
    assert copied(plain).lm_head.weight.data_ptr() != plain.lm_head.weight.data_ptr()
    reference = Reference(lent, ReferenceUpdate()).start
    critic = critic_from_policy(lent)
    assert intended_dtype(reference) == intended_dtype(critic.backbone) == critic.head.weight.dtype == torch.float32
    assert Reference(lent, ReferenceUpdate(dtype="float16")).start.dtype == torch.float16
    assert cast_to_intended(lent).dtype == intended_dtype(lent) == torch.float32 and not is_intended(lent)
    for name, weight in cast_to_intended(reference).state_dict().items():
        assert_close(weight, plain.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("lora", [LoRA(r=2), LoRA(r=2, init_lora_weights="gaussian"), LoRA(r=2, use_dora=True)])
def test_adapters_of_what_is_to_be_sharded_are_as_precise_as_others(policy, tokenizer, tmp_path, lora):
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def load():
        torch.manual_seed(0)
        return load_policy(tmp_path, tokenizer, lora=lora)

    plain = load()
    with loading_as_stored():
        lent = load()
    critic = critic_from_policy(lent, lora=lora)
    assert critic.backbone.dtype == lent.dtype == (torch.float32 if lora.use_dora else torch.bfloat16)
    for name, weight in cast_to_intended(lent).state_dict().items():
        assert_close(weight, plain.state_dict()[name], rtol=0, atol=0)


def test_a_head_of_our_own_on_what_is_to_be_sharded(policy, tokenizer, tmp_path):
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with loading_as_stored():
        model = load_reward_model(tmp_path, tokenizer, new_head=True, head=RewardHead("mlp"))
    assert (model.backbone.dtype, intended_dtype(model.backbone)) == (torch.bfloat16, torch.float32)
    assert {p.dtype for p in model.score.parameters()} == {torch.float32}


@pytest.mark.parametrize("reward", [False, True], ids=["language model", "reward model"])
def test_of_what_is_to_be_sharded_only_what_grows_is_cast(reward, policy, tokenizer, tmp_path):
    policy.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path)

    def load():
        torch.manual_seed(0)
        return load_reward_model(tmp_path, tokenizer, new_head=True) if reward else load_policy(tmp_path, tokenizer)

    plain = load()
    with loading_as_stored():
        lent = load()
    rows = plain.get_input_embeddings().num_embeddings
    assert rows == lent.get_input_embeddings().num_embeddings > policy.get_input_embeddings().num_embeddings
    assert {rows in p.shape for p in lent.base_model.parameters() if p.dtype == torch.float32} == {True}
    assert intended_dtype(lent) == torch.float32
    for name, weight in cast_to_intended(lent).state_dict().items():
        assert_close(weight, plain.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mlp", "likelihood"])
def test_a_saved_head_of_our_own_on_what_is_to_be_sharded(kind, model_config, tokenizer, tmp_path):
    config = AutoConfig.for_model(**model_config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = RewardTransformer.from_policy(AutoModelForCausalLM.from_config(config), RewardHead(kind)).to(torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "model")
    plain = load_reward_model(tmp_path / "model", tokenizer)
    with loading_as_stored():
        lent = load_reward_model(tmp_path / "model", tokenizer)
    assert {p.dtype for p in lent.parameters()} == {torch.bfloat16} and intended_dtype(lent.backbone) == torch.float32
    for name, weight in lent.float().state_dict().items():
        assert_close(weight, plain.state_dict()[name], rtol=0, atol=0)


def test_what_is_no_folder_is_said_before_the_hub_is_asked(capsys):
    for load in (load_policy, load_tokenizer):
        say_once.cache_clear()
        with pytest.raises(UserError):
            load("nobody/no-such-model")
        said = "nobody/no-such-model: no such file or folder here; asking the Hugging Face Hub for it"
        assert capsys.readouterr().out.count(said) == 1
