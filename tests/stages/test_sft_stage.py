import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.stages import SFTDataModule, SFTModule, WorldSFTDataModule
from lit_rlhf.text.records import Demonstration, write_jsonl


def data_module(world, tokenizer, **settings):
    return WorldSFTDataModule(world, tokenizer, **{"demonstrations": 64, "batch_size": 8, **settings})


def test_loss_is_the_mean_over_response_tokens(world, tokenizer, policy):
    data = data_module(world, tokenizer)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    logprobs = []
    for item in [data.train_set[i] for i in data.train_dataloader().order(0)[:8]]:
        logits = policy(torch.tensor([item.tokens])).logits[0].log_softmax(-1)
        logprobs += [logits[t - 1, item.tokens[t]] for t in range(1, len(item.tokens)) if item.mask[t]]
    assert_close(SFTModule(policy, tokenizer).losses(batch)[0], -torch.stack(logprobs).mean())


def test_end_of_text_is_learned(world, tokenizer):
    data = data_module(world, tokenizer)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    learned = batch.packed.tokens[batch.learned]
    assert (learned == tokenizer.eos_token_id).sum() == 8
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (learned != tokenizer.pad_token_id).all()


@pytest.mark.parametrize("packing", [True, False])
def test_packing_changes_no_loss(world, tokenizer, policy, packing):
    data = data_module(world, tokenizer, packing=packing)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert [block.rows for block in batch.packed.blocks] == [8] or packing
    assert_close(SFTModule(policy, tokenizer).losses(batch)[0].item(), 7.2, atol=1.5, rtol=0)
    reference = data_module(world, tokenizer, packing=not packing)
    reference.setup()
    other = SFTModule(policy, tokenizer).losses(next(iter(reference.train_dataloader())))[0]
    assert_close(SFTModule(policy, tokenizer).losses(batch)[0], other)


def test_accumulated_micro_batches_equal_a_full_batch(world, tokenizer, policy, optimizer, fit):
    one, two = (SFTModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer) for _ in range(2))
    fit(one, data_module(world, tokenizer, batch_size=8), max_steps=3)
    fit(two, data_module(world, tokenizer, batch_size=2), max_steps=3, accumulate_grad_batches=4)
    for a, b in zip(one.parameters(), two.parameters()):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_alpaca_fields_and_several_turns(tmp_path, tokenizer, policy):
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["a?", "b", "c?", "d"])]
    rows = [{"instruction": f"Do {i}.", "input": "x" * (i % 2), "output": "done"} for i in range(40)]
    write_jsonl(tmp_path / "d.jsonl", [*rows, *({"messages": turns} for _ in range(3))])
    data = SFTDataModule(tmp_path / "d.jsonl", tokenizer, held_out=0.2)
    data.setup()
    items = {tokenizer.decode(i.tokens): i for i in [*data.train_set, *data.val_set]}
    dialogue = next(i for text, i in items.items() if "a?" in text)
    learned = tokenizer.decode([t for t, m in zip(dialogue.tokens, dialogue.mask) if m])
    assert learned.replace(" ", "") == "b<|endoftext|>d<|endoftext|>"


def test_long_dialogues_are_counted_and_skipped_or_cut(tmp_path, tokenizer):
    rows = [{"prompt": f"Question {i}?", "response": "word " * (100 if i < 3 else 2)} for i in range(40)]
    write_jsonl(tmp_path / "d.jsonl", rows)
    for on_long, kept in (("skip", 37), ("cut", 40)):
        data = SFTDataModule(tmp_path / "d.jsonl", tokenizer, max_length=64, on_long=on_long)
        data.setup()
        assert (data.long, len(data.train_set) + len(data.val_set)) == (3, kept)
        assert max(len(i.tokens) for i in data.train_set) <= 64


def test_too_few_records_is_said(tmp_path, tokenizer):
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"d.jsonl: there is one distinct prompt"):
        SFTDataModule(tmp_path / "d.jsonl", tokenizer).setup()


def test_exported_folder_chats_with_plain_transformers(tmp_path, world, tokenizer, policy):
    SFTModule(policy, tokenizer).export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "What colour is the mog?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= prompt["input_ids"].shape[1] + 3
    assert loaded.decode(prompt["input_ids"][0]) == "<|user|> What colour is the mog?<|assistant|>"
    assert_close(model(prompt["input_ids"]).logits, policy.eval()(prompt["input_ids"]).logits)


def parse_faq(row) -> Demonstration:
    """``faq``: a question and its answer."""
    question, answer = row["faq"]
    return Demonstration([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], 1)


class FAQ(SFTDataModule):
    parse_record = staticmethod(parse_faq)


@pytest.mark.parametrize("cached", [False, True])
def test_a_form_of_a_record_of_ones_own(tokenizer, tmp_path, cached):
    rows = [{"faq": [f"What is {i} + 1?", str(i + 1)], "source": "mine"} for i in range(60)]
    write_jsonl(tmp_path / "faq.jsonl", rows)
    data = FAQ(tmp_path / "faq.jsonl", tokenizer, cache=tmp_path / "cache" if cached else None)
    data.setup()
    assert len(data.train_set) + len(data.val_set) == 60
    assert tokenizer.decode(data.train_set[0].tokens).count("What is") == 1
    assert len(data.notes) == 1 and data.notes[0].endswith("nobody reads the field source")
