"""Text for pretraining: the same rows as from memory, and no memory for the whole."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.stages import PretrainDataModule, WorldPretrainDataModule
from lit_rlhf.text import train_bpe, train_characters
from lit_rlhf.text.packing import stream
from lit_rlhf.text.world import World

REPO = Path(__file__).parents[2]
HELD_OUT = 0.2


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def bpe(world):
    return train_bpe(world.corpus(200, 0), 400)


@pytest.fixture
def files(world, tmp_path):
    """Records, a book, and a single record."""
    texts = [world.corpus(n, n) for n in (120, 80, 30)]
    paths = [tmp_path / name for name in ("records.jsonl", "book.txt", "single.jsonl")]
    paths[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[0]), encoding="utf-8")
    paths[1].write_text("\n\n".join(texts[1]), encoding="utf-8")
    paths[2].write_text(json.dumps({"text": "\n".join(texts[2])}) + "\n", encoding="utf-8")
    return list(map(str, paths)), [texts[0], ["\n\n".join(texts[1])], ["\n".join(texts[2])]]


def split(documents):
    """(train, held out), as the text of a source is divided."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - HELD_OUT))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = int(len(documents) * (1 - HELD_OUT))
    return documents[:cut], documents[cut:]


def in_memory(tokenizer, documents):
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return stream(ids, tokenizer.eos_token_id).long()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_those_of_the_text_in_memory(files, bpe, tmp_path, weights, cached):
    paths, sources = files
    cache = tmp_path / "cache" if cached else None
    for _ in range(1 + cached):  # written, and found
        data = PretrainDataModule(paths, bpe, weights=weights, block_size=16, held_out=HELD_OUT, seed=3, cache=cache)
        data.setup()
    parts = [split(documents) for documents in sources]
    train = [in_memory(bpe, documents) for documents, _ in parts]
    held_out = torch.cat([in_memory(bpe, documents) for _, documents in parts])
    assert [s[:].equal(t) for s, t in zip(data.train_streams, train)] == [True] * 3
    assert data.val_stream[:].equal(held_out)
    whole, seen = torch.cat(train), []
    for epoch in range(2):
        order = data._order(epoch)
        batches = list(data.train_dataloader()) if epoch == 0 else []
        for i, batch in enumerate(batches):
            expected = [whole[s : s + 17] for s in order[i * data.batch_size :][: data.batch_size].tolist()]
            assert batch.tokens.equal(torch.stack(expected)) and batch.tokens.dtype == torch.int64
            seen.append(batch)
    assert len(seen) > 20
    rows = torch.cat([batch.tokens for batch in data.val_dataloader()])
    assert rows[:, :-1].flatten().equal(held_out[: rows[:, :-1].numel()])


def test_tokenizing_happens_once_and_a_changed_file_is_read_anew(files, tmp_path, monkeypatch):
    (path, *_), _ = files
    trained = []
    monkeypatch.setattr("lit_rlhf.stages.pretrain.data.train_bpe", counted := counting(train_bpe, trained))

    def tokens():
        data = PretrainDataModule(path, partial(counted, vocab_size=350), block_size=16, cache=tmp_path / "cache")
        data.setup()
        return torch.cat([data.train_streams[0][:], data.val_stream[:]]), data.tokenizer

    (first, made), (second, found) = tokens(), tokens()
    assert first.equal(second) and len(trained) == 1
    assert made.get_vocab() == found.get_vocab() and made.chat_template == found.chat_template
    assert (made.pad_token_id, made.eos_token_id) == (found.pad_token_id, found.eos_token_id)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "Something new."}) + "\n")
    assert len(tokens()[0]) != len(first) and len(trained) == 2


def test_a_name_of_the_text_that_no_record_has_is_said(files, bpe):
    (path, *_), _ = files
    data = PretrainDataModule(path, bpe, block_size=16, fields={"text": "body"})
    data.setup()
    assert data.notes == [f"{path}: no record has the field body of data.fields; its own 'text' is read"]


@pytest.mark.parametrize("again", [False, True])
def test_what_the_tokenizer_cannot_write_is_counted(files, tmp_path, again):
    (path, *_), [texts, *_] = files
    known = "".join(texts).replace("e", "").replace("q", "")
    for _ in range(1 + again):  # from the cache, too
        data = PretrainDataModule(path, train_characters([known]), block_size=16, cache=tmp_path / "cache")
        data.setup()
    lost = sum(text.count("e") + text.count("q") for text in texts)
    [said] = data.notes
    assert said.startswith(f"the tokenizer cannot write {lost} characters of the text") and "<|unk|>" in said


