"""Records that are longer than the model's context: cut or left out as ``on_long`` says, counted, in every stage."""

import copy

import pytest
import torch
from lightning import seed_everything

from lit_rlhf.errors import UserError
from lit_rlhf.models import policy_from_config
from lit_rlhf.rollouts import Sampling, sample
from lit_rlhf.stages import (
    ClassifyDataModule,
    ClassifyModule,
    DPODataModule,
    DPOModule,
    EvaluateDataModule,
    EvaluateModule,
    PPODataModule,
    PPOModule,
    PreferenceDataModule,
    PreferenceModule,
    PretrainDataModule,
    PretrainModule,
    RewardDataModule,
    RewardModule,
    SFTDataModule,
    SFTModule,
)
from lit_rlhf.text.records import write_jsonl

CONTEXT = 64
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture
def gpt2(tokenizer):
    """A model that cannot read on behind its context: it has no positions there."""
    seed_everything(0, verbose=False)
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}
    return policy_from_config(config, tokenizer)


@pytest.fixture
def long(tmp_path):
    """40 records, of which every fourth is far longer than the context."""
    rows = []
    for i in range(40):
        text = f"What is {i}? " + "and so on " * (40 if i % 4 == 0 else 1)
        answers = {"response": "It is a number.", "chosen": "It is a number.", "rejected": "No."}
        rows.append({"prompt": text, "text": text, "label": f"l{i % 2}", **answers})
    write_jsonl(tmp_path / "long.jsonl", rows)
    return tmp_path / "long.jsonl"


def stages(policy, reward_model, tokenizer):
    """name -> (data module, module, trainer method)"""
    copied = lambda: copy.deepcopy(policy)  # noqa: E731
    return {
        "sft": (SFTDataModule, lambda: SFTModule(copied(), tokenizer), "fit"),
        "reward": (RewardDataModule, lambda: RewardModule(copy.deepcopy(reward_model), tokenizer), "fit"),
        "dpo": (DPODataModule, lambda: DPOModule(copied(), tokenizer), "fit"),
        "classify": (ClassifyDataModule, lambda: ClassifyModule(copied(), tokenizer, labels=["l0", "l1"]), "fit"),
        "ppo": (
            PPODataModule,
            lambda: PPOModule(copied(), copy.deepcopy(reward_model), tokenizer, sampling=SHORT, minibatch_size=4),
            "fit",
        ),
        "preference": (
            PreferenceDataModule, lambda: PreferenceModule(copied(), tokenizer, None, sampling=SHORT), "predict",
        ),
        "evaluate": (
            EvaluateDataModule,
            lambda: EvaluateModule(
                {"sft": (copied(), tokenizer)}, copy.deepcopy(reward_model), sampling=SHORT
            ),
            "test",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "classify", "ppo", "preference", "evaluate"])
@pytest.mark.parametrize("on_long", ["skip", "cut"])
def test_what_does_not_fit_is_cut_or_left_out_and_said(
    name, on_long, gpt2, reward_model_of, tokenizer, long, tmp_path, make_trainer
):
    kind, make, method = stages(gpt2, reward_model_of(gpt2), tokenizer)[name]
    data = kind(long, tokenizer, batch_size=4, max_length=512, on_long=on_long, held_out=0.3)
    data.setup()
    module = make()
    if name == "classify":
        module.policy.resize_token_embeddings(len(data.tokenizer))
    trainer = make_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    settings = {"return_predictions": False} if method == "predict" else {"verbose": False} if method == "test" else {}
    getattr(trainer, method)(module, datamodule=data, **settings)
    room = CONTEXT - (6 if name in ("ppo", "preference", "evaluate") else 0)
    assert data.longest() <= room
    said = [note for note in data.notes if "context" in note]
    assert len(said) == 1 and f"room for {room} tokens, not max_length=512" in said[0]
    counted_before = any("max_length=512 tokens" in note for note in data.notes)
    assert not counted_before and f": {data.long} records were longer (on_long={on_long}" in said[0]
    assert data.long >= 10 or (name == "evaluate" and data.long)
    read, long_ones = (40, 10) if name != "evaluate" else (len(data._held_out), data.long)
    # Of a prompt without its answer nothing can be learned.
    assert sum(data.sizes().values()) == (read if on_long == "cut" and name != "sft" else read - long_ones)
    assert ("nothing to learn from in 10 of them" in said[0]) == (name == "sft" and on_long == "cut")


