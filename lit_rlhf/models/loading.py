"""Checkpoints: all of a folder's weights, as they stand there, or an error that names what is wrong."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from lit_rlhf.errors import UserError, say, say_hub
from lit_rlhf.finished import check_unchanged
from lit_rlhf.models.finite import check_finite
from lit_rlhf.text.model_folder import check_regular_files, model_settings

MODEL_TYPE = "lit_rlhf_reward"  # in the config.json of a reward model that transformers does not know
Dtype = Literal["float32", "bfloat16", "float16"]

# safetensors' names
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Constants that older releases of transformers stored with the weights; models compute them.
CONSTANTS = re.compile(r"(\.masked_bias|\.rotary_emb\.\w+)$")
CONVERT = 'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; {}"'
FROM_PICKLE = "M.from_pretrained({0!r}).save_pretrained({0!r})"
FROM_GGUF = (
    "p, f = {0!r}, {1!r}; m = M.from_pretrained(p, gguf_file=f); m.hf_quantizer = None; del m.config."
    "quantization_config; m.save_pretrained(p); T.from_pretrained(p, gguf_file=f).save_pretrained(p)"
)


@dataclass(frozen=True)
class CheckpointFormat:
    """Format of the checkpoint that a model came from, as far as its export keeps it."""

    folder: Path
    dtype: torch.dtype  # of the exported weights
    others: dict[str, torch.dtype] = field(default_factory=dict)  # of those that had another
    generation: str | None = None  # the text of generation_config.json; None: there was none


_formats: WeakKeyDictionary[torch.nn.Module, CheckpointFormat] = WeakKeyDictionary()


def checkpoint_format(model: torch.nn.Module) -> CheckpointFormat | None:
    """The format of the checkpoint that ``model`` came from; None where it came from none."""
    return _formats.get(model)


def keep_format(model: torch.nn.Module, form: CheckpointFormat | None) -> None:
    """Let the export of ``model``, which came from a checkpoint or from a model of one, keep its ``form``."""
    if form is not None:
        _formats[model] = form


_as_stored: ContextVar[bool] = ContextVar("as_stored", default=False)


@contextmanager
def loading_as_stored() -> Iterator[None]:
    """Context in which models are loaded in the precision of their files, whose pages all processes of a machine share.

    They are about to be sharded, and each part is cast to the precision that was asked for when it is."""
    token = _as_stored.set(True)
    try:
        yield
    finally:
        _as_stored.reset(token)


def dtype_as_stored(path: str | Path) -> torch.dtype | None:
    """The precision of a model's files within :func:`loading_as_stored`; None outside, and where they have several."""
    form = format_of(path) if _as_stored.get() else None
    return None if form is None or form.others else form.dtype


_intended: WeakKeyDictionary[torch.nn.Module, torch.dtype] = WeakKeyDictionary()  # of models about to be sharded


def intend_dtype(model: Any, dtype: torch.dtype) -> None:
    """Note the precision that a model will have when it is sharded."""
    _intended[model] = _intended[model.base_model] = dtype


def is_intended(model: torch.nn.Module) -> bool:
    """Whether ``model`` is about to be sharded, and has its precision from then on."""
    return model in _intended


def intended_dtype(model: Any) -> torch.dtype:
    """The precision that a model has, or will have when it is sharded."""
    dtype: torch.dtype = _intended.get(model) or model.dtype
    return dtype


def cast_to_intended(model: Any, *parts: Any) -> Any:
    """Cast ``model``, or only these ``parts`` of it, to its intended precision now instead of when it is sharded.

    Called before weights change, which would else be rounded afterwards."""
    if model in _intended:
        for part in parts or (model,):
            part.to(_intended[model])
        for part in () if parts else {model, model.base_model}:
            _intended.pop(part, None)
    return model


@contextmanager
def as_sharded(model: Any) -> Iterator[None]:
    """Context manager that gives weights the precision that they will have when they are sharded, without values, so
    that new modules are made in that precision."""
    stored = {p: p.data for p in model.parameters()} if model in _intended else {}
    for parameter, data in stored.items():
        parameter.data = data.new_empty((), dtype=_intended[model]).expand_as(data)
    try:
        yield
    finally:
        for parameter, data in stored.items():
            parameter.data = data


