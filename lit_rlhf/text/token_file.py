"""Tokens on disk: a text is tokenized once, in pieces, and read where it lies; neither needs memory for the whole."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import tokenizers
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.files import disk
from lit_rlhf.text.special_tokens import SpecialTokens, cuts_anywhere, encode_texts, text_start, unknown_token

BATCH = 2**20  # characters that are tokenized at a time
GIVEN = (".npy", ".bin")  # files of tokens that users may bring
Document = Iterable[str]  # its text, in one piece or several


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` of a file."""

    path: Path
    dtype: str  # as numpy writes it
    offset: int  # bytes before token 0
    start: int
    stop: int


class Tokens:
    """The tokens of spans, one after the other; what is read of them, and no more, is in memory.

    Files are opened when they are first read: a copy in another process opens its own."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = list(spans)
        self._ends = list(accumulate(span.stop - span.start for span in self.spans))
        self._arrays: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, part: slice) -> Tensor:
        """(n,) int64"""
        start, stop, step = part.indices(len(self))
        return torch.from_numpy(self._read(start, max(start, stop))[::step].astype(np.int64))

    def rows(self, starts: Sequence[int], length: int) -> Tensor:
        """(B, length) int64: the tokens that follow each of B places."""
        return torch.from_numpy(np.stack([self._read(int(i), int(i) + length) for i in starts]).astype(np.int64))

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        number = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[number - 1] if number else 0
            parts.append(self._array(number)[start - begin : stop - begin])
            start += len(parts[-1])
            number += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _array(self, number: int) -> np.ndarray:
        if number not in self._arrays:
            path, dtype, offset, start, stop = self.spans[number]
            file = np.memmap(path, dtype, mode="r", offset=offset, shape=(stop,))
            self._arrays[number] = np.asarray(file)[start:]  # slices of a memmap object are slow
        return self._arrays[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # pickled, a memory map is a copy of the whole file


class Stored(NamedTuple):
    """A tokenized source: a document follows the other, each as a text begins and with end-of-text behind it."""

    train: Span
    held_out: Span
    skipped: list[str]  # a line for each record that was invalid
    unknown: int = 0  # tokens that stand for characters that the tokenizer cannot write


def given_tokens(path: Path, held_out: float, vocabulary: int) -> Stored:
    """A file of tokens that the user has made: .npy (one dimension of whole numbers), or .bin (uint16; of vocabularies
    above 65,536, uint32). The end of it, ``held_out`` of all, is held out."""
    kind, offset = np.dtype(_dtype(vocabulary)), 0
    try:
        count = path.stat().st_size // kind.itemsize
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            kind, offset, count = array.dtype, array.offset, array.size
            if array.ndim != 1 or kind.kind not in "iu":
                raise ValueError(f"it holds {array.ndim} dimensions of {kind}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a file of tokens ({error}); one dimension of whole numbers is expected") from None
    cut = int(count * (1 - held_out))
    train, rest = (Span(path, kind.str, offset, *part) for part in ((0, cut), (cut, count)))
    first = Tokens([train])[: 2**20]
    if len(first) and not 0 <= first.min() <= first.max() < vocabulary:
        raise UserError(
            f"{path}: holds token {int(first.max())}, and the tokenizer has {vocabulary}; it was made by another "
            "tokenizer, or does not hold numbers of that size (.bin: uint16, of vocabularies above 65,536 uint32)"
        )
    return Stored(train, rest, [])


def stored(
    documents: Callable[[list[str]], Iterator[Document]],
    identity: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    cache: Path,
    special_tokens: SpecialTokens = "plain",
) -> Stored:
    """A source as tokens: what ``cache`` has, or written there now.

    Args:
        documents: gives them anew, and notes down a line for each record that it skips.
        identity: plain values that change when the documents would.
        tokenizer: the tokens' own.
        held_out: fraction of the documents, or of a single one's characters, that is held out: the last ones.
        cache: its folder; of several processes one writes, and the others wait.
        special_tokens: what their names mean in the text.
    """
    key = {
        "source": identity, "tokenizer": tokenizer_digest(tokenizer), "start": text_start(tokenizer),
        "end": tokenizer.eos_token_id, "special_tokens": special_tokens, "held_out": held_out,
    }  # fmt: skip
    folder = kept(
        cache, "tokens", key,
        lambda folder: _write(documents, tokenizer, held_out, special_tokens, folder), _is_whole,
    )  # fmt: skip
    note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
    file, cut, count = folder / "tokens.bin", note["cut"], note["tokens"]
    train, rest = (Span(file, note["dtype"], 0, *part) for part in ((0, cut), (cut, count)))
    return Stored(train, rest, note["skipped"], note["unknown"])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest that tells a tokenizer from others that make other tokens of a text."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        made_by = tokenizer.backend_tokenizer.to_str()
    else:
        made_by = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(made_by.encode()).hexdigest()


@cache
def code_digest(*made_in: Any) -> str:
    """Digest of this version of ``lit_rlhf.text``, and of the modules of some classes or functions."""
    try:
        files = sorted(Path(__file__).parent.rglob("*.py")) + [Path(inspect.getfile(each)) for each in made_in]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    except (TypeError, OSError):  # written in a notebook: nobody knows whether it is the same the next time
        return uuid4().hex


def kept(
    cache: Path, what: str, key: dict[str, Any], write: Callable[[Path], None], is_whole: Callable[[Path], bool]
) -> Path:
    """The folder ``<cache>/<what>-<fingerprint of key>`` with what ``write(folder)`` leaves there, written once.

    It gets its name when all is written, and is written anew where it is not whole. Of several processes one writes."""
    key = {**key, "tokenizers": tokenizers.__version__}
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / f"{what}-{mark}"
    if is_whole(folder):
        return folder
    with disk(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_whole(folder):  # another process may have been faster
                unfinished = cache / f"{folder.name}.tmp"
                for old in (folder, unfinished):
                    shutil.rmtree(old, ignore_errors=True)
                unfinished.mkdir()
                write(unfinished)
                unfinished.replace(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        size = note["tokens"] * np.dtype(note["dtype"]).itemsize
        return "unknown" in note and (folder / "tokens.bin").stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    documents: Callable[[list[str]], Iterator[Document]],
    tokenizer: PreTrainedTokenizerBase,
    held_out: float,
    special_tokens: SpecialTokens,
    to: Path,
) -> None:
    skipped: list[str] = []
    found = documents(skipped)
    first, second = next(found), next(found, None)
    if second is None:
        size = sum(map(len, first))
        found = _parted(next(documents([])), int(size * (1 - held_out)))
    else:
        found = chain([first, second], found)
    dtype, count, start, begins = _dtype(len(tokenizer)), 0, text_start(tokenizer), True
    cannot_write, unknown = unknown_token(tokenizer), 0
    # Where a text has other tokens behind another one, a document's further pieces are read behind a line break.
    before = "" if cuts_anywhere(tokenizer) else "\n"
    [break_ids] = encode_texts(tokenizer, [before])
    with (to / "tokens.bin").open("wb") as tokens, (to / "ends.bin").open("w+b") as ends:
        for texts, stops in _batches(found, before):
            numbers: list[int] = []
            for i, ids in enumerate([[], *_encode(tokenizer, texts, special_tokens)]):
                if i:
                    behind = len(break_ids) if not begins and ids[: len(break_ids)] == break_ids else 0
                    numbers += [*start, *ids] if begins else ids[behind:]
                    begins = False
                if i in stops:
                    begins = True
                    numbers.append(tokenizer.eos_token_id)
                    ends.write(np.int64(count + len(numbers)).tobytes())
            tokens.write(np.array(numbers, dtype).tobytes())
            count += len(numbers)
            unknown += 0 if cannot_write is None else numbers.count(cannot_write)
        total = ends.tell() // 8
        cut = 1 if second is None else min(total - 1, int(total * (1 - held_out)))  # documents
        ends.seek(8 * max(0, cut - 1))
        cut = int(np.frombuffer(ends.read(8), np.int64)[0]) if cut else 0  # tokens
    (to / "ends.bin").unlink()
    note = {"dtype": np.dtype(dtype).str, "tokens": count, "unknown": unknown, "cut": cut, "skipped": skipped}
    (to / "note.json").write_text(json.dumps(note), encoding="utf-8")


def _parted(document: Document, at: int) -> Iterator[Document]:
    """A document's first ``at`` characters, and the others; to be read in this order."""
    pieces, rest = iter(document), []

    def head() -> Iterator[str]:
        left = at
        for piece in pieces:
            yield piece[:left]
            if len(piece) > left:
                rest.append(piece[left:])
                return
            left -= len(piece)

    yield head()
    yield chain(rest, pieces)


def _batches(documents: Iterator[Document], before: str) -> Iterator[tuple[list[str], set[int]]]:
    """(texts, after how many of them documents end), of ``BATCH`` characters or a little more; ``before`` stands in
    front of a document's pieces but the first."""
    texts: list[str] = []
    stops: set[int] = set()
    size = 0
    for document in documents:
        for place, piece in enumerate(document):
            texts.append(before + piece if place else piece)
            size += len(piece)
            if size >= BATCH:
                yield texts, stops
                texts, stops, size = [], set(), 0
        stops.add(len(texts))
    yield texts, stops


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: SpecialTokens) -> list[list[int]]:
    if not tokenizer.is_fast or special_tokens == "refuse":
        return encode_texts(tokenizer, texts, special_tokens)
    tokenizer.backend_tokenizer.encode_special_tokens = special_tokens == "plain"  # each call of a tokenizer sets it
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # without offsets
    return [encoding.ids for encoding in encodings]


def _dtype(vocabulary: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32
