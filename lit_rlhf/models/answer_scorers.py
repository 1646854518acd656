"""Reward models that are asked by text: of any make, with a tokenizer of their own, alone or several together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError, say_once
from lit_rlhf.functional import ScoreScale
from lit_rlhf.models.classifier_loading import load_any_classifier, reads_as_ours
from lit_rlhf.models.finite import finite
from lit_rlhf.models.gathering import whole
from lit_rlhf.models.heads import AnyRewardModel, load_reward_model, score_answers
from lit_rlhf.models.loading import Dtype, match_tokenizer
from lit_rlhf.models.lora import base_path
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import context_length, freeze
from lit_rlhf.models.quantization import Quantization
from lit_rlhf.models.reward_head import RewardTransformer, saved_head, score_scale
from lit_rlhf.models.self_check import SHORTER, agrees, texts
from lit_rlhf.text.chat import Transcript, encode_whole, ensure_chat_template, is_base
from lit_rlhf.text.model_folder import is_adapter, model_settings
from lit_rlhf.text.packing import runs
from lit_rlhf.text.records import Messages, text_of
from lit_rlhf.text.special_tokens import text_start
from lit_rlhf.text.template_form import Tools
from lit_rlhf.text.tokenizer import load_reader, load_tokenizer, same_tokens

Layout = Literal["template", "transcript", "pair"]
LAYOUTS: dict[Layout, str] = {
    "template": "as its chat template renders a dialogue",
    "transcript": "as a transcript (Human: ... Assistant: ...)",
    "pair": "prompt and answer as two texts",
}
BatchSize = Annotated[int, Field(ge=1)]
Rows = list[dict[str, list[int]]]  # what a model is given of each dialogue: input_ids, attention_mask and the like


class AnswerScorer(Protocol):
    """Protocol of what scores answers by their texts: a reward model, a judge behind a URL, a reward function.

    It may have a ``name``, the ``score_std`` that divides its scores, and the ``score_mean`` of sampled answers."""

    def __call__(self, prompts: list[Messages], responses: list[str], **record: Any) -> Sequence[float | None]:
        """A score for each answer; None where it says nothing. ``record``: a list for each further field of the
        prompts' records, ``tools`` say, and ``finished``, whether an answer ended by itself."""
        ...


