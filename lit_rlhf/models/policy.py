"""Language models: made from a config, or loaded from a checkpoint. All are Hugging Face's causal language models."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.models.gathering import gathers, sharded_root
from lit_rlhf.models.kernels.attention import Layout, sees_before_it, use_block_attention
from lit_rlhf.models.kernels.choice import fast_kernels
from lit_rlhf.models.kernels.onednn import rows_to_add
from lit_rlhf.models.loading import Dtype, load_config, load_language_model, match_tokenizer
from lit_rlhf.models.logits import check_logits
from lit_rlhf.models.lora import LoRA, add_lora, base_path, check_quantization, with_adapter
from lit_rlhf.models.quantization import Model, Quantization, keep_layout, quantized_loading
from lit_rlhf.models.self_check import SHORTER, agrees, read, texts
from lit_rlhf.text.chat import ensure_template, turn_end
from lit_rlhf.text.packing import Packed, pack
from lit_rlhf.text.tokenizer import check_vocabulary, load_tokenizer


def policy_from_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialized model; ``config`` names a ``model_type`` and that architecture's own settings.

    Vocabulary size and special tokens come from the tokenizer. Raises ``UserError`` for settings that the family does
    not have, and for those of which no model can be made, or none that reads a text."""
    settings = copy.deepcopy(dict(config))
    model_type = settings.pop("model_type", None)
    try:
        architecture = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
        known = {**type(architecture)().to_dict(), **architecture.attribute_map}
        if unknown := [name for name in settings if name not in known and not _reads(architecture, name)]:
            raise ValueError(f"{model_type} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
        if (words := architecture.get_text_config().vocab_size) != len(tokenizer):
            raise ValueError(
                f"{model_type} would have {words} words, and the tokenizer has {len(tokenizer)}: its language model is "
                "a part of it; take the family of that part"
            )
        if architecture.to_dict().get("head_dim", 0) is None:  # some families cannot do without
            architecture.head_dim = architecture.hidden_size // architecture.num_attention_heads
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture)  # type: ignore[no-untyped-call]
        check_logits(model)
    except Exception as error:  # whatever a family's own code raises of settings that do not fit each other
        raise UserError(f"model.config: {' '.join(str(error).split())[:900] or type(error).__name__}") from error
    if "head_dim" not in settings:
        _say_head_dim(architecture)
    return model


def _reads(config: PretrainedConfig, name: str) -> bool:
    """Whether a family's code takes a setting that its config does not list, as qwen3_moe takes ``head_dim``."""
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return kind is not None and f'getattr(config, "{name}"' in inspect.getsource(sys.modules[kind.__module__])


def _say_head_dim(config: PretrainedConfig) -> None:
    """Say where a family's heads have a width of their own, which most take from the other settings."""
    found = config.to_dict()
    width, heads, size = (found.get(name) for name in ("head_dim", "num_attention_heads", "hidden_size"))
    if width and heads and size and width * heads != size and "qk_rope_head_dim" not in found:
        say_once(
            f"model.config: heads of {config.model_type} are {width} wide unless head_dim says otherwise, and not "
            f"hidden_size / num_attention_heads = {size / heads:g}"
        )


