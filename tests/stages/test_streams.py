"""Sources that never end: read a window at a time, every record once in a pass, and resumed to the batch."""

import copy
import json
from collections import Counter
from functools import partial

import pytest
import torch
from lightning import Trainer

from lit_rlhf.errors import UserError
from lit_rlhf.stages import SFTModule, StreamPretrainDataModule, StreamSFTDataModule
from lit_rlhf.text.records import Moved, is_held_out, prompt_fingerprint
from lit_rlhf.text.records.stream import Windows


def asked(i):
    return [{"role": "user", "content": f"Suggest a name for shop number {i}."}]


def text(i):
    return " ".join(f"the shop number {i} of {k} is open." for k in range(5))


@pytest.fixture
def file(tmp_path):
    """60 records."""
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": asked(i), "response": f"Fine {i}.", "text": text(i)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(kind, path, tokenizer, **settings):
    data = kind(path, copy.deepcopy(tokenizer), **{"batch_size": 2, "window": 8, "validation": 4, **settings})
    data.tell = lambda line: None
    data.setup()
    return data


def numbers(data, batch):
    tokens, starts, lengths = batch.packed[0], batch.packed.starts, batch.packed.lengths
    texts = [data.tokenizer.decode(tokens[a : a + n]) for a, n in zip(starts, lengths)]
    return [int(text.rpartition("Fine ")[2].partition(".")[0]) for text in texts]


def test_windows_are_read_as_they_are_asked_for():
    begun = []

    def endless():
        begun.append(0)
        i = 0
        while True:
            begun[-1] += 1
            yield i
            i += 1

    windows = Windows(endless, 3, lambda records: [f"<{i}>" for i in records], "the stream")
    assert windows.window(2) == ["<6>", "<7>", "<8>"] and begun == [9]
    assert windows[(2 << 32) + 1] == "<7>" and len(windows) == 3 and begun[1:] == [3]
    assert windows.window(1) == ["<3>", "<4>", "<5>"] and begun[1:] == [6] and windows.furthest == 2
    ending = Windows(lambda: iter(range(4)), 3, list, "the stream")
    assert [ending.window(n) for n in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    with pytest.raises(UserError, match="the stream: records 4 to 6 leave nothing to train on"):
        Windows(lambda: iter(range(9)), 3, lambda records: [i for i in records if i < 3], "the stream").window(1)


def test_every_dialogue_is_trained_on_once_in_a_pass(file, tokenizer):
    data = made(StreamSFTDataModule, file, tokenizer, held_out=0.2)
    held_out = {i for i in range(60) if is_held_out(asked(i), 0.2, 0)}
    side = [i for i in range(60) if i not in held_out]
    loader = data.train_dataloader()
    seen = [i for epoch in range(len(side) // 8) for batch in loader for i in numbers(data, batch)]
    windows = [seen[i : i + 8] for i in range(0, len(seen), 8)]
    assert list(map(sorted, windows)) == [side[i : i + 8] for i in range(0, len(seen), 8)]
    assert seen != sorted(seen)
    (validation,) = data.val_dataloader()
    assert sorted(numbers(data, validation)) == sorted(held_out)[:4]
    assert {m[0]["content"] for m in data.trained_prompts()} == {asked(i)[0]["content"] for i in side[: len(seen)]}


def test_what_the_run_has_moved_stays_where_it_is(file, tokenizer):
    inside = next(i for i in range(60) if is_held_out(asked(i), 0.2, 0))
    data = StreamSFTDataModule(file, tokenizer, window=50, validation=60, held_out=0.2)
    data.moved = Moved({prompt_fingerprint(asked(0))}, {prompt_fingerprint(asked(inside))})
    train, held_out = data.records()
    sides = [{record.messages[0]["content"] for record in side} for side in (train, held_out)]
    assert asked(0)[0]["content"] in sides[1] - sides[0] and asked(inside)[0]["content"] in sides[0] - sides[1]


@pytest.mark.parametrize("count", [2, 4, 12])
def test_few_prompts_of_a_stream_are_parted_whatever_the_seed(count, file, tokenizer):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:count]))
    with pytest.raises(UserError, match=f"{file} ended, and nothing of it is left to train on"):
        made(StreamPretrainDataModule, file, tokenizer, block_size=12, validation=count)
    for seed in range(12):
        data = made(StreamSFTDataModule, file, tokenizer, split_seed=seed)
        train = {m[0]["content"] for m in data.trained_prompts()}
        held_out = {record.messages[0]["content"] for record in data.val_records}
        assert train and held_out and not train & held_out and len(data.train_dataloader()) > 0
    moved = Moved(trained={prompt_fingerprint(asked(i)) for i in range(1, count)})  # by a stage of an earlier run
    data = StreamSFTDataModule(file, tokenizer, window=8, validation=4, held_out=0.9)
    data.moved = moved
    assert [[m.messages[0] for m in side] for side in data.records()][1] == asked(0)


