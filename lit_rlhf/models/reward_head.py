"""Score heads on a Transformer, and the reward model that has such a head.

A bias-free linear head at the last token is Hugging Face's sequence classifier with one label and needs nothing of
this file, where transformers has one for the family. The other heads, and all heads of the other families, make a model
of our own, which plain transformers refuses to load, so it never reads one wrongly."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.files import make_folder
from lit_rlhf.functional import ScoreScale
from lit_rlhf.models.adapters import effective_weight
from lit_rlhf.models.chunked import by_token
from lit_rlhf.models.finite import check_finite
from lit_rlhf.models.loading import (
    MODEL_TYPE,
    check_files,
    check_tensors,
    checkpoint_format,
    dtype_as_stored,
    intend_dtype,
    intended_dtype,
    keep_format,
)
from lit_rlhf.models.logits import check_logits, language_model
from lit_rlhf.models.policy import context_length, packed_hidden, predicting_positions, response_positions
from lit_rlhf.text.model_folder import model_settings
from lit_rlhf.text.packing import Packed, pack

SCALE = {"score_shift", "score_mean", "score_std"}
GATE_BIAS = -1.0  # a fresh gate lets 27% of the likelihood through


@checked
@dataclass(frozen=True)
class RewardHead:
    """Settings of a score head: how a score is read off the last hidden states.

    A likelihood head adds to the linear one what the model's own language-modelling head thinks of the answer:
    ``score = linear(h) + sum over the answer's tokens of sigmoid(gate(h_t)) (log p(token) - max log p)``, in nats: 0
    for a token that the model would have chosen itself, below for all others."""

    kind: Literal["linear", "mlp", "likelihood"] = "linear"
    # mean: over prompt and answer; answer: over the answer alone; token: an added one, whose embedding is learned
    pooling: Literal["last", "mean", "answer", "token"] = "last"
    # of a fresh head; zero: it scores everything 0; normal: standard deviation 1 / sqrt(width + 1) (arXiv:2009.01325)
    start: Literal["zero", "normal"] = field(default="zero", compare=False)

    @property
    def plain(self) -> bool:
        """Whether it is the head of a sequence classifier of Hugging Face's."""
        return (self.kind, self.pooling) == ("linear", "last")

    def is_classifier(self, config: PretrainedConfig) -> bool:
        """Whether a model of ``config`` with this head is a sequence classifier of transformers, which has none for
        some families (Granite, Cohere)."""
        return self.plain and config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