def load_policy(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    export_dtype: Dtype | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a folder or a Hub name, with adapters where ``lora`` asks for them.

    It computes in ``dtype``; its export is written in ``export_dtype``, or in the checkpoint's own precision. A folder
    may hold an adapter: it is added into the weights of its base. With ``quantization`` the frozen weights are kept in
    4 bits, and adapters are trained. With a ``tokenizer`` the model learns which token is padding. Errors are those of
    :func:`load_language_model` and :func:`match_tokenizer`."""
    check_quantization(quantization, lora, path)
    quantized = quantized_loading(quantization, getattr(torch, dtype))
    model = load_language_model(base_path(path), dtype, export_dtype, **quantized)
    if tokenizer is not None:
        check_vocabulary(tokenizer, path)
        match_tokenizer(model, tokenizer, path, adapters=lora is not None and lora.enabled)
    model = with_adapter(keep_layout(model), path)
    check_logits(model)
    packs(model.base_model)  # how it is computed is said when it is loaded
    return add_lora(model, lora)


def load_policy_and_tokenizer(
    path: str | Path, dtype: Dtype = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder as it was saved: the model, and the tokenizer with its chat template."""
    load_config(base_path(path))  # what is wrong with a model is said of the model, not of its tokenizer
    tokenizer = load_tokenizer(path)
    ensure_template(tokenizer)
    return load_policy(path, tokenizer, dtype), tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens with which an answer of the model ends: those of its generation settings, the tokenizer's end-of-text,
    and the one that the chat template writes behind an assistant's turn."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = known if isinstance(known, list | tuple) else [known]
    return turn_end(tokenizer) | {token for token in (*of_model, tokenizer.eos_token_id) if token is not None}


def context_length(model: Any) -> int:
    """Context length of the model, in tokens."""
    given = (getattr(model.config, name, None) or 0 for name in ("max_position_embeddings", "n_positions"))
    length = next((int(length) for length in given if length > 0), 2**31)  # -1: no limit that anyone knows (XLNet)
    # A text that grows beyond this limit is read anew with other positions: what was sampled is not what it was then.
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one for all layers, or by their type
    limits = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
    if min(limits, default=length) < length:
        length = min(limits)
        say_once(f"{type(model).__name__}: texts of up to {length} tokens, for its positions change behind (longrope)")
    return length


def freeze(model: Model) -> Model:
    """Turn off gradients and dropout of ``model``; returns it."""
    return model.requires_grad_(False).eval()


@gathers
def packed_hidden(
    model: PreTrainedModel, batch: Packed, embeddings: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Last hidden states (T, D) of packed sequences, each seeing itself alone.

    ``embeddings`` (T, D) stand in for the tokens' own. ``at``, flat indices (M,) of the tokens whose states are wanted,
    in any order and as often as one likes: those (M, D) alone."""
    # Not the model is called, with output_hidden_states=True: that breaks pickling and computes all logits.
    backbone: Any = model.base_model
    source, name = (batch.tokens, "input_ids") if embeddings is None else (embeddings, "inputs_embeds")
    if packs(backbone):
        return _in_one_row(backbone, batch, name, source, at)
    hidden = (
        _each_block(backbone, batch, name, source) if batch.parts is None else _apart(backbone, batch, name, source)
    )
    return hidden if at is None else hidden.index_select(0, at)


def packs(backbone: Any) -> bool:
    """Whether packed sequences can be read in one row, with attention of our own; then several may share a prompt."""
    # A kind of attention that is not asked of this one was chosen by someone: no line about it.
    return (
        fast_kernels()
        and sees_before_it(backbone)
        and agrees(backbone, "all texts in one row", _one_row_and_alone, "texts are read block by block (slower)")
    )


def _one_row_and_alone(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Hidden states of every other token of some texts: in one row, and each text read by itself."""
    packed, cells, alone = _read_alone(backbone)
    kind = backbone.config._attn_implementation
    try:
        return _in_one_row(backbone, packed, "input_ids", packed.tokens, cells[::2]), alone[::2]
    finally:
        backbone.set_attn_implementation(kind)


def _padded_and_alone(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of every token: as rows of one block, with padding behind the shorter ones, and each text read by itself."""
    packed, cells, alone = _read_alone(backbone, padded=True)
    [rows] = packed.by_block(packed.tokens)
    return _states(backbone, "input_ids", rows).flatten(0, 1)[cells], alone


def _read_alone(backbone: PreTrainedModel, padded: bool = False) -> tuple[Packed, Tensor, Tensor]:
    """Two texts of two lengths, packed; where their tokens are (M,); the hidden states (M, D) of each by itself."""
    one, other = texts(backbone)
    packed = pack([one.tolist(), other[:SHORTER].tolist()], 0, padded=padded).to(backbone.device)
    first_and_count = zip(packed.starts.tolist(), packed.lengths.tolist())
    cells = [torch.arange(first, first + count, device=backbone.device) for first, count in first_and_count]
    alone, begun = read(backbone)
    return packed, torch.cat(cells), torch.cat([alone, begun[:SHORTER]])


def _states(backbone: PreTrainedModel, name: str, rows: Tensor) -> Tensor:
    """Last hidden states (R, W, D) by the model's own forward pass of whole rows."""
    hidden: Tensor = backbone(**{name: rows}, use_cache=False).last_hidden_state
    return hidden


def _in_one_row(backbone: PreTrainedModel, batch: Packed, name: str, source: Tensor, at: Tensor | None) -> Tensor:
    use_block_attention(backbone)
    size, positions = len(batch.tokens), batch.positions
    layout = Layout(batch.blocks, batch.visible, batch.by_block(positions))
    if more := rows_to_add(backbone, size):  # they see nothing, nobody sees them, and nobody reads them
        source, positions = F.pad(source, (0, 0) * (source.dim() - 1) + (0, more)), F.pad(positions, (0, more))
    nothing = batch.tokens.new_zeros(1, 1, 1, 1)  # a mask of four dimensions is not looked at: the blocks say it all
    output = backbone(
        **{name: source[None]}, position_ids=positions[None], attention_mask=nothing, use_cache=False, layout=layout
    )
    hidden: Tensor = output.last_hidden_state.squeeze(0)  # [0] would copy the gradient
    return hidden[:size] if at is None else hidden.index_select(0, at)


def layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a Transformer, as transformers marks them."""
    return [m for m in backbone.modules() if hasattr(type(m), "gradient_checkpointing")]


def _each_block(backbone: PreTrainedModel, batch: Packed, name: str, source: Tensor) -> Tensor:
    """The same in a pass for each block: whatever a model looks back with, padding stands behind what is read."""
    blocks = batch.by_block(source)
    if sharded_root(backbone) is not None:  # each pass is made by all processes, whose blocks are others
        raise UserError(
            f"trainer.strategy=fsdp2: {type(backbone).__name__} cannot read sequences in one row, as sharded models "
            "must (with trainer.kernels=fast); take trainer=ddp"
        )
    instead = "rows of one length are read together (slower)"
    if agrees(backbone, "texts with padding behind them", _padded_and_alone, instead):
        return torch.cat([_states(backbone, name, rows).flatten(0, 1) for rows in blocks])
    read, cells, ends = [], [], dict(zip(batch.starts.tolist(), batch.ends.tolist()))
    for rows, here in zip(blocks, batch.by_block(torch.arange(len(source), device=source.device))):
        lengths = torch.tensor([ends[begin] + 1 - begin for begin in here[:, 0].tolist()], device=here.device)
        for length in torch.unique(lengths).tolist():
            read.append(_states(backbone, name, rows[lengths == length, :length]).flatten(0, 1))
            cells.append(here[lengths == length, :length].flatten())
    states = torch.cat(read)
    return states.new_zeros(len(source), states.shape[1]).index_copy(0, torch.cat(cells), states)


def _apart(backbone: PreTrainedModel, batch: Packed, name: str, source: Tensor) -> Tensor:
    """The same of sequences that share prompts, for a model that has to read each of them whole."""
    places, _ = response_positions(batch, batch.lengths)
    where = pack([row[:n] for row, n in zip(places.tolist(), batch.lengths.tolist())], 0).to(source.device)
    hidden = _each_block(backbone, where, name, source[where.tokens])
    cells, real = response_positions(where, where.lengths)
    # A prompt was read as often as it is answered: one of these readings is taken.
    copy = torch.zeros(len(source), dtype=torch.int64, device=source.device)
    copy[where.tokens[cells[real]]] = cells[real]
    return hidden.index_select(0, copy)


def shares_prompts(*modules: nn.Module | None) -> bool:
    """Whether all models of ``modules`` can read a prompt once for several answers; where not, a line says so."""
    parts = (part for module in modules if module is not None for part in module.modules())
    backbones = {part.base_model for part in parts if isinstance(part, PreTrainedModel)}
    cannot = sorted({type(backbone).__name__ for backbone in backbones if not packs(backbone)})
    if cannot:
        why = "cannot be told which tokens see which" if fast_kernels() else "is computed with trainer.kernels=plain"
        say_once(f"share_prompts is off: {', '.join(cannot)} {why}")
    return not cannot


def response_positions(batch: Packed, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(positions, mask), both (N, T), where T is the largest number of response tokens.

    ``positions`` are flat indices of the response tokens of each sequence, in order, wherever in it they stand; or of
    its last ``counts`` (N,) tokens. At masked positions the index is 0. Raises ``ValueError`` where the batch does not
    say which tokens are responses."""
    return _responses(batch, 1) if counts is None else _last(batch, counts, 1)


def predicting_positions(batch: Packed, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same of the tokens that predict those: each stands before the one that it predicts."""
    return _responses(batch, 0) if counts is None else _last(batch, counts, 0)


def _responses(batch: Packed, ahead: int) -> tuple[Tensor, Tensor]:
    if batch.response_lengths is None:
        raise ValueError("nobody said which tokens are responses: pack with response_lengths or response_masks")
    places, behind_prompt = _last(batch, batch.response_lengths, ahead)
    if batch.response_mask is None:
        return places, behind_prompt
    tokens, _ = _last(batch, batch.response_lengths, 1)
    written = behind_prompt & batch.response_mask[tokens]
    counts = written.sum(1)
    mask = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    return places.new_zeros(mask.shape).masked_scatter(mask, places[written]), mask


def _last(batch: Packed, counts: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    steps = torch.arange(int(counts.max()), device=counts.device)
    mask = steps < counts[:, None]
    return torch.where(mask, batch.from_end(counts[:, None] - steps - ahead), 0), mask