def copied(model: Any) -> Any:
    """A copy of ``model``; of one that is about to be sharded it shares the numbers, which are taken apart then."""
    lent = [p for p in model.parameters() if model in _intended and not p.is_meta]
    twin = copy.deepcopy(model, {id(p): torch.nn.Parameter(p.detach(), p.requires_grad) for p in lent})
    keep_intended(twin, model)
    return twin


def keep_intended(twin: torch.nn.Module, model: torch.nn.Module) -> None:
    """Let ``twin``, a copy of ``model``, have the precision that ``model`` will have when it is sharded."""
    if model in _intended:
        intend_dtype(twin, _intended[model])


def load_language_model(
    path: str | Path, dtype: Dtype, export_dtype: Dtype | None = None, **settings: Any
) -> PreTrainedModel:
    """A causal language model from a folder or a Hub name, in ``dtype``; ``settings`` are ``from_pretrained``'s.

    Its export is written in ``export_dtype``, or in the checkpoint's own. Raises ``UserError`` where ``path`` holds
    another kind of model, or where a tensor is missing, unexpected, of another shape than config.json gives it, or
    holds NaN or infinity."""
    config = load_config(path)
    if config.architectures and is_classifier(config):
        raise UserError(
            f"{path}: {classifier_name(config)}, where a language model was expected (it has no head that writes "
            "text); give the model that it was made from"
        )
    model, loading = read_pretrained(AutoModelForCausalLM, path, dtype, **settings)
    return check_loaded(model, path, loading, export_dtype)


def read_config(path: str | Path) -> PretrainedConfig:
    """The config of a model in a folder or on the Hub. Raises ``UserError`` where there is none, or where weights are
    not (all) in safetensors."""
    folder = Path(path)
    # "name" and "owner/name" may be on the Hub; what exists here, or looks like a path, is not.
    if folder.exists() or folder.is_absolute() or str(path).startswith(".") or len(folder.parts) > 2:
        check_files(folder)
        model_settings(folder, "generation_config.json")  # transformers goes on in silence without a broken one
        if model_settings(folder).get("model_type") == MODEL_TYPE:
            raise UserError(f"{path}: a reward model with a head of its own, where a language model was expected")
    else:
        say_hub(str(path))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path))
    except Exception as error:  # whatever transformers raises of a config.json that is none
        raise _unloadable(path, error) from error
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise UserError(
            f"{path}: weights of few bits ({method}, says its config.json), which can be neither trained nor exported; "
            "give the checkpoint that they were made from, with quantization=4bit where frozen ones of 4 bits will do"
        )
    return config