class ScoreHead(nn.Module):
    """A fresh head, started as ``spec`` says; a likelihood counts from the start.

    Args:
        spec: which one.
        width: D, of the hidden states.
        lm_head: the language-modelling head of a likelihood head; None: the input embedding, as where weights are tied.
    """

    def __init__(self, spec: RewardHead, width: int, lm_head: nn.Linear | None = None) -> None:
        super().__init__()
        self.spec = spec
        last = nn.Linear(width, 1, bias=False)
        start_head(last, spec.start)
        self.read = nn.Sequential(nn.Linear(width, width), nn.GELU(), last) if spec.kind == "mlp" else last
        if spec.kind == "likelihood":
            self.gate = nn.Linear(width, 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, GATE_BIAS)
            self.lm_head = lm_head
        if spec.pooling == "token":
            self.token = nn.Parameter(0.02 * torch.randn(width))

    def scores(self, hidden: Tensor, batch: Packed, added: Tensor | None, backbone: PreTrainedModel) -> Tensor:
        """Scores (N,) of packed sequences.

        ``hidden`` (T, D), of the ``backbone``; ``added`` (N, D), the states at the added tokens."""
        if self.spec.pooling == "token":
            pooled = added
        elif self.spec.pooling == "last":
            pooled = hidden[batch.ends]
        else:
            positions, mask = self._pooled(batch)
            pooled = (hidden[positions] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        scores: Tensor = self.read(pooled).squeeze(-1)
        if self.spec.kind != "likelihood":
            return scores
        return scores + self._likelihoods(hidden, batch, backbone)[1].sum(-1)

    def values(self, hidden: Tensor, batch: Packed, backbone: PreTrainedModel) -> Tensor:
        """What each token (T,) would score were it the last one: a critic that begins as the reward model.

        An added token is read by none of them: such a head is asked about states that it has not been trained on."""
        if self.spec.pooling in ("mean", "answer"):
            positions, mask = self._pooled(batch)
            steps = torch.arange(1, mask.shape[1] + 1, device=hidden.device)
            so_far = hidden[positions].cumsum(1) / steps[:, None]
            states = torch.zeros_like(hidden).index_copy(0, positions[mask], so_far[mask])
        else:
            states = hidden
        values: Tensor = self.read(states).squeeze(-1)
        if self.spec.kind != "likelihood":
            return values
        flat, likelihoods = self._likelihoods(hidden, batch, backbone)
        mask = response_positions(batch)[1]
        return values.float().index_add(0, flat, likelihoods.cumsum(-1)[mask])

    def _pooled(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """(positions, mask) of the tokens over which the mean is taken, as in :func:`response_positions`."""
        return response_positions(batch, batch.lengths if self.spec.pooling == "mean" else None)

    def _likelihoods(self, hidden: Tensor, batch: Packed, backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """(positions, gated log-likelihoods): (M,) flat indices of the answers' tokens, and (N, T), 0 after an end."""
        positions, mask = response_positions(batch)
        flat = positions[mask]
        before = hidden[predicting_positions(batch)[0][mask]]
        model = language_model(backbone, tied_head(backbone) if self.lm_head is None else self.lm_head)
        below_best = by_token(model, _below_best, before, batch.tokens[flat])
        gated = torch.sigmoid(self.gate(before).squeeze(1).float()) * below_best
        return flat, gated.new_zeros(mask.shape).masked_scatter(mask, gated)


class RewardTransformer(nn.Module):
    """A Transformer without a language-modelling head, and a :class:`ScoreHead`.

    Where others need it, it looks like one of Hugging Face's: ``config``, ``base_model``, ``save_pretrained``."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: PreTrainedModel, score: ScoreHead) -> None:
        super().__init__()
        self.backbone, self.score = backbone, score

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, spec: RewardHead) -> RewardTransformer:
        """A language model with a fresh head in place of its own, which a likelihood head keeps for itself.

        Raises ``UserError`` where a likelihood head cannot have the model's own logits."""
        backbone: Any = policy.base_model
        embedding, lm_head = backbone.get_input_embeddings(), policy.get_output_embeddings()  # type: ignore[no-untyped-call]
        own = lm_head if spec.kind == "likelihood" and lm_head.weight is not embedding.weight else None
        if spec.kind == "likelihood":
            check_logits(language_model(backbone, tied_head(backbone) if own is None else own))
        model = cls(backbone, ScoreHead(spec, embedding.embedding_dim, own).to(policy.device, intended_dtype(policy)))
        keep_format(model, checkpoint_format(policy))
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> RewardTransformer:
        """Load what :meth:`save_pretrained` wrote; within ``loading_as_stored()`` it is to be cast later."""
        folder = Path(folder)
        check_files(folder)
        settings = model_settings(folder)
        weights = load_file(folder / "model.safetensors") if not torch.empty(0).is_meta else {}
        if "trunk" in settings:  # as it was called once
            settings["backbone"] = settings.pop("trunk")
            weights = {re.sub(r"^trunk\.", "backbone.", name): tensor for name, tensor in weights.items()}
        config = AutoConfig.for_model(**settings["backbone"])
        spec = RewardHead(**settings["head"])
        own = weights.get("score.lm_head.weight")
        lm_head = None if own is None else nn.Linear(own.shape[1], own.shape[0], bias="score.lm_head.bias" in weights)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
            rows, width = backbone.get_input_embeddings().weight.shape
            if not weights and spec.kind == "likelihood" and not config.tie_word_embeddings:
                lm_head = nn.Linear(width, rows, bias=False)
            model = cls(backbone, ScoreHead(spec, width, lm_head))
        stored = dtype_as_stored(folder)
        if weights:
            of = model.state_dict()
            wrong = [(n, weights[n].shape, of[n].shape) for n in of.keys() & weights if of[n].shape != weights[n].shape]
            check_tensors(folder, of.keys() - weights.keys(), weights.keys() - of.keys(), wrong)
            parts = {
                p: {n.removeprefix(p): t for n, t in weights.items() if n.startswith(p)}
                for p in ("backbone.", "score.")
            }
            model.backbone = type(backbone).from_pretrained(
                None, config=config, state_dict=parts["backbone."], dtype=stored or dtype
            )
            model.score.load_state_dict(parts["score."], assign=True)
            check_finite(model, folder)
        model.config.update({name: settings[name] for name in SCALE & settings.keys()})
        if stored is None:
            return model.to(dtype)
        intend_dtype(model, dtype)
        return model

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write config.json, which names the head, and model.safetensors, of the weights or of ``state_dict``."""
        note = f"{self.score.spec.kind} head, pooling {self.score.spec.pooling}: lit_rlhf.models.load_reward_model"
        backbone = self.config.to_dict()
        settings = {
            "model_type": MODEL_TYPE,
            "architectures": [type(self).__name__],
            "loads_with": note,
            "head": {"kind": self.score.spec.kind, "pooling": self.score.spec.pooling},
            **{name: backbone.pop(name) for name in sorted(SCALE & backbone.keys())},
            "backbone": backbone,
        }
        folder = make_folder(Path(folder))
        (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in (state_dict or self.state_dict()).items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @property
    def config(self) -> PretrainedConfig:
        """The backbone's, which holds ``score_shift`` too."""
        return self.backbone.config

    @property
    def base_model(self) -> PreTrainedModel:
        """The backbone."""
        return self.backbone

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the backbone."""
        return self.backbone.get_input_embeddings()

    def scores_and_hidden(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Scores (N,) and last hidden states (T, D) of packed sequences."""
        if self.score.spec.pooling == "token":
            hidden, added = self._with_added_token(batch)
        else:
            hidden, added = packed_hidden(self.backbone, batch), None
        return self.score.scores(hidden, batch, added, self.backbone), hidden

    def _with_added_token(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Hidden states (T, D) of the tokens, and (N, D) of a token added behind each sequence.

        Sequences that fill the whole context lose their first token to it."""
        cells, room = batch.tokens.numel(), context_length(self.backbone)
        places, _ = response_positions(batch, batch.lengths)
        rows = [[*row[max(0, n + 1 - room) : n], cells] for row, n in zip(places.tolist(), batch.lengths.tolist())]
        wider = pack(rows, -1).to(batch.tokens.device)  # of the tokens' places; -1: padding
        places = wider.tokens
        embeddings = self.get_input_embeddings()(batch.tokens)
        table = torch.cat([embeddings, self.score.token.to(embeddings.dtype)[None]])
        output = packed_hidden(self.backbone, wider, table[places.clamp(min=0)])
        old = (places >= 0) & (places < cells)
        # Read from one copy of a shared prompt: written from all, each would get the whole gradient.
        copy_of = torch.full((cells,), -1, device=places.device).index_put_((places[old],), old.nonzero().squeeze(1))
        hidden = torch.where(copy_of[:, None] >= 0, output[copy_of], 0.0).to(embeddings.dtype)
        return hidden, output[wider.ends]


def score_scale(model: Any) -> ScoreScale:
    """The scale that a reward model's config.json tells, by ``score_shift``, ``score_mean`` and ``score_std``; of what
    it does not tell 0, 0 and 1."""
    told = {name: getattr(model.config, f"score_{name}", None) for name in ScoreScale._fields}
    return ScoreScale(**{name: float(value) for name, value in told.items() if value is not None})


class RewardEnsemble(nn.Module):
    """Several reward models that score together (arXiv:2310.02743).

    Scores of different models are in different units, so each is first shifted and divided by its own ``score_std``.

    Args:
        members: reward models with one tokenizer.
        combine: "mean" of their scores, or the "worst": an answer earns what the most sceptical of them gives.
    """

    def __init__(self, members: Sequence[Any], combine: Literal["mean", "worst"] = "mean") -> None:
        super().__init__()
        sizes = {len(m.get_input_embeddings().weight) for m in members}
        if len(sizes) > 1:
            raise UserError(f"these reward models cannot be an ensemble: they know {sorted(sizes)} tokens")
        self.members: Any = nn.ModuleList(members)
        self.combine = combine
        self.config: Any = copy.copy(members[0].config)
        self.config.score_shift, self.config.score_std = 0.0, 1.0
        scales = [score_scale(member) for member in members]
        self.config.score_mean = sum(scale.mean / scale.std for scale in scales) / len(scales)

    def get_input_embeddings(self) -> Any:
        """The input embeddings of the first member."""
        return self.members[0].get_input_embeddings()

    def combined(self, scores: Tensor) -> Tensor:
        """Scores (N,) out of those (M, N) of the members."""
        return scores.mean(0) if self.combine == "mean" else scores.amin(0)


@torch.no_grad()
def start_head(last: nn.Linear, start: Literal["zero", "normal"]) -> None:
    """Set the weights of a fresh head's last layer, as :class:`RewardHead` says."""
    last.weight.normal_(std=1 / math.sqrt(last.in_features + 1)) if start == "normal" else last.weight.zero_()


def saved_head(path: str | Path) -> RewardHead | None:
    """The head of a reward model of ours in ``path``; None where that is something else."""
    settings = model_settings(path)
    return RewardHead(**settings["head"]) if settings.get("model_type") == MODEL_TYPE else None


def check_head(found: RewardHead, expected: RewardHead, path: str | Path) -> None:
    """Raise ``UserError`` where a reward model has another head than the settings ask for."""
    if found != expected:
        raise UserError(
            f"{path}: a reward model with a {found.kind} head (pooling {found.pooling}), where reward.head asks for "
            f"{expected.kind} (pooling {expected.pooling}); set reward/head={found.kind} "
            f"reward.head.pooling={found.pooling}, or begin from a language model"
        )


def tied_head(backbone: PreTrainedModel) -> nn.Linear:
    """The output embedding, (..., D) -> (..., V), that is the input's."""
    embedding = effective_weight(backbone.get_input_embeddings())
    head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
    del head.weight  # with adapters the new one is no parameter
    head.weight = embedding
    return head


def _below_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) - max log p (m,), from logits (m, V)."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.amax(1)