def counting(function, calls):
    def counted(texts, **settings):
        calls.append(1)
        return function(texts, **settings)

    return counted


def test_the_limit_of_the_world_writes_the_first_documents(world, bpe):
    whole, few = (WorldPretrainDataModule(world, bpe, documents=100, limit=n, held_out=0.5) for n in (None, 60))
    whole.setup()
    few.setup()
    assert few.train_streams[0][:].equal(whole.train_streams[0][: len(few.train_streams[0])])


def test_skipped_records_are_known_from_the_cache_too(files, bpe, tmp_path):
    (path, *_), _ = files
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"txt": "misspelt"}\n')
    for _ in range(2):
        data = PretrainDataModule(path, bpe, block_size=16, on_bad_record="skip", cache=tmp_path / "cache")
        data.setup()
        assert len(data.skipped) == 1 and "records.jsonl:121: no field 'text'" in data.skipped[0]
    with pytest.raises(UserError, match=r"records.jsonl:121: no field 'text'"):
        PretrainDataModule(path, bpe, block_size=16, cache=tmp_path / "cache").setup()


def test_tokens_of_the_users_own_are_read_as_they_are(bpe, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(400, dtype=np.uint16) % 300)
    data = PretrainDataModule(str(tmp_path / "tokens.npy"), bpe, block_size=8, held_out=0.25)
    data.setup()
    assert data.train_streams[0][:].tolist() == [i % 300 for i in range(300)]
    assert data.val_stream[:].tolist() == [i % 300 for i in range(300, 400)]
    with pytest.raises(UserError, match=r"tokens.npy: tokens need the tokenizer that made them"):
        PretrainDataModule(str(tmp_path / "tokens.npy"), train_characters).setup()


# A process that may have so much memory of its own beside what it has already (mapped files do not count).
LIMITED = """
import resource, sys
import numpy as np
import lit_rlhf.text.records, lit_rlhf.text.token_file
from lit_rlhf.stages import PretrainDataModule
from lit_rlhf.text import train_characters
from lit_rlhf.text.records import load_records, parse_text

def limit(megabytes):
    now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now * 1024 + megabytes * 2**20,) * 2)

tokenizer = train_characters(["abcdefghijklmnopqrstuvwxyz .\\n"])
tokenizer(["warm up"])
path = sys.argv[1]
"""
READ = """
limit(100)
try:
    np.fromfile(path, "uint16")
except MemoryError:
    print("too large for memory")
data = PretrainDataModule(path, tokenizer, block_size=1024, batch_size=64)
data.setup()
batches = iter(data.train_dataloader())
print(sum(int(next(batches).tokens.sum()) for _ in range(200)))
"""
TOKENIZE = """
lit_rlhf.text.records.files.PIECE = lit_rlhf.text.token_file.BATCH = 2**14
limit(24)
for path in sys.argv[1:]:
    data = PretrainDataModule(path, tokenizer, block_size=128)
    data.setup()
    print(len(data.train_streams[0]) + len(data.val_stream))
"""
IN_MEMORY = """
limit(24)
texts = load_records(path, parse_text).records
print(sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])))
"""


def limited(code, *arguments):
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RUST_BACKTRACE": "0",
    }
    command = [sys.executable, "-c", LIMITED + code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")


@linux
def test_a_file_of_tokens_that_is_larger_than_memory_is_read(tmp_path):
    file = tmp_path / "tokens.bin"
    with file.open("wb") as empty:
        empty.truncate(400 * 2**20)  # bytes; zeros that take no room on the disk
    done = limited(READ, file)
    assert done.stdout == "too large for memory\n0\n", done.stderr


@linux
def test_a_text_that_is_larger_than_memory_is_tokenized(tmp_path):
    line = "the cat sat on the mat and looked at the dog.\n"
    copies = 2**20 // len(line)
    book, records = tmp_path / "book.txt", tmp_path / "records.jsonl"
    book.write_text(line * copies, encoding="utf-8")
    records.write_text((json.dumps({"text": line}) + "\n") * copies, encoding="utf-8")
    size = copies * len(line)  # tokens; and end-of-text of each document
    done = limited(TOKENIZE, book, records)
    assert done.stdout == f"{size + 2}\n{size + copies}\n", done.stderr
    assert limited(IN_MEMORY, records).returncode != 0
