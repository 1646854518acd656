import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.text import token_file, train_bpe, train_characters
from lit_rlhf.text.packing import stream
from lit_rlhf.text.records.files import PIECE, read_pieces
from lit_rlhf.text.token_file import Span, Tokens, given_tokens, kept, stored
from lit_rlhf.text.world import World


@pytest.fixture(scope="module")
def texts():
    return World(0).corpus(300, 0)


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe(texts, 500)


def span(path, values, dtype="uint16"):
    np.array(values, dtype).tofile(path)
    return Span(path, dtype, 0, 0, len(values))


def in_memory(tokenizer, documents):
    """The stream of all documents, the plain way."""
    return stream([tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents], tokenizer.eos_token_id)


def test_spans_are_read_as_one_row_of_tokens(tmp_path):
    first, second = span(tmp_path / "a", range(10)), span(tmp_path / "b", range(100, 105), "uint32")
    tokens = Tokens([first._replace(start=2, stop=5), second, first._replace(start=9)])
    whole = [2, 3, 4, 100, 101, 102, 103, 104, 9]
    assert len(tokens) == 9 and tokens[:].tolist() == whole and tokens[:].dtype == torch.int64
    for start in range(10):
        for stop in range(start, 10):
            assert tokens[start:stop].tolist() == whole[start:stop]
    assert tokens.rows([0, 2, 5], 4).tolist() == [whole[0:4], whole[2:6], whole[5:9]]
    assert len(Tokens([])) == 0 and Tokens([])[:].tolist() == []


def test_pickled_tokens_are_as_small_as_their_path(tmp_path):
    tokens = Tokens([span(tmp_path / "a", range(60000))])
    tokens[:5]
    copy = pickle.dumps(tokens)
    assert len(copy) < 1000 and pickle.loads(copy)[59998:].tolist() == [59998, 59999]


@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_what_is_stored_is_what_is_tokenized_in_memory(tmp_path, texts, bpe, held_out, monkeypatch):
    monkeypatch.setattr(token_file, "BATCH", 700)  # many batches, some of them within a document
    train, rest, skipped, _ = stored(lambda skipped: ((text,) for text in texts), "a", bpe, held_out, tmp_path)
    cut = int(len(texts) * (1 - held_out))
    assert Tokens([train])[:].equal(in_memory(bpe, texts[:cut]).long())
    assert Tokens([rest])[:].equal(in_memory(bpe, texts[cut:]).long())
    assert skipped == []


def test_a_single_document_is_split_by_its_characters(tmp_path, texts, bpe):
    book = "\n\n".join(texts)
    train, rest, *_ = stored(lambda skipped: iter([(book,)]), "a", bpe, 0.3, tmp_path)
    cut = int(len(book) * 0.7)
    assert Tokens([train])[:].equal(in_memory(bpe, [book[:cut]]).long())
    assert Tokens([rest])[:].equal(in_memory(bpe, [book[cut:]]).long())


@pytest.mark.parametrize("kind", ["bpe", "characters", "sentencepiece"])
def test_pieces_of_a_long_text_are_tokenized_as_the_whole(tmp_path, texts, bpe, sentencepiece, kind, monkeypatch):
    monkeypatch.setattr("lit_rlhf.text.records.files.PIECE", 500)
    text = "\ufeff" + "\n\n".join(texts) + "\r\nÄ line…  \n\n  with spaces\t. 5 years, 12\n3 " + "x" * 2000 + "\n"
    file = tmp_path / "book.txt"
    file.write_text(text, encoding="utf-8", newline="")
    pieces = list(read_pieces(file))
    assert "".join(pieces) == text[1:] and len(pieces) > 40 and max(map(len, pieces)) < 3100
    tokenizer = {"bpe": bpe, "characters": train_characters(pieces), "sentencepiece": sentencepiece}[kind]
    train, rest, *_ = stored(lambda skipped: iter([read_pieces(file)]), kind, tokenizer, 0.25, tmp_path)
    cut = int((len(text) - 1) * 0.75)
    assert Tokens([train])[:].equal(in_memory(tokenizer, [text[1:][:cut]]).long())
    assert Tokens([rest])[:].equal(in_memory(tokenizer, [text[1:][cut:]]).long())