class TextRewardModel(nn.Module):
    """A reward model that was trained here, asked by text: read by its own tokenizer, up to the end of the turn.

    Args:
        model: with any head of ours.
        tokenizer: of that model, with its chat template.
        batch_size: answers per forward pass, at most.
    """

    name = "reward model"

    def __init__(
        self, model: PreTrainedModel | RewardTransformer, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize = 64
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = freeze(model), tokenizer, batch_size
        ensure_chat_template(tokenizer)

    @property
    def score_std(self) -> float | None:
        """Standard deviation of its scores of sampled answers; None where the model does not say."""
        return score_scale(self.model).std if hasattr(self.model.config, "score_std") else None

    @property
    def score_mean(self) -> float:
        """Their mean; 0 where the model does not say."""
        return score_scale(self.model).mean

    def forward(
        self, prompts: list[Messages], responses: list[str], tools: Sequence[Tools] | None = None, **record: Any
    ) -> list[float]:
        with whole(self.model):
            return self.scores(prompts, responses, tools)

    def scores(self, prompts: list[Messages], responses: list[str], tools: Sequence[Tools] | None) -> list[float]:
        """The score of each answer."""
        return score_answers(self.model, self.tokenizer, prompts, responses, self.batch_size, tools).tolist()


class Classifier(TextRewardModel):
    """A sequence classifier of transformers from elsewhere, of any family: the logit of one of its labels is the score.

    It is given the tokens that transformers' own pipeline gives it, but for names of special tokens in what people or
    models wrote, which are characters; of what is longer than its context, the end.

    Args:
        model: read by its own forward pass.
        tokenizer: of that model.
        label: number or name of the label; None: the only one.
        layout: "template": the dialogue as the tokenizer's chat template renders it; "transcript": as ``Human: ...``
            and ``Assistant: ...``; "pair": prompt and answer as two texts. None: the template, where there is one, else
            a transcript.
        batch_size: answers per forward pass, at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: int | str | None = None,
        layout: Layout | None = None,
        batch_size: BatchSize = 64,
    ) -> None:
        nn.Module.__init__(self)
        self.model, self.tokenizer, self.batch_size = freeze(model), tokenizer, batch_size
        self.label = _label(model, label)
        if layout == "template" and is_base(tokenizer):
            raise UserError(f"{model.name_or_path}: its tokenizer has no chat template; layout=transcript or pair")
        self.layout = layout or ("transcript" if is_base(tokenizer) else "template")
        if model.config.pad_token_id is None:  # else the model pools by the one that it has
            if tokenizer.pad_token_id is None:
                raise UserError(
                    f"{model.name_or_path}: its tokenizer has no padding token; load it by text.load_reader"
                )
            match_tokenizer(model, tokenizer, str(model.name_or_path))
        self.pad_id = int(model.config.pad_token_id)
        self.room = min(context_length(model), tokenizer.model_max_length)
        self.starts = len(text_start(tokenizer))
        instead = "texts of one length are read together (slower)"
        self.pads = agrees(model, "texts that are padded and classified", self._padded_and_alone, instead)

    @torch.no_grad()
    def scores(self, prompts: list[Messages], responses: list[str], tools: Sequence[Tools] | None) -> list[float]:
        rows = self._rows(prompts, responses, tools)
        found = [0.0] * len(rows)
        for places in self._batches([len(row["input_ids"]) for row in rows]):
            logits = self._logits([rows[i] for i in places])[:, self.label]
            for i, score in zip(places, finite(logits, "the scores of the reward model").tolist()):
                found[i] = score
        return found

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Which dialogues are read together: those of about one length, or of one length where padding is felt."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for alike in [order] if self.pads else [list(same) for _, same in groupby(order, lengths.__getitem__)]:
            tokens = tokens_at_once(self.model, learning=False)
            yield from (alike[part] for part in runs([lengths[i] for i in alike], tokens, self.batch_size))

    def _logits(self, rows: Rows) -> Tensor:
        """Of all labels, (N, L)."""
        model: Any = self.model
        width = max(len(row["input_ids"]) for row in rows)
        filled = {
            name: torch.tensor(
                [r[name] + [self.pad_id if name == "input_ids" else 0] * (width - len(r[name])) for r in rows],
                device=model.device,
            )
            for name in rows[0]
        }
        logits: Tensor = model(**filled).logits
        return logits

    def _rows(self, prompts: list[Messages], responses: list[str], tools: Sequence[Tools] | None) -> Rows:
        if self.layout == "template":
            dialogues = [[*p, {"role": "assistant", "content": r}] for p, r in zip(prompts, responses)]
            rows = [{"input_ids": tokens} for tokens in encode_whole(self.tokenizer, dialogues, tools)]
        else:
            rows = self._written(prompts, responses)
        if any(len(row["input_ids"]) > self.room for row in rows):
            say_once(f"the reward model reads the last {self.room} tokens of dialogues that are longer: its context")
        return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in map(self._cut, rows)]

    def _written(self, prompts: list[Messages], responses: list[str]) -> Rows:
        """In plain text, as the tokenizer begins and ends one by itself; names of its tokens are characters."""
        if any(message.get("tool_calls") for prompt in prompts for message in prompt):
            say_once("the reward model reads calls of tools as JSON: its tokenizer has no chat template for them")
        if self.layout == "pair":
            asked = [text_of(p[0]) if len(p) == 1 else Transcript().text(p) for p in prompts]
            columns = [asked, list(responses)]
        else:
            columns = [
                [Transcript().text([*p, {"role": "assistant", "content": r}]) for p, r in zip(prompts, responses)]
            ]
        encoded = self.tokenizer(*columns, split_special_tokens=True, verbose=False, return_attention_mask=False)
        return [dict(zip(encoded.keys(), row)) for row in zip(*encoded.values())]

    def _cut(self, row: dict[str, list[int]]) -> dict[str, list[int]]:
        """Without what is too much: the beginning, behind the first token where a text begins with one of its own."""
        start = 0 if self.layout == "template" else self.starts
        more = max(0, len(row["input_ids"]) - self.room)
        return {name: [*x[:start], *x[start + more :]] for name, x in row.items()} if more else row

    def _padded_and_alone(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        one, other = texts(model).tolist()
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in (one, other[:SHORTER])]
        return self._logits(rows), torch.cat([self._logits([row]) for row in rows])


@checked
class ScorerEnsemble(nn.Module):
    """Several scorers that score together, each by itself: of any make, with tokenizers of their own.

    Their scores are in different units, so each is centred at its own zero and divided by its own ``score_std``.

    Args:
        members: what scores.
        combine: "mean" of their scores, or the "worst" (arXiv:2310.02743), of those that say something of an answer.
    """

    name, score_std, score_mean = "reward models", 1.0, 0.0

    def __init__(self, members: Sequence[AnswerScorer], combine: Literal["mean", "worst"] = "mean") -> None:
        super().__init__()
        if not members:
            raise UserError("ScorerEnsemble(members=[]): at least one scorer was expected")
        self.members, self.combine = list(members), combine
        self.models = nn.ModuleList([member for member in members if isinstance(member, nn.Module)])
        self.scales = [scale_of(member) for member in members]
        self.score_mean = sum(scale.mean / scale.std for scale in self.scales) / len(members)

    def forward(self, prompts: list[Messages], responses: list[str], **record: Any) -> list[float | None]:
        columns = [member(prompts, responses, **record) for member in self.members]
        found: list[float | None] = []
        for scores in zip(*columns, strict=True):
            said = [scale(score, divide=True) for score, scale in zip(scores, self.scales) if score is not None]
            found.append(None if not said else min(said) if self.combine == "worst" else sum(said) / len(said))
        return found


def scale_of(scorer: AnswerScorer) -> ScoreScale:
    """The scale that a scorer's attributes tell; where it does not say, 0 and 1, and a line says so."""
    std: float | None = getattr(scorer, "score_std", None)
    if std is None:
        named = getattr(getattr(scorer, "model", None), "name_or_path", None) or getattr(scorer, "name", "a scorer")
        say_once(f"{named}: the spread of its scores is not known (score_std), so they count as they are")
    return ScoreScale(mean=float(getattr(scorer, "score_mean", None) or 0.0), std=float(std or 1.0))


def load_scorer(
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    combine: Literal["mean", "worst"] = "mean",
    quantization: Quantization | None = None,
    label: int | str | None = None,
    layout: Layout | None = None,
    score_std: Annotated[float, Field(gt=0)] | None = None,
    batch_size: BatchSize = 64,
) -> AnyRewardModel | TextRewardModel | ScorerEnsemble:
    """A reward model for answers that are written in the tokens of ``tokenizer``; from a list of paths, an ensemble.

    One that was made for those tokens, and for that chat template, reads the tokens themselves: see
    :func:`load_reward_model`. Any other reads answers as text, by its own tokenizer, and a line says so: one from here
    as :class:`TextRewardModel`, one from elsewhere as :class:`Classifier`, which ``label`` and ``layout`` are for.
    ``score_std``: standard deviation of its scores of sampled answers; None: as its config.json says."""
    paths = [path] if isinstance(path, str | Path) else list(path)
    if label is None and layout is None and all(_reads_tokens(p, tokenizer) for p in paths):
        model = load_reward_model(path, tokenizer, dtype, combine=combine, quantization=quantization)
        if score_std is not None:
            model.config.score_std = score_std
        return model
    if quantization is not None:
        raise UserError(
            f"{paths[0]}: quantization={quantization} is for reward models that read the policy's own tokens"
        )
    members = [_load_reader(p, dtype, label, layout, score_std, batch_size) for p in paths]
    return members[0] if len(members) == 1 else ScorerEnsemble(members, combine)


def load_scorer_tokenizer(path: str | Path | Sequence[str | Path] | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reward model of any make, of several that of the first; None without a path: who scores is
    behind a URL."""
    first = path if isinstance(path, str | Path) else next(iter(path or ()), None)
    return None if first is None else load_reader(first)


def _reads_tokens(path: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a reward model reads the tokens of ``tokenizer`` as they are; without one of its own it does."""
    if tokenizer is None or (saved_head(path) is None and not reads_as_ours(base_path(path))):
        return False
    if Path(path).is_dir() and not _has_tokenizer(path):
        return True
    own = load_reader(path)
    return same_tokens(own, tokenizer) and (is_base(own) or own.chat_template == tokenizer.chat_template)


TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")  # how the names of a tokenizer's files begin


def _has_tokenizer(path: str | Path) -> bool:
    return any(file.name.startswith(TOKENIZER_FILES) for file in Path(path).iterdir())


def _load_reader(
    path: str | Path,
    dtype: Dtype,
    label: int | str | None,
    layout: Layout | None,
    score_std: float | None,
    batch_size: int,
) -> TextRewardModel:
    ours = saved_head(path) is not None or is_adapter(path) or "score_shift" in model_settings(path)
    scorer: Any
    if ours:
        if label is not None or layout is not None:
            raise UserError(
                f"{path}: label and layout are for classifiers from elsewhere; this one was trained here (several "
                "of both kinds: lit_rlhf.models.ScorerEnsemble)"
            )
        tokenizer = load_tokenizer(path)
        model: Any = load_reward_model(path, tokenizer, dtype)
        scorer = TextRewardModel(model, tokenizer, batch_size)
    else:
        if Path(path).is_dir() and not _has_tokenizer(path):
            raise UserError(f"{path}: there is no tokenizer beside this classifier, by which it could read a text")
        tokenizer = load_reader(path)
        scorer = Classifier(load_any_classifier(base_path(path), dtype), tokenizer, label, layout, batch_size)
    if score_std is not None:
        scorer.model.config.score_std = score_std
    how = "by its own tokenizer and chat template" if ours else f"by its own tokenizer, {LAYOUTS[scorer.layout]}"
    say_once(f"{path}: this reward model reads answers as text, {how}")
    made: TextRewardModel = scorer
    return made


def _label(model: PreTrainedModel, label: int | str | None) -> int:
    """The number of a label of a classifier."""
    names = {int(i): str(name) for i, name in (model.config.id2label or {}).items()}
    numbers: dict[Any, int] = {key: i for i, name in names.items() for key in (i, str(i), name)}
    if label is None and len(names) == 1:
        return 0
    if label not in numbers:
        said = "needs to know which one is the score" if label is None else f"has no label {label!r}"
        listed = ", ".join(f"{i} ({name})" for i, name in names.items())
        raise UserError(f"{model.name_or_path}: a classifier of {len(names)} labels {said}; label= one of {listed}")
    return numbers[label]
