"""Tokenizers: trained on the user's text, or loaded. All are Hugging Face's, and all are lossless."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_rlhf.errors import UserError, first_line, say, say_hub
from lit_rlhf.text.model_folder import base_of_adapter, check_regular_files, is_adapter, model_settings

TokenizerTrainer = Callable[[Iterable[str]], PreTrainedTokenizerBase]

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TEMPLATE = "chat_template.jinja"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Words with the space before them, then each digit alone (also with its space): "12" is always "1", "2", so that
# sums are spelled alike wherever they stand. Nothing is dropped, so decoding gives the text back.
WORD_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocab_size: Annotated[int, Field(ge=264)] = 1024) -> PreTrainedTokenizerBase:
    """Byte-level BPE (GPT-2, section 2.2) learned from ``texts``; any string can be written with it.

    ``vocab_size`` counts the 256 bytes, the special tokens and the merges; a small text may yield fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def train_characters(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """One token per character of ``texts``. Any other becomes ``<|unk|>``."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, PAD, *ROLES, "<|unk|>", *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token="<|unk|>")


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        **special,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder (or, with a network, of a Hub name) and give it a padding token.

    Padding must be no token that ends or begins a text, else that is never learned and pooling finds the wrong token:
    see :func:`spare_token`. An adapter without a tokenizer has its base's. Raises ``UserError`` for a chat
    template that drops what is said."""
    tokenizer, path = _read(path)
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no end-of-text token (eos_token); set one in tokenizer_config.json")
    rows, used = _of_model(base_of_adapter(path) if is_adapter(path) else path)
    used |= {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token is None or tokenizer.pad_token_id in used | _of_template(tokenizer):
        tokenizer.add_special_tokens({"pad_token": spare_token(tokenizer, used, rows)})
    check_template(tokenizer, path)
    return tokenizer


def load_reader(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that writes nothing, as it was saved, with a padding token where it has none.

    Errors are those of :func:`load_tokenizer`; it may know no end of a text."""
    tokenizer, path = _read(path)
    if tokenizer.pad_token is None:
        rows, used = _of_model(path)
        used |= {i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
        tokenizer.add_special_tokens({"pad_token": spare_token(tokenizer, used, rows)})
    check_template(tokenizer, path)
    return tokenizer


def _read(path: str | Path) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer as it was saved, without lengths to cut or fill to, and the folder or name that it is from."""
    path = str(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of_adapter(path)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{path}: no such folder, where a tokenizer was expected")
    if not Path(path).exists():
        say_hub(path)
    check_regular_files(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever libraries raise of files that hold something else
        _check_files(Path(path))
        raise UserError(
            f"{path}: no tokenizer could be loaded from there ({first_line(error)}). Give a folder that holds one "
            "(tokenizer.json, or vocab.json and merges.txt), or a Hub name where there is a network."
        ) from error
    _drop_lengths(tokenizer, path)
    return tokenizer, path


def _drop_lengths(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Drop a length that a tokenizer.json cuts or fills each text to by itself: here stages cut, and say so."""
    inner = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if inner is not None and (inner.truncation or inner.padding):
        inner.no_truncation()
        inner.no_padding()
        say(f"{path}: its tokenizer.json cuts or pads texts by itself ('truncation', 'padding'); that is left out here")


def _check_files(folder: Path) -> None:
    """Raise ``UserError`` with the name of the file for which a folder has no tokenizer, where it is a damaged one."""
    for name in ("config", "tokenizer_config", "tokenizer", "special_tokens_map", "added_tokens", "vocab"):
        model_settings(folder, f"{name}.json")
    readers: dict[str, Callable[[Path], Any]] = {
        "tokenizer.json": lambda file: Tokenizer.from_file(str(file)),
        TEMPLATE: Path.read_text,
    }
    for name, read in readers.items():
        try:
            if (folder / name).is_file():
                read(folder / name)
        except Exception as error:  # tokenizers raises no kind of its own
            raise UserError(f"{folder / name}: cannot be read ({first_line(error)}); copy it again") from None


def _of_model(path: str) -> tuple[int | None, set[int]]:
    """What the model's settings in ``path`` say: (rows of the embedding, tokens that end or begin a text).

    None and nothing where there is a tokenizer alone."""
    for name in ("config.json", "generation_config.json"):
        model_settings(path, name)  # which says what is damaged
    try:
        config, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        return None, set()
    try:
        generation = GenerationConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError, TypeError):  # the last of values of other types: whoever loads the model says so
        generation = {}
    config = (
        config.get("backbone") or config.get("trunk") or config.get("text_config") or config
    )  # a reward model of ours; one that also sees
    ids = [node.get(name) for node in (config, generation) for name in ("eos_token_id", "bos_token_id")]
    used = {i for each in ids for i in (each if isinstance(each, list) else [each]) if i is not None}
    return config.get("vocab_size"), used


def spare_token(tokenizer: PreTrainedTokenizerBase, used: set[int], rows: int | None) -> str:
    """A token for padding that nothing else needs, so that a vocabulary need not grow.

    In this order: a special token named for padding; a reserved one; a new ``<|pad|>`` in a row of the embedding that
    has no token (of ``rows``; None: the embedding is still to be made); the last special token; the unknown token where
    it is special. Not those in ``used`` nor in the chat template. Where there is none: a new ``<|pad|>``."""
    used = used | _of_template(tokenizer)
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    spare = [text for i, text in sorted(special.items()) if i not in used]
    for name in ("pad", "reserved", "unused"):
        if named := [text for text in spare if name in text.lower()]:
            return named[0]
    others = sorted(spare, key=lambda text: text == tokenizer.unk_token, reverse=True)
    if rows is None or max(tokenizer.get_vocab().values()) + 1 < rows or not others:
        return PAD
    return others[-1]


def _of_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The added tokens of the chat template: that stand in it, or that it writes (``'<|' + role + '|>'``).

    By their text: encoded, words that a tokenizer does not know would be the unknown token, which may be padding."""
    texts = [str(tokenizer.chat_template or "")]
    with suppress(Exception):  # whatever a template's own code raises: it is said elsewhere
        texts += [_rendered(tokenizer, turns) for turns in (TURNS, [SYSTEM, *TURNS]) if tokenizer.chat_template]
    return {i for i, token in tokenizer.added_tokens_decoder.items() if any(token.content in text for text in texts)}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise ``UserError`` where a model's folder holds a tokenizer that gives the same tokens other numbers."""
    if str(tokenizer.name_or_path) == str(path) or not (Path(path) / "tokenizer.json").is_file():
        return
    given = tokenizer.get_vocab()
    for token, i in AutoTokenizer.from_pretrained(str(path)).get_vocab().items():
        if given.get(token, i) != i:
            raise UserError(
                f"{path}: its tokenizer has token {i} for {token!r}, and the tokenizer that is used, of "
                f"{tokenizer.name_or_path or 'this run'}, has {given[token]}: they are no pair. Take models of one "
                "vocabulary"
            )


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same numbers to the same tokens; some that were added to one do not matter."""
    first, second = one.get_vocab(), other.get_vocab()
    added = {t.content for tokenizer in (one, other) for t in tokenizer.added_tokens_decoder.values()}
    return all(first.get(token) == second.get(token) or token in added for token in first.keys() | second.keys())


def check_template(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise ``UserError`` where a chat template fails on a plain dialogue, or leaves out what a turn says.

    Where it leaves out the system message alone it says so: not every dialogue has one."""
    if tokenizer.chat_template is None:
        return
    dropped: set[str] = set()
    failures: list[str] = []
    for turns in (TURNS, [SYSTEM, *TURNS]):  # some templates know no system message, and some want one
        try:
            text = _rendered(tokenizer, turns)
            dropped |= {role for role, said in turns if said not in text}
        except Exception as error:  # whatever a template's own code raises
            failures.append(first_line(error))
    if len(failures) == 2:
        file = TEMPLATE if (Path(path) / TEMPLATE).is_file() else "tokenizer_config.json"
        raise UserError(f"{path}: its chat template ({file}) fails on a plain dialogue ({failures[0]}); give another")
    if left_out := sorted(dropped - {"system"}):
        raise UserError(
            f"{path}: its chat template leaves out what the {' and the '.join(left_out)} says; give another, in "
            "chat_template.jinja"
        )
    if dropped:
        say(f"{path}: its chat template leaves out system messages")


SYSTEM = ("system", "sysmark")  # words that stand nowhere else
TURNS = [("user", "firstmark"), ("assistant", "replymark"), ("user", "lastmark")]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """A dialogue as the template writes it; of contents as text and as a list of parts, by role, what keeps more."""
    rendered: list[str] = []
    failures: list[Exception] = []
    roles = {role for role, _ in turns}
    for forms in product((False, True), repeat=len(roles)):
        in_parts = dict(zip(sorted(roles), forms))
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": t}] if in_parts[role] else t} for role, t in turns
        ]
        try:
            rendered.append(str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))
        except Exception as error:  # whatever a template's own code raises
            failures.append(error)
    if not rendered:
        raise failures[0]
    return max(rendered, key=lambda text: sum(said in text for _, said in turns))
