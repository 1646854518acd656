"""A checkpoint that is trained with a learning rate of 0 comes back as it was, but for what docs/loading.md names."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.models import (
    LoRA,
    RewardHead,
    load_policy,
    load_policy_and_tokenizer,
    load_reward_model,
    policy_from_config,
    save_model,
)
from lit_rlhf.models.checkpoint import rounded_back
from lit_rlhf.models.loading import checkpoint_format, listed
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import (
    DPODataModule,
    DPOModule,
    PPOModule,
    RewardDataModule,
    RewardModule,
    SFTDataModule,
    SFTModule,
    WorldPPODataModule,
)
from lit_rlhf.text import load_tokenizer
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training import adamw

STILL = {"optimizer": partial(adamw, lr=0.0, weight_decay=0.1)}
DEMONSTRATIONS = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(20)]
PAIRS = [{"prompt": f"Question {i}?", "chosen": "good", "rejected": "bad bad"} for i in range(20)]
# What transformers refuses to write from a changed object, and what no config of a model holds
GENERATION = {"eos_token_id": [0, 4], "bos_token_id": 0, "do_sample": False, "temperature": 0.3, "top_k": 7}


@pytest.fixture
def checkpoint(family, tokenizer, tmp_path):
    """A checkpoint in bfloat16 as others publish it: padding is the end token, and there is more than one end."""
    folder = tmp_path / "checkpoint"
    family.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for file, pad in (("tokenizer_config.json", {"pad_token": "<|endoftext|>"}), ("config.json", {"pad_token_id": 0})):
        (folder / file).write_text(json.dumps({**settings_of(folder, file), **pad}))
    return folder


NAMED = {
    "config.json": ["pad_token_id", "transformers_version"],
    "tokenizer_config.json": ["pad_token", "is_local", "local_files_only"],  # the latter two are transformers' own
}


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def assert_same_tensors(one, two):
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


def settings_of(folder, file, *apart):
    found = json.loads((folder / file).read_text())
    return {name: value for name, value in found.items() if name not in apart}


def assert_came_back(before, after):
    assert_same_tensors(before, after)
    for file in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (before / file).read_bytes() == (after / file).read_bytes(), file
    for file, apart in NAMED.items():
        assert settings_of(before, file, *apart) == settings_of(after, file, *apart), file
    assert {f.name for f in before.iterdir()} == {f.name for f in after.iterdir()}


def sft(checkpoint, fit, tmp_path, **loading):
    tokenizer = load_tokenizer(checkpoint)
    tmp_path.mkdir(exist_ok=True)
    write_jsonl(tmp_path / "d.jsonl", DEMONSTRATIONS)
    module = SFTModule(load_policy(checkpoint, tokenizer, **loading), tokenizer, **STILL)
    fit(module, SFTDataModule(tmp_path / "d.jsonl", tokenizer, batch_size=8), max_steps=2)
    module.export(tmp_path / "sft")
    return tmp_path / "sft" / "model"


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["full", "lora"])
def test_sft_gives_a_checkpoint_back(checkpoint, fit, tmp_path, lora):
    assert_came_back(checkpoint, sft(checkpoint, fit, tmp_path, lora=lora))


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_dpo_gives_a_checkpoint_back(checkpoint, fit, tmp_path):
    tokenizer = load_tokenizer(checkpoint)
    write_jsonl(tmp_path / "p.jsonl", PAIRS)
    module = DPOModule(load_policy(checkpoint, tokenizer), tokenizer, **STILL)
    fit(module, DPODataModule(tmp_path / "p.jsonl", tokenizer, batch_size=8, held_out=0.2), max_steps=2)
    module.export(tmp_path / "dpo")
    assert_came_back(checkpoint, tmp_path / "dpo" / "model")


@pytest.mark.parametrize("head", [RewardHead(), RewardHead("mlp"), RewardHead("likelihood")], ids=lambda h: h.kind)
@pytest.mark.parametrize("model_config", ["llama", "qwen3"], indirect=True)
def test_a_reward_model_has_the_backbone_of_its_checkpoint(checkpoint, fit, tmp_path, head):
    tokenizer = load_tokenizer(checkpoint)
    write_jsonl(tmp_path / "p.jsonl", PAIRS)
    data = RewardDataModule(tmp_path / "p.jsonl", tokenizer, batch_size=8, held_out=0.2)
    data.setup()
    model = load_reward_model(checkpoint, tokenizer, new_head=True, head=head)
    module = RewardModule(model, **data.for_module(), **STILL)
    fit(module, data, max_steps=2)
    module.export(tmp_path / "reward")
    folder = tmp_path / "reward" / "model"
    before = {name.rpartition("model.")[2]: tensor for name, tensor in tensors(checkpoint).items()}
    for name, tensor in tensors(folder).items():
        assert tensor.dtype == torch.bfloat16
        if not name.startswith("score."):
            assert torch.equal(before[name.rpartition("model.")[2].removeprefix("backbone.")], tensor), name
    assert checkpoint_format(load_reward_model(folder, tokenizer)).dtype == torch.bfloat16
    if head.plain:
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        assert plain.dtype == torch.bfloat16 and plain.config.pad_token_id == tokenizer.pad_token_id != 0


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_ppo_gives_a_checkpoint_back(checkpoint, fit, tmp_path, world):
    tokenizer = load_tokenizer(checkpoint)
    reward_model = load_reward_model(checkpoint, tokenizer, new_head=True)
    settings = {"sampling": Sampling(max_new_tokens=4), "minibatch_size": 4, "critic_lr": 0.0, **STILL}
    module = PPOModule(load_policy(checkpoint, tokenizer), reward_model, tokenizer, **settings)
    data = WorldPPODataModule(world, tokenizer, prompts=64, batch_size=8, limit_held_out=6)
    fit(module, data, max_epochs=1, limit_train_batches=1)
    module.export(tmp_path / "ppo")
    assert_came_back(checkpoint, tmp_path / "ppo" / "model")


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_another_precision_is_written_where_it_is_asked_for(checkpoint, fit, tmp_path):
    wide = sft(checkpoint, fit, tmp_path, export_dtype="float32")
    assert {tensor.dtype for tensor in tensors(wide).values()} == {torch.float32}
    assert settings_of(wide, "config.json")["dtype"] == "float32"
    before = tensors(checkpoint)
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in tensors(wide).items())
    assert checkpoint_format(load_policy(wide)).dtype == torch.float32


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_tensors_of_another_precision_keep_theirs(checkpoint, fit, tmp_path):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-6
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert_came_back(checkpoint, sft(checkpoint, fit, tmp_path))


RENAMED = {  # config, what a file calls a tensor, what the model calls it
    "mixtral": (
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "num_local_experts": 2},
        "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight",
    ),
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2}, "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), RENAMED.items(), ids=RENAMED)
@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward model"])
def test_tensors_of_another_precision_keep_theirs_under_other_names(kind, case, reward, tokenizer, tmp_path):
    settings, name, own = case
    policy_from_config({"model_type": kind, **settings}, tokenizer).bfloat16().save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    weights = {n.removeprefix("transformer."): weight for n, weight in load_file(file).items()}
    weights[name] = weights[name].float() + 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    tokenizer.save_pretrained(tmp_path / "in")
    if reward:
        model = load_reward_model(tmp_path / "in", tokenizer, new_head=True, head=RewardHead("mlp"))
    else:
        model = load_policy(tmp_path / "in", tokenizer)
    save_model(model, tokenizer, tmp_path / "out")
    found = tensors(tmp_path / "out")
    ends = tuple(n.partition("0.")[2] for n in (name, own))
    assert {n for n, tensor in found.items() if tensor.dtype == torch.float32} == {n for n in found if n.endswith(ends)}
    assert any(torch.equal(tensor, weights[name]) for tensor in found.values())


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_what_is_trained_in_float32_is_rounded_once(checkpoint, tmp_path):
    policy, tokenizer = load_policy_and_tokenizer(checkpoint)
    with torch.no_grad():
        policy.model.norm.weight.add_(0.3)
    save_model(policy, tokenizer, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.norm.weight"], policy.model.norm.weight.bfloat16())
    assert policy.model.norm.weight.dtype == torch.float32  # the model itself is not rounded
    assert policy.generation_config.eos_token_id == [0, 4]


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
@pytest.mark.parametrize(("step", "lost"), [(1e-4, 1.0), (0.5, 0.0)])
def test_changes_that_rounding_takes_back_are_said(checkpoint, tmp_path, step, lost, capsys):
    policy, tokenizer = load_policy_and_tokenizer(checkpoint)
    with torch.no_grad():
        policy.model.norm.weight.add_(step)  # of 1: bfloat16's next number is 1.0078
    save_model(policy, tokenizer, tmp_path / "stage" / "model")
    said = f"{tmp_path / 'stage'}: rounding to bfloat16 takes back 100% of the numbers that training changed"
    assert (said in capsys.readouterr().out) == bool(lost)
    stored = {name: weight.bfloat16() for name, weight in policy.state_dict().items()}
    assert rounded_back(policy, stored, checkpoint_format(policy)) == lost


def test_tied_weights_are_written_once(checkpoint, tmp_path):
    policy, tokenizer = load_policy_and_tokenizer(checkpoint)
    save_model(policy, tokenizer, tmp_path / "out")
    assert ("lm_head.weight" in tensors(tmp_path / "out")) != policy.config.tie_word_embeddings


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_a_checkpoint_without_generation_settings_gets_none(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    save_model(*load_policy_and_tokenizer(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


CHATML = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '' }}{{ m['content'] + '<|assistant|>' }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("kept", [0, [0, 7], None], ids=str)
@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_other_tools_stop_where_the_template_ends_a_turn(checkpoint, fit, tmp_path, kept, capsys):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(checkpoint)
    if kept is None:  # and config.json names one
        (checkpoint / "generation_config.json").unlink()
    else:
        (checkpoint / "generation_config.json").write_text(json.dumps({**GENERATION, "eos_token_id": kept}))
    folder, end = sft(checkpoint, fit, tmp_path), tokenizer.convert_tokens_to_ids("<|assistant|>")
    named = settings_of(folder, "generation_config.json")
    assert named["eos_token_id"] == [*([0] if kept is None else listed(kept)), end]
    if kept is not None:
        assert {**named, "eos_token_id": 0} == {**GENERATION, "eos_token_id": 0}
    assert "generation_config.json names <|assistant|> as an end of answers" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # it says the end of the turn, always
        plain.lm_head.weight = torch.nn.Parameter(torch.zeros_like(plain.lm_head.weight))
        plain.lm_head.bias = torch.nn.Parameter(torch.eye(len(plain.lm_head.weight))[end])
    found = plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
    assert found.tolist() == [[5, 6, 7, end]]
    again = sft(folder, fit, tmp_path / "again")  # and then nothing is added any more
    assert (again / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_a_model_of_a_config_is_exported_as_it_is(tokenizer, tmp_path):
    policy = policy_from_config({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}, tokenizer)
    save_model(policy, tokenizer, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.float32}
    assert settings_of(tmp_path / "out", "generation_config.json")["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.slow
def test_a_real_checkpoint_comes_back(test_checkpoint, fit, tmp_path):
    size = load_policy(test_checkpoint).config.vocab_size
    after = sft(test_checkpoint, fit, tmp_path)
    assert_came_back(test_checkpoint, after)
    policy, tokenizer = load_policy_and_tokenizer(after)
    assert policy.config.vocab_size == size and tokenizer.pad_token_id < size
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
