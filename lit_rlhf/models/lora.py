"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: their settings, and the folders that they are kept in."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.files import final
from lit_rlhf.finished import check_unchanged
from lit_rlhf.models.adapters import adapted_modules, changes, lora_layers, merged
from lit_rlhf.models.checkpoint import identity, written_whole
from lit_rlhf.models.finite import not_finite
from lit_rlhf.models.loading import as_sharded, cast_to_intended, checkpoint_format
from lit_rlhf.models.quantization import Model, is_quantized
from lit_rlhf.text.model_folder import ADAPTER_CONFIG, base_of_adapter, check_regular_files, is_adapter

WEIGHTS = "adapter_model.safetensors"
# Kinds of models whose fused kernels take no adapter at out_proj; peft refuses it there
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
PREFIX = "base_model.model."  # of the names in an adapter folder
# Weights that came with an adapter and are not trained: embedding and head of a base whose vocabulary had grown
_frozen_within: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


@checked
@dataclass(frozen=True)
class LoRA:
    """Which adapters a model gets: peft's ``LoraConfig`` under peft's names, and ``path``.

    What peft has besides cannot be added into the weights again, or needs data to begin with."""

    r: Annotated[int, Field(ge=0)] = 0  # rank of the update of each matrix; 0: no LoRA, all weights are trained
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0  # the update is scaled by lora_alpha / r
    target_modules: str | list[str] = "all-linear"  # ends of the names of the matrices; a string: a regular expression
    exclude_modules: str | list[str] | None = None  # the same of those that get none
    layers_to_transform: int | list[int] | None = None  # blocks that get adapters; None: all
    layers_pattern: str | list[str] | None = None  # what blocks are called, where their numbers are not the first ones
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] | None = None  # other ranks, by (regular expressions of) names
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None  # other values of lora_alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what enters an adapter; PPO and DPO train without
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (arXiv:2312.03732)
    use_dora: bool = False  # learn the length of each matrix's rows apart from their direction (arXiv:2402.09353)
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True  # those that begin as no change of the model
    bias: Literal["none", "lora_only", "all"] = "none"  # biases that are trained, too
    lora_bias: bool = False  # adapters have a bias, where their matrix has one
    modules_to_save: list[str] | None = None  # ends of names of modules that are trained as a whole
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None  # rows of the embedding that are trained
    target_parameters: list[str] | None = None  # ends of names of tensors: experts of a mixture
    ensure_weight_tying: bool = False  # an embedding and a head that are tied are trained as one
    path: str | Path | None = None  # an adapter folder that goes on being trained, with its own settings

    @property
    def enabled(self) -> bool:
        """Whether there are to be adapters."""
        return self.r > 0 or self.path is not None

    @property
    def reads_weights(self) -> bool:
        """Whether the values of a model's weights go into what its adapters are at first."""
        values = self.use_dora or self.modules_to_save or self.trainable_token_indices or self.target_parameters
        return bool(values or self.path is not None or self.init_lora_weights == "orthogonal")


def add_lora(model: PreTrainedModel, lora: LoRA | None) -> PreTrainedModel:
    """Put adapters into ``model``; only they, what trains with them, and a scalar head stay trainable.

    Fresh ones start as no change. Nothing is done where ``lora`` is None or of rank 0. Raises ``UserError`` where its
    names match nothing in the model, or the adapter in ``lora.path`` is for another one."""
    if lora is None or not lora.enabled:
        return model
    if lora.reads_weights:
        cast_to_intended(model)
    if lora.path is not None:
        own = [f.name for f in dataclasses.fields(lora) if f.name != "path" and getattr(lora, f.name) != f.default]
        if own:
            raise UserError(f"lora.path={lora.path} comes with its own settings; leave lora.{', lora.'.join(own)} out")
        return put_adapter(model, lora.path)
    _require_peft()
    from peft import LoraConfig

    settings = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora) if f.name != "path"}
    transposed = any(isinstance(m, Conv1D) for m in model.base_model.modules())  # GPT-2 keeps its matrices so
    settings |= {"target_modules": _targets(model, lora), "fan_in_fan_out": transposed}
    _check_names(model, lora)
    known = {f.name: f for f in dataclasses.fields(LoraConfig)}
    if unknown := [name for name in settings.keys() - known if settings[name] not in (None, False)]:
        raise UserError(f"lora.{unknown[0]}: this version of peft has no such setting; it has {', '.join(known)}")
    with as_sharded(model):
        _inject(model, LoraConfig(**{n: v for n, v in settings.items() if v is not None and n in known}))
    return train_adapters(model)