def load_config(path: str | Path) -> PretrainedConfig:
    """The config of a decoder-only model: that of :func:`read_config`, which raises ``UserError`` for other kinds."""
    config = read_config(path)
    if config.is_encoder_decoder:
        raise UserError(f"{path}: an encoder-decoder ({_name(config)}), where a decoder-only model was expected")
    kind = config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(
            f"{path}: an encoder ({_name(config)}), where a decoder-only model was expected: its tokens see those "
            "behind them"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{path}: {_name(config)}, which is no causal language model of transformers")
    return config


def check_files(folder: Path) -> None:
    """Raise ``UserError`` where a folder holds no config.json, or not all of its weights in safetensors, or where the
    stage that wrote it had left other files."""
    check_unchanged(folder)
    check_regular_files(folder)
    if (folder / "adapter_config.json").is_file():
        base = model_settings(folder, "adapter_config.json").get("base_model_name_or_path")
        raise UserError(f"{folder}: an adapter (adapter_config.json) of {base}, where a whole model was expected")
    if not (folder / "config.json").is_file():
        found = f"; {folder.name} is a file, and its folder was expected" if folder.is_file() else ""
        raise UserError(f"{folder}: no model there (config.json and *.safetensors were expected{found})" + _how(folder))
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: no weights there (*.safetensors were expected)" + _how(folder))
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except FileNotFoundError:
            raise UserError(f"{file}: missing, though {folder.name}/{INDEX} names it; copy the folder again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cut off or damaged ({error}); copy it again") from None


INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads; those that an index names may be missing."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return []
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(shards.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: no index of weights ({error!r}); copy it again") from None


def _how(folder: Path) -> str:
    """How weights in other formats become safetensors; "" where there are none."""
    folder = folder.parent if folder.is_file() else folder
    if gguf := sorted(folder.glob("*.gguf")):
        how = FROM_GGUF.format(str(folder), gguf[0].name)
        return f"; {gguf[0].name} is a GGUF file: convert it, {CONVERT.format(how)}"
    if pickles := sorted(f for end in ("bin", "pt", "pth", "ckpt") for f in folder.glob(f"*.{end}")):
        return f"; {pickles[0].name} is a pickle: convert it, {CONVERT.format(FROM_PICKLE.format(str(folder)))}"
    return ""


def read_pretrained(
    kind: Any, path: str | Path, dtype: Dtype, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``kind.from_pretrained``, which refuses nothing here: (model, what transformers says of its tensors).

    With ``meta`` as torch's default device the model has no values, and none are read."""
    settings |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    asked_for = getattr(torch, dtype)
    try:
        stored = None if "quantization_config" in settings else dtype_as_stored(path)
        if torch.empty(0).is_meta:
            config = AutoConfig.from_pretrained(str(path), **{k: v for k, v in settings.items() if k == "num_labels"})
            nothing: dict[str, Any] = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), frozenset())
            model = kind.from_config(config, dtype=asked_for)
            if stored is not None:
                intend_dtype(model, asked_for)
            return model, nothing
        model, found = kind.from_pretrained(str(path), dtype=stored or asked_for, **settings)
        if stored is not None:
            intend_dtype(model, asked_for)
        return model, found
    except Exception as error:  # a config.json whose numbers make no model ends anywhere
        raise _unloadable(path, error) from error


def _unloadable(path: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(
        f"{path}: no model could be loaded from there ({reason}). Give a folder with config.json and *.safetensors;"
        " a Hub name needs a network (download it elsewhere with `hf download` and give the folder)."
    )


def check_loaded(
    model: PreTrainedModel, path: str | Path, loading: dict[str, Any], export_dtype: Dtype | None
) -> PreTrainedModel:
    """A model that was read: with all of its file's tensors, finite ones, and its format noted."""
    unexpected = {name for name in loading["unexpected_keys"] if not CONSTANTS.search(name)}
    check_tensors(path, loading["missing_keys"], unexpected, loading["mismatched_keys"])
    check_finite(model, path)
    keep_format(model, format_of(path, export_dtype))
    return model


def check_tensors(
    path: str | Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> None:
    """Raise ``UserError``, with names, where the weights in ``path`` are not those that config.json describes.

    ``mismatched``: (name, shape of the weights, shape of the model)."""
    shapes = [f"{name} is {list(found)} for {list(asked_for)}" for name, found, asked_for in mismatched]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for what, names in (
            ("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("of another shape", sorted(shapes))
        )
        if names
    ]  # fmt: skip
    if faults:
        raise UserError(
            f"{path}: the weights are not those that config.json describes: of the tensors, {'; '.join(faults)}. Give "
            "the config.json that belongs to them"
        )


def format_of(path: str | Path, export_dtype: Dtype | None = None) -> CheckpointFormat:
    """What the export of a model from ``path`` keeps: generation settings, and precision where no ``export_dtype`` is
    given."""
    folder = Path(cached_file(str(path), "config.json") or path).parent
    file = folder / "generation_config.json"
    generation = file.read_text(encoding="utf-8") if file.is_file() else None
    if export_dtype is not None:
        return CheckpointFormat(folder, getattr(torch, export_dtype), generation=generation)
    dtypes: dict[str, torch.dtype] = {}
    sizes: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                tensor = tensors.get_slice(name)
                if dtype := DTYPES.get(tensor.get_dtype()):
                    dtypes[name] = dtype
                    sizes[dtype] += prod(tensor.get_shape())
    [(most, _)] = sizes.most_common(1) or [(torch.float32, 0)]
    return CheckpointFormat(folder, most, {name: dtype for name, dtype in dtypes.items() if dtype != most}, generation)


def match_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str | Path, adapters: bool = False
) -> None:
    """Let ``model`` know the tokenizer's padding token; its embedding grows by tokens that were added to the tokenizer.
    Where ``adapters`` are what will be trained, a line says that they leave those rows as they are.

    Raises ``UserError`` where the tokenizer is another model's: it has tokens of its own that the model does not know,
    or more than 16 that were added."""
    embedding: Any = model.get_input_embeddings()
    rows, pad = embedding.num_embeddings, tokenizer.pad_token_id
    new = sorted(i for i in tokenizer.get_vocab().values() if i >= rows)
    if len(new) > 16 or any(i not in tokenizer.added_tokens_decoder for i in new):
        raise UserError(
            f"{where}: the model knows {rows} tokens and the tokenizer has {len(tokenizer)}, up to {new[-1]}; "
            "they are no pair"
        )
    if new:
        layers = (embedding, model.get_output_embeddings())  # type: ignore[no-untyped-call]
        cast_to_intended(model, *filter(None, layers))
        names = ", ".join(tokenizer.convert_ids_to_tokens(new))
        how = f"; adapters do not train their rows, unless lora.trainable_token_indices={new} asks for it"
        grown = f"the vocabulary grows from {rows} tokens to {new[-1] + 1}, for {names}"
        say(f"{where}: {grown}{how if adapters and new != [pad] else ''}")
        model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
        _start_in_the_middle(model, rows, pad)
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        embedding.padding_idx = pad  # the embedding of that token is not trained: it must not be one that is used
    _match_special(model, tokenizer, where)


@torch.no_grad()
def _start_in_the_middle(model: PreTrainedModel, rows: int, pad: int) -> None:
    """Put the embeddings from ``rows`` on, which are fresh, around the mean of the others; padding's is that mean.

    They are the same whenever the model is loaded: adapters that learned beside them find them again.
    A logit at the mean of all is one of the average: the chance of such a token is below 1 in ``rows`` (Jensen). Around
    zero it could be any: where all logits are negative, as GPT-2's are, nothing but padding would be written."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    weights = {id(w): w for layer in layers for w in (getattr(layer, "weight", None), getattr(layer, "bias", None))}
    for weight in weights.values():
        if isinstance(weight, torch.Tensor):
            mean = weight[:rows].mean(0, dtype=torch.float32).to(weight.dtype)
            around = torch.randn(weight[rows:].shape, generator=torch.Generator().manual_seed(0))
            weight[rows:] = mean + (around * getattr(model.config, "initializer_range", 0.02)).to(weight)
            if pad >= rows:
                weight[pad] = mean


def _match_special(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str | Path) -> None:
    configs = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    for what in ("eos", "bos"):
        own = getattr(tokenizer, f"{what}_token_id")
        known = {i for config in configs for i in listed(getattr(config, f"{what}_token_id", None))}
        if own is not None and known and own not in known:
            say(
                f"{where}: {what}_token_id is {', '.join(map(str, sorted(known)))} in the model's settings and {own} "
                f"({getattr(tokenizer, f'{what}_token')}) in the tokenizer: is it this model's?"
            )
        rows: Any = model.get_input_embeddings().num_embeddings
        if beyond := sorted(i for i in known if i >= rows):
            say(f"{where}: {what}_token_id names {', '.join(map(str, beyond))}, and the model has {rows} tokens")
    # XGLM's table of positions has a row of zeros for the config's: whoever loads what is exported makes it anew.
    positions = (module for name, module in model.named_modules() if "position" in name)
    in_positions = any(getattr(module, "padding_idx", None) is not None for module in positions)
    for config in configs:
        if config is not model.config or not in_positions:
            config.pad_token_id = tokenizer.pad_token_id
        if getattr(config, "eos_token_id", None) is None:
            config.eos_token_id = tokenizer.eos_token_id


def listed(ids: int | list[int] | None) -> list[int]:
    """The ids of a setting that holds one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a checkpoint was saved as a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def classifier_name(config: PretrainedConfig) -> str:
    """What a classifier is called in messages."""
    return "a reward model" if config.num_labels == 1 else f"a classifier of {config.num_labels} labels"


def _name(config: PretrainedConfig) -> str:
    return (config.architectures or [config.model_type])[0]