@pytest.mark.parametrize("new_tokens", [40, CONTEXT, 200])
@pytest.mark.parametrize("name", ["sft", "dpo", "pretrain"])
def test_samples_while_training_fit_into_the_context(name, new_tokens, gpt2, tokenizer, long, make_trainer):
    kind, make = {"sft": (SFTDataModule, SFTModule), "dpo": (DPODataModule, DPOModule)}.get(name, (None, None))
    if name == "pretrain":
        data = PretrainDataModule(str(long), tokenizer, block_size=16, batch_size=4, on_bad_record="skip")
        prompt = "What is it? " * 30
        data.setup()
        settings = {"sampling": Sampling(max_new_tokens=new_tokens), "sample_prompt": prompt}
        module = PretrainModule(gpt2, **data.for_module(), **settings)
    else:
        data = kind(long, tokenizer, batch_size=4, max_length=512, on_long="cut", held_out=0.5)
        data.setup()
        module = make(gpt2, **data.for_module(), sampling=Sampling(max_new_tokens=new_tokens))
    make_trainer(max_steps=1, limit_train_batches=1, limit_val_batches=1).fit(module, datamodule=data)
    samples = module.write_samples()
    assert len(samples) == (2 if name == "pretrain" else 4)
    assert all(len(tokenizer(text)["input_ids"]) < CONTEXT for _, text in samples)
    said = [note for note in data.notes if note.startswith("samples while training: the model's context of 64")]
    assert len(said) == 1


def test_samples_are_asked_as_their_records_say(gpt2, tokenizer, tmp_path, make_trainer, monkeypatch):
    """With the tools of the record, special tokens as set, and without what the template refuses."""
    from lit_rlhf.stages import prompts

    seen = []
    monkeypatch.setattr(
        prompts, "sample", lambda e, p, t, tokens, *rest: seen.extend(tokens) or sample(e, p, t, tokens, *rest)
    )
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name + ' ' }}{% endfor %}{% for m in messages %}"
        "{% if 'no!' in m.content %}{{ raise_exception('no') }}{% endif %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"prompt": f"What is {i}?", "response": "It is.", "tools": [{"name": "add"}]} for i in range(8)]
    rows += [{"prompt": f"no! {i}", "response": "It is."} for i in range(8)]
    for kind, make in ((SFTDataModule, SFTModule), (DPODataModule, DPOModule)):
        write_jsonl(tmp_path / "r.jsonl", [{**r, "chosen": r["response"], "rejected": "No."} for r in rows])
        data = kind(tmp_path / "r.jsonl", tokenizer, batch_size=4, held_out=0.5, on_bad_record="skip")
        data.setup()
        module = make(copy.deepcopy(gpt2), **data.for_module(), sampling=SHORT)
        make_trainer(max_steps=1, limit_train_batches=1, limit_val_batches=1).fit(module, datamodule=data)
        seen.clear()
        samples = module.write_samples()
        assert 0 < len(samples) < 4 and len(seen) == len(samples)
        for (prompt, _), tokens in zip(samples, seen):
            assert tokenizer.decode(tokens) == f"add <|user|>{prompt}<|assistant|>"


def test_an_answer_that_leaves_no_room_is_refused(gpt2, tokenizer, long, make_trainer):
    data = PreferenceDataModule(long, tokenizer, on_long="cut")
    data.setup()
    module = PreferenceModule(gpt2, tokenizer, None, sampling=Sampling(max_new_tokens=CONTEXT))
    with pytest.raises(UserError, match=r"64 new tokens \(sampling.max_new_tokens\) leave no room for a prompt in the"):
        make_trainer().predict(module, datamodule=data, return_predictions=False)


def test_rows_longer_than_the_context_are_refused(gpt2, tokenizer, tmp_path, make_trainer):
    (tmp_path / "book.txt").write_text("and so on, said the cat. " * 400, encoding="utf-8")
    data = PretrainDataModule(str(tmp_path / "book.txt"), tokenizer, block_size=CONTEXT + 1, batch_size=2)
    with pytest.raises(UserError, match=r"pretrain.data.block_size=65 is more than the model's context of 64 tokens"):
        make_trainer(max_steps=1).fit(PretrainModule(gpt2, tokenizer), datamodule=data)


@pytest.fixture
def make_trainer(tmp_path):
    from lit_rlhf.training import make_trainer

    def make(**settings):
        return make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, **settings
        )

    torch.manual_seed(0)
    return make


def test_what_was_too_long_before_is_not_counted_once_more(long, tokenizer):
    data = DPODataModule(long, tokenizer, batch_size=4, max_length=CONTEXT + 8, held_out=0.3)
    data.setup()
    before = data.long
    data.fit_context(CONTEXT)
    [said] = [note for note in data.notes if "context" in note]
    assert said.endswith(f"room for {CONTEXT} tokens, not max_length={CONTEXT + 8}: the same records are longer")
    assert data.long == before >= 10


@pytest.mark.parametrize(("on_long", "way"), [("cut", "give shorter ones"), ("skip", "set on_long=cut")])
def test_where_a_context_has_no_room_nobody_is_told_to_raise_a_length(on_long, way, long, tokenizer):
    data = SFTDataModule(long, tokenizer, batch_size=4, max_length=CONTEXT, on_long=on_long, held_out=0.3)
    data.setup()
    with pytest.raises(UserError, match=rf"none is left to train on; {way}$"):
        data.fit_context(3)