def test_what_is_made_of_records_is_said_once(file, tokenizer):
    rows = [{"prompt": f"\n\nHuman: What is {i}?\n\nAssistant:", "response": "It."} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = made(StreamSFTDataModule, file, tokenizer)
    for _ in range(12):  # more than all of it
        list(data.train_dataloader())
    [note] = data.notes
    assert note.endswith("and is read as its turns")


def test_a_bad_record_is_named_when_it_is_reached(file, tokenizer):
    with file.open("a") as more:
        more.write("{\n")
    loader = iter(made(StreamSFTDataModule, file, tokenizer).train_dataloader())
    with pytest.raises(UserError, match=rf"{file}:61: not JSON"):
        for _ in range(9):
            loader = made(StreamSFTDataModule, file, tokenizer, window=50).train_dataloader()
            list(loader), list(loader)
    skipping = made(StreamSFTDataModule, file, tokenizer, on_bad_record="skip", window=50)
    loader = skipping.train_dataloader()
    list(loader), list(loader), list(loader)
    assert len(skipping.skipped) == 1  # however often it is read


@pytest.mark.parametrize("kind", [StreamSFTDataModule, partial(StreamPretrainDataModule, block_size=12)])
def test_a_stream_goes_on_where_it_was_stopped(kind, file, tokenizer):
    whole, stopped = (made(kind, file, tokenizer).train_dataloader() for _ in range(2))
    expected = [str(batch) for _ in range(4) for batch in whole]
    torch.set_printoptions(profile="full")
    first = [str(batch) for _, batch in zip(range(3), stopped)]
    second = made(kind, file, tokenizer).train_dataloader()
    second.load_state_dict(stopped.state_dict())
    rest = [str(batch) for _ in range(4) for batch in second]
    assert [*first, *rest][: len(expected)] == expected and len(set(expected)) > len(whole)


def test_rows_of_text_are_those_of_the_documents(file, tokenizer):
    data = made(StreamPretrainDataModule, file, tokenizer, block_size=12)
    ids = [[*tokenizer(text(i), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for i in range(60)]
    loader = data.train_dataloader()
    for n in range(3):
        loader.load_state_dict({"epoch": n, "items": 0, "micro_batches": 0})
        window = [t for i in range(4 + 8 * n, 12 + 8 * n) for t in ids[i]]
        rows = Counter(tuple(row) for batch in loader for row in batch.tokens.tolist())
        count = (len(window) - 1) // 12
        offsets = range(len(window) - 12 * count)
        cuts = [Counter(tuple(window[k + 12 * i :][:13]) for i in range(count)) for k in offsets]
        assert rows.total() == count // 2 * 2 and any(rows <= cut for cut in cuts)
    held_out = torch.cat([batch.tokens for batch in data.val_dataloader()])
    assert held_out[0].tolist() == [t for i in range(4) for t in ids[i]][:13]
    with pytest.raises(UserError, match=r"the first 1 documents, which are held out: .* less than one row of 500"):
        made(StreamPretrainDataModule, file, tokenizer, block_size=500, validation=1)


def test_sft_trains_on_a_stream(file, tokenizer, policy, tmp_path):
    data = made(StreamSFTDataModule, file, tokenizer)
    before = copy.deepcopy(policy.state_dict())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=9, accelerator="cpu", **quiet)
    trainer.fit(SFTModule(policy, data.tokenizer), datamodule=data)
    assert trainer.global_step == 9 and data.train_set.furthest >= 2
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