def train_adapters(model: Model) -> Model:
    """Let adapters, what trains with them and a scalar head learn, and nothing else; all of a model that has none."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return model.requires_grad_(True)
    biases = {"none": (), "all": ("bias",), "lora_only": ("base_layer.bias",)}[config.bias]
    parts = ("lora_", ".modules_to_save.", "trainable_tokens_delta")
    for name, parameter in model.named_parameters():
        learns = any(part in name for part in parts) or name.startswith("score.") or name.endswith(biases or "\0")
        parameter.requires_grad_(learns)
    return model


def learning(model: Model) -> Model:
    """``model`` to be trained: where all of it came frozen out of another module, as :func:`train_adapters` says."""
    return model if any(p.requires_grad for p in model.parameters()) else train_adapters(model)


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("LoRA needs the package peft: pip install 'lit_rlhf[lora]'") from None


def _inject(model: nn.Module, config: Any, written_by_peft: bool = False) -> None:
    """peft's own, whose complaints about names that match nothing are errors here, but where it wrote them itself.

    Raises ``UserError`` for what could not be exported as a plain model."""
    from peft import inject_adapter_in_model

    given = {*(config.rank_pattern or ()), *(config.alpha_pattern or ())}  # peft adds some of its own for experts
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"lora: {_line(error)}") from None
    if config.layer_replication:
        raise UserError("layer_replication: its blocks share tensors, which no plain model of this architecture does")
    if getattr(config, "target_modules_to_tie", None):  # two parameters of peft's on one memory, each of which steps
        raise UserError(
            "lora.ensure_weight_tying=true: not for an embedding in target_modules; take it out of these, or train it "
            "whole (lora.modules_to_save=[embed_tokens])"
        )
    for name, layer in lora_layers(model).items():
        if config.lora_bias and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UserError(f"lora.lora_bias=true: {name} has no bias that the adapter's could be added to")
    for warning in [] if written_by_peft else said:
        text = str(warning.message)
        if "_pattern keys did not match" in text and not any(repr(name) in text for name in given):
            continue
        if any(part in text for part in ("did not match", "no module", "no parameter")):
            raise UserError(f"lora: {_line(text)}")


def _matrices(model: Any) -> list[str]:
    """Names of the linear modules between embedding and head, but those that peft refuses in a model of this kind."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    refused = ".out_proj" if model.config.model_type in MAMBA else "\0"
    linear = (n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return [prefix + name for name in linear if not name.endswith(refused)]


def _targets(model: nn.Module, lora: LoRA) -> str | list[str]:
    """Names as peft wants them: short ones where they are those of these matrices alone."""
    if lora.target_modules != "all-linear":
        return lora.target_modules
    matrices = _matrices(model)
    ends = sorted({name.rpartition(".")[2] for name in matrices})
    named = [name for name, _ in model.named_modules() if _matches(name, ends)]
    return ends if len(named) == len(matrices) or lora.layers_to_transform is not None else matrices


def _matches(name: str, ends: list[str]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _check_names(model: nn.Module, lora: LoRA) -> None:
    """Raise ``UserError`` where a name matches nothing: peft goes on with the others."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for setting, names in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters),
                           ("exclude_modules", modules)):  # fmt: skip
        ends = getattr(lora, setting)
        if (setting == "target_modules" and ends == "all-linear") or ends is None:
            continue
        wrong = [end for end in ends if not any(_matches(n, [end]) for n in names)] if isinstance(ends, list) else []
        if wrong or (setting == "target_modules" and not ends and not lora.target_parameters):
            known = sorted({name.rpartition(".")[2] for name in _matrices(model)})
            raise UserError(
                f"lora.{setting}={ends}: {', '.join(wrong) or 'an empty list'} matches nothing in this model, whose "
                f"matrices are {', '.join(known)}"
            )


# ------------------------------------------------------------------------------------------------- adapter folders


def base_path(path: str | Path) -> str | Path:
    """Where the weights of a model folder, or of an adapter's base, are."""
    return base_of_adapter(path) if is_adapter(path) else path


def with_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """``model``, loaded from :func:`base_path`; an adapter in ``path`` is added into its weights."""
    if not is_adapter(path):
        return model
    if is_quantized(model):
        raise UserError(
            f"{path}: an adapter, which cannot be added into weights of 4 bits; start from its base "
            f"({base_of_adapter(path)}) and go on with the adapter by <stage>.lora.path, or set quantization to null"
        )
    model = merged(put_adapter(model, path)).requires_grad_(True)
    print(f"{path}: an adapter, added into the weights of its base {base_of_adapter(path)} to start from", flush=True)
    model.name_or_path = str(path)
    return model


def holds_score(path: str | Path) -> bool:
    """Whether a folder holds the adapter of a reward model."""
    return is_adapter(path) and any(name.startswith(f"{PREFIX}score.") for name in _read_weights(Path(path)))


def check_quantization(
    quantization: str | None, lora: LoRA | None, path: str | Path, setting: str = "<stage>.lora.r"
) -> None:
    """Raise ``UserError``, with the ``setting`` to change, where weights of 4 bits would have to be trained."""
    if quantization is not None and not (lora and lora.enabled):
        raise UserError(f"{path}: weights of {quantization} are frozen; train adapters on them ({setting}=16, say)")


def put_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Put the adapter in the folder ``path`` into ``model``, its base.

    Raises ``UserError`` where it is no LoRA, or is for another model: by name, or by its tensors."""
    _require_peft()
    cast_to_intended(model)
    check_regular_files(path)
    from peft import PeftConfig, set_peft_model_state_dict

    _check_base(model, path)
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{path}: {ADAPTER_CONFIG} cannot be read ({_line(error)})") from None
    if config.peft_type != "LORA":
        raise UserError(
            f"{path}: an adapter of kind {str(config.peft_type).rpartition('.')[2]}, where LoRA was expected; if peft "
            "can merge it (merge_and_unload), give the merged model"
        )
    weights = {name.removeprefix(PREFIX): w.to(model.device) for name, w in _read_weights(Path(path)).items()}
    # Of an embedding that grew and is trained whole, peft writes the same once more, and what was there before.
    beside = (".modules_to_save.", ".original_module.")
    weights = {name: weight for name, weight in weights.items() if not any(part in name for part in beside)}
    # A head that reads a score is trained as it is, not beside a copy.
    heads = {name: weights.pop(name) for name in list(weights) if name.startswith("score.")}
    config.modules_to_save = [n for n in config.modules_to_save or () if n not in ("score", "classifier")] or None
    config.inference_mode = False
    if hasattr(model, "score"):  # a language model's adapter: what it does to the head goes with the head
        weights = {name: weight for name, weight in weights.items() if not name.startswith("lm_head.")}
    elif heads:
        raise UserError(f"{path}: the adapter of a reward model, where a language model's was expected")
    weights = _with_grown_rows(model, weights)
    try:
        _inject(model, config, written_by_peft=True)
        found: Any = set_peft_model_state_dict(model, weights)
        if heads:
            model.get_submodule("score").load_state_dict({n.removeprefix("score."): w for n, w in heads.items()})
    except (UserError, RuntimeError, KeyError, ValueError) as error:
        raise _for_another(path, model, _line(error)) from None
    train_adapters(model)
    # What is tied to a weight that was found is not missing; a frozen weight is the base's.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _frozen_within[model] = [n for n in weights if n in parameters and not parameters[n].requires_grad]
    there = {id(p) for n, p in parameters.items() if n not in set(found.missing_keys)}
    there |= {id(p) for n, p in parameters.items() if not p.requires_grad or n.startswith("score.")}
    missing = [n for n in found.missing_keys if n in parameters and id(parameters[n]) not in there]
    if missing or found.unexpected_keys:
        lacks = f"it has no {missing[0]}" if missing else f"the model has no {found.unexpected_keys[0]}"
        raise _for_another(path, model, lacks)
    return model


def _with_grown_rows(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's ``weights``, of embedding and head with rows for the tokens by which the vocabulary grew since,
    padding say: the model's own, which the adapter does not change."""
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    grown = dict(weights)
    for module, own in [(name, m.weight.detach()) for name, m in model.named_modules() if id(m) in ends]:
        for part, dim in (("weight", 0), ("base_layer.weight", 0), ("lora_B.weight", 0), ("lora_embedding_A", 1)):
            weight = weights.get(f"{module}.{part}")
            more = 0 if weight is None else len(own) - weight.shape[dim]
            if weight is not None and 0 < more <= 16:  # as match_tokenizer
                rows = weight.new_zeros(more, weight.shape[1 - dim]) if "lora" in part else own[-more:].to(weight)
                grown[f"{module}.{part}"] = torch.cat([weight, rows if dim == 0 else rows.mT], dim)
    return grown


def _for_another(path: str | Path, model: nn.Module, reason: str) -> UserError:
    given = model.name_or_path or "this model"
    if "size mismatch" in reason and (Path(path) / "tokenizer.json").exists():
        reason += f" (where a vocabulary grew, train with the adapter's tokenizer: <stage>.tokenizer.path={path})"
    return UserError(f"{path}: an adapter of {base_of_adapter(path)}, which does not fit {given}: {reason}")


def _check_base(model: PreTrainedModel, path: str | Path) -> None:
    """Raise ``UserError`` where an adapter says that its base is another model: those that we write by its weights,
    others by its name."""
    base, given = str(base_of_adapter(path)), str(model.name_or_path)
    form = checkpoint_format(model)
    here = None if form is None else identity(form.folder)
    if (known := _base_identity(Path(path))) and here:
        if known != here:
            raise UserError(
                f"{path}: an adapter of {base} as it was then, and the weights of {given} are others; give the base "
                "that it was trained on, or the merged model"
            )
        return
    folders = Path(base), Path(given)
    if not given or folders[0].resolve() == folders[1].resolve():
        return
    if folders[0].is_dir() and here:
        same = identity(folders[0]) == here
    else:
        same = folders[0].name.lower() == folders[1].name.lower() != "model"
    if not same:
        raise UserError(
            f"{path}: an adapter of {base}, and this run starts from {given}; give its own base, or, where the two are "
            f"the same, write {given} into its {ADAPTER_CONFIG} (base_model_name_or_path)"
        )


def _base_identity(folder: Path) -> str | None:
    """What an adapter that we wrote says of its base's weights."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            return (weights.metadata() or {}).get("base_identity")
    except (SafetensorError, OSError):
        return None  # said where they are read


def _read_weights(folder: Path) -> dict[str, Tensor]:
    check_unchanged(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        other = next((f.name for f in folder.glob("adapter_model.*")), None)
        found = f"{other} cannot be read safely: load it with peft and save it again" if other else "no weights there"
        raise UserError(f"{folder}: {WEIGHTS} was expected ({found})")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cut off or damaged ({error}); copy it again") from None
    for name, tensor in weights.items():
        if said := not_finite(tensor):
            raise UserError(f"{file}: {name} holds {said}; take an adapter from before it diverged")
    return weights


def save_adapter(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapters of ``model`` as a folder of peft's, with tokenizer; a line says where there can be none.

    ``peft.PeftModel.from_pretrained`` puts it on the base, which it names as the base's path was given."""
    if not adapted_modules(model):
        return
    base = getattr(model, "name_or_path", "")
    if not isinstance(model, PreTrainedModel):
        print(f"{final(folder)}: not written, for peft knows no model with such a head; model/ is whole")
    elif not base or is_adapter(base):
        began = f"{base}, an adapter itself" if base else "no folder"
        print(f"{final(folder)}: not written, for its base came from {began}; model/ is whole")
    else:
        with written_whole(folder) as temporary:
            _write_adapter(model, base, temporary)
            tokenizer.save_pretrained(temporary)


def _write_adapter(model: Any, base: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights |= {name: model.get_parameter(name).detach() for name in _frozen_within.get(model, ())}
    config = dataclasses.replace(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = "CAUSAL_LM"
    if hasattr(model, "score"):
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
        weights |= {f"score.{name}": weight for name, weight in model.score.state_dict().items()}
    form = checkpoint_format(model)
    # One entry: several are written in any order, and the same adapter would be another file each time.
    metadata = {"format": "pt"} if form is None else {"base_identity": identity(form.folder)}
    owner = {w.data_ptr(): n for n, w in weights.items()}  # peft reads both of what is tied, safetensors wants copies
    stored = {PREFIX + n: w.contiguous() if owner[w.data_ptr()] == n else w.clone() for n, w in weights.items()}
    save_file(stored, folder / WEIGHTS, metadata=metadata)
    config.save_pretrained(str(folder))


def starts_unchanged(model: nn.Module) -> bool:
    """Whether a model with adapters computes what it did without them, and all that it trains are adapters."""
    inside = {id(p) for m in adapted_modules(model).values() for p in m.parameters()}
    if any(id(p) not in inside for p in model.parameters() if p.requires_grad):
        return False
    biases = any(n.endswith("base_layer.bias") and p.requires_grad for n, p in model.named_parameters())
    return not biases and not any(changes(layer) for layer in lora_layers(model).values())


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