def test_a_byte_that_is_no_unicode_is_named_with_its_line(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(b"good line\n" * (PIECE // 5) + b"bad \xff line")
    with pytest.raises(UserError, match=rf"book.txt:{PIECE // 5 + 1}: not UTF-8 \(byte 0xff\)"):
        list(read_pieces(file))
    file.write_bytes(b"cut off \xc3")
    with pytest.raises(UserError, match=r"book.txt:1: not UTF-8"):
        list(read_pieces(file))
    file.write_bytes(b" \n ")
    with pytest.raises(UserError, match="it is empty"):
        list(read_pieces(file))


def test_text_is_tokenized_once(tmp_path, texts, bpe):
    asked = []

    def documents(skipped):
        asked.append(1)
        return ((text,) for text in texts)

    once = stored(documents, ["file", 1], bpe, 0.1, tmp_path)
    assert stored(documents, ["file", 1], bpe, 0.1, tmp_path) == once and len(asked) == 1
    for changed in (
        {"identity": ["file", 2]}, {"held_out": 0.2}, {"tokenizer": train_bpe(texts, 400)},
    ):  # fmt: skip
        before = len(asked)
        stored(documents, **{"identity": ["file", 1], "tokenizer": bpe, "held_out": 0.1, "cache": tmp_path, **changed})
        assert len(asked) == before + 1


def test_what_was_not_finished_or_is_broken_is_made_anew(tmp_path, texts, bpe):
    def killed(skipped):
        yield (texts[0],)
        yield (texts[1],)
        raise KeyboardInterrupt

    def documents(skipped):
        return ((text,) for text in texts)

    with pytest.raises(KeyboardInterrupt):
        stored(killed, "a", bpe, 0.1, tmp_path)
    assert [f.name.endswith(".tmp") for f in tmp_path.iterdir() if f.is_dir()] == [True]
    good = stored(documents, "a", bpe, 0.1, tmp_path)
    expected = Tokens([good.train])[:]
    assert not list(tmp_path.glob("*.tmp"))
    folder = good.train.path.parent
    for harm in (
        lambda: good.train.path.write_bytes(good.train.path.read_bytes()[:-2]),
        lambda: (folder / "note.json").write_text('{"dtype": "<u2"'),
        lambda: (folder / "note.json").unlink(),
        good.train.path.unlink,
    ):
        harm()
        assert stored(documents, "a", bpe, 0.1, tmp_path) == good
        assert Tokens([good.train])[:].equal(expected)


def test_of_several_processes_one_writes(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, written = Barrier(4), []

    def write(folder):
        written.append(folder)
        (folder / "note").touch()

    def ask(_):
        barrier.wait()
        return kept(tmp_path, "thing", {"key": 1}, write, lambda folder: (folder / "note").exists())

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert len(written) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin"])
def test_tokens_of_the_users_own(tmp_path, name):
    file = tmp_path / name
    values = np.arange(1000, dtype="uint16" if name.endswith("bin") else "int32")
    values.tofile(file) if name.endswith("bin") else np.save(file, values)
    train, rest, *_ = given_tokens(file, 0.2, 1000)
    assert Tokens([train])[:].tolist() == list(range(800)) and Tokens([rest])[:].tolist() == list(range(800, 1000))
    with pytest.raises(UserError, match="holds token 799, and the tokenizer has 500"):
        given_tokens(file, 0.2, 500)


def test_a_file_that_holds_no_tokens(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 3)))
    (tmp_path / "b.npy").write_text("text")
    for file in ("a.npy", "b.npy", "c.bin"):
        with pytest.raises(UserError, match=f"{file}: not a file of tokens"):
            given_tokens(Path(tmp_path, file), 0.1, 1000)
