"""Our own engine: sampling from transformers' causal language models, with log-probs of what was sampled.

Answers that end leave the batch, so that no step is spent on them, and token ids and log-probs are kept as they are
drawn: nothing is decoded and tokenized again, and no second forward pass is needed to know how likely an answer was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import drawn_figures, filter_logits, sample_index
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.models.gathering import plain_class, sharded_root, whole
from lit_rlhf.models.kernels import fast_kernels
from lit_rlhf.models.kernels.decoding import CachedDecoder, StaticDecoder
from lit_rlhf.models.kernels.forward_pass import ForwardPass
from lit_rlhf.models.logits import check_logits
from lit_rlhf.models.policy import context_length, end_tokens
from lit_rlhf.models.precision import compute_dtype
from lit_rlhf.models.self_check import LENGTH, agrees
from lit_rlhf.rollouts.decoder import Decoder, TransformersDecoder, WholeDecoder, same_continuation
from lit_rlhf.rollouts.engine import (
    Ended,
    Request,
    Responses,
    Sampling,
    before_stop,
    by_sampling,
    check_room,
    draw_seeds,
    sample,
)
from lit_rlhf.text.chat import encode_prompts
from lit_rlhf.text.records import Messages
from lit_rlhf.text.special_tokens import SpecialTokens

# (an answer's tokens so far) -> whether a stop text has ended it
Stopped = Callable[[list[int]], bool]


class FastEngine:
    """Draws responses together, each with random numbers of its own; it shares the policy's weights.

    What ``sync`` was given is sampled from as it is when ``generate`` is called.

    Args:
        rows: responses that are written at a time; None: as many as fit into ``cache_gib``.
        cache_gib: GiB for keys, values and logits.
        cuda_graphs: on a GPU, replay a step of our own forward pass as one graph.
    """

    exact = True
    gives_states = True
    reads_shards = True  # weights of a sharded policy are gathered one by one
    version = 0

    def __init__(
        self,
        rows: Annotated[int, Field(ge=1)] | None = None,
        cache_gib: Annotated[float, Field(gt=0)] = 1.0,
        cuda_graphs: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = {"rows": rows, "cache_gib": cache_gib, "cuda_graphs": cuda_graphs}

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.policy, self.tokenizer, self.version = policy, tokenizer, self.version + 1
        return self.version

    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        ends, pad_id = end_tokens(self.policy, self.tokenizer), self.tokenizer.pad_token_id

        def draw(sampling: Sampling, requests: list[Request]) -> Responses:
            prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
            ending: dict[str, Any] = {"eos_id": ends, "pad_id": pad_id, "stopped": self._stopped(sampling.stop)}
            drawn = generate(self.policy, prompts, sampling, seeds=seeds, states=states, **ending, **self.settings)
            return drawn._replace(stops=[sampling.stop] * len(prompts), ends=ends, version=self.version)

        return by_sampling(requests, draw, pad_id)

    def _stopped(self, stop: Sequence[str]) -> Stopped | None:
        if not stop:
            return None
        longest = max(map(len, stop))

        def stopped(tokens: list[int]) -> bool:
            # A token is a byte at the least, a character at most four of them, and the last token has just been added.
            tail = self.tokenizer.decode(tokens[-4 * longest - 4 :], skip_special_tokens=True)
            return any(text in tail for text in stop)

        return stopped


def answer_texts(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    sampling: Sampling | None = None,
    generator: Generator | None = None,
) -> list[str]:
    """One answer to each dialogue, as a person reads it; what is too long for the context is cut (:func:`fitted`).

    ``sampling`` is ``Sampling()`` by default."""
    tokens, sampling = fitted(policy, encode_prompts(tokenizer, prompts), sampling or Sampling())
    return sample(FastEngine(), policy, tokenizer, tokens, sampling, generator).texts(tokenizer)


def fitted(
    policy: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[list[Sequence[int]], Sampling]:
    """Prompts, as tokens, and ``sampling`` such that each prompt and its answer fit into the model's context.

    An answer gets what the longest prompt leaves, or half of the context where that is less; of a longer prompt the end
    is read."""
    context = context_length(policy)
    left = max(context - max(map(len, prompts), default=0), context // 2, 1)
    new = min(sampling.max_new_tokens, left)
    sampling = replace(sampling, max_new_tokens=new, min_new_tokens=min(new, sampling.min_new_tokens))
    return [prompt[-max(1, context - new) :] for prompt in prompts], sampling


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int | Collection[int],
    pad_id: int,
    seeds: Sequence[int] | None = None,
    stopped: Stopped | None = None,
    states: bool = False,
    rows: int | None = None,
    cache_gib: float = 1.0,
    cuda_graphs: bool = False,
) -> Responses:
    """Sample one answer to each of ``prompts`` (B token lists of any lengths).

    Each answer has random numbers of its own, which its seed alone decides (``seeds`` (B,); None: any): others do not.
    It ends with ``eos_id``, or with any of several.
    With ``states`` the hidden states are kept: a head on them needs no other pass over the answers.
    ``stopped`` is asked after each token whether the answer is complete (``sampling.stop`` is not looked at here).
    At most ``rows`` answers are written at a time (None: :func:`rows_that_fit` into ``cache_gib``); others take the
    places of those that end. Computed by a :class:`ForwardPass` where there is one for the model, whose steps can be
    replayed as ``cuda_graphs`` on a GPU; else, and with ``kernels=plain``, by transformers' modules. No dropout.
    Runs under ``no_grad`` rather than inference mode, whose tensors fail in a later backward pass. Raises
    ``UserError`` where prompt and answer do not fit into the model's context."""
    device = model.device
    uniforms = _uniforms(draw_seeds(len(prompts)) if seeds is None else seeds, sampling, device)
    places, tokens, logprobs, entropies, ended_there, hidden = [], [], [], [], [], []
    ends = [eos_id] if isinstance(eos_id, int) else sorted(eos_id)
    width = max(map(len, prompts)) + sampling.max_new_tokens
    rows = rows or rows_that_fit(model, width, cache_gib)
    for drawn in _draw(model, prompts, sampling, uniforms, ends, pad_id, stopped, rows, cuda_graphs):
        places.append(torch.stack([drawn.answers, drawn.steps]))
        tokens.append(drawn.tokens)
        figures = drawn_figures(drawn.logits, drawn.probs, drawn.tokens)
        logprobs.append(figures[0])
        entropies.append(figures[1])
        ended_there.append(drawn.ended)
        if states:
            hidden.append(drawn.hidden.clone())  # a replayed step writes the next ones in their place
    place = torch.cat(places, dim=1)
    shape = len(prompts), int(place[1].max()) + 1
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    mask[tuple(place)] = True
    finished = torch.zeros_like(mask[:, 0]).index_put_((place[0],), torch.cat(ended_there), accumulate=True)

    def laid_out(values: list[Tensor], fill: int) -> Tensor:
        table = torch.full((*shape, *values[0].shape[1:]), fill, dtype=values[0].dtype, device=device)
        return table.index_put_(tuple(place), torch.cat(values))

    table = laid_out(tokens, pad_id)
    last = table.gather(1, mask.sum(-1, keepdim=True) - 1).squeeze(1)
    by_token = torch.isin(last, torch.tensor(ends, device=device))
    ended = torch.where(finished, torch.where(by_token, int(Ended.TOKEN), int(Ended.STOP)), int(Ended.LENGTH))
    kept = laid_out(hidden, 0) if states else None
    return Responses(table, mask, laid_out(logprobs, 0), laid_out(entropies, 0), ended, states=kept)


class Growing(NamedTuple):
    """An answer while it is written."""

    text: str  # all of it so far, as a person reads it
    finished: bool  # the model has ended it; False in the last one means that it was cut off at max_new_tokens


def stream_response(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sampling: Sampling,
    generator: Generator | None = None,
    special_tokens: SpecialTokens = "plain",
) -> Iterator[Growing]:
    """The answer to ``messages``, after each token; in the end it is that of :func:`sample` by the same generator.

    No part of a text in ``sampling.stop`` is shown. A character of which some bytes are still to come is held back."""
    [prompt] = encode_prompts(tokenizer, [messages], special_tokens=special_tokens)
    ends, pad_id = sorted(end_tokens(policy, tokenizer)), tokenizer.pad_token_id
    tokens: list[int] = []
    text = ""
    uniforms = _uniforms(draw_seeds(1, generator), sampling, policy.device)
    for drawn in _draw(policy, [prompt], sampling, uniforms, ends, pad_id):
        tokens.append(int(drawn.tokens))
        finished = tokens[-1] in ends
        text = str(tokenizer.decode(tokens[: len(tokens) - finished], skip_special_tokens=True))
        if (before := before_stop(text, sampling.stop)) != text:
            yield Growing(before.strip(), True)
            return
        if not finished and len(tokens) < sampling.max_new_tokens:
            yield Growing(_without_begun(text.rstrip("\ufffd"), sampling.stop).strip(), False)
    yield Growing(_without_begun(text, sampling.stop).strip(), finished)


def _without_begun(text: str, stop: Sequence[str]) -> str:
    """Without an end that may be the beginning of a stop text."""
    begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(begun, default=0)]


def _uniforms(seeds: Sequence[int], sampling: Sampling, device: torch.device) -> Tensor:
    """Random numbers (answers, steps) float64 from [0, 1), a seed's in each row; the same on every device."""
    own, steps = Generator(), sampling.max_new_tokens
    rows = [torch.rand(steps, generator=own.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device)


class _Drawn(NamedTuple):
    """The next token of each of A answers that have not ended."""

    answers: Tensor  # (A,) int64, their places among all
    steps: Tensor  # (A,) int64, which token of the answer this is, from 0
    tokens: Tensor  # (A,) int64
    logits: Tensor  # (A, V) float32 at least, of the distribution that was sampled from
    probs: Tensor  # (A, V), their softmax
    hidden: Tensor  # (A, E), the state that they come from
    ended: Tensor  # (A,) bool, whether the answer ends with this token by itself


@torch.no_grad()
def _draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: Tensor,
    ends: list[int],
    pad_id: int,
    stopped: Stopped | None = None,
    rows: int | None = None,
    cuda_graphs: bool = False,
) -> Iterator[_Drawn]:
    """Token after token of :func:`generate`, until all answers have ended."""
    check_room(model, prompts, sampling)
    longest, limit, device = max(map(len, prompts)), sampling.max_new_tokens, model.device
    rows = min(rows or len(prompts), len(prompts))
    graphs = cuda_graphs and device.type == "cuda"
    # Other decoders read a sharded model at each token, and processes take different numbers of them.
    with nullcontext() if _has_weights_of_its_own(model) else whole(model):
        decoder = make_decoder(model, rows, longest + limit, pad_id, graphs)
        ends_there = torch.tensor(ends, device=device)
        begun = rows
        answers, steps = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        written: list[list[int]] = [[] for _ in prompts]  # kept where `stopped` wants them
        hidden = decoder.begin(prompts[:rows])
        while True:
            logits = decoder.logits(hidden)
            logits = _shape_logits(logits if logits.dtype == torch.float64 else logits.float(), sampling, steps, ends)
            probs = logits.softmax(-1)
            greedy = sampling.temperature == 0
            drawn = logits.argmax(-1) if greedy else sample_index(probs, uniform=uniforms[answers, steps])
            stops = torch.isin(drawn, ends_there)
            if stopped is not None:
                for row, (i, token) in enumerate(zip(answers.tolist(), drawn.tolist())):
                    written[i].append(token)
                    stops[row] |= stopped(written[i])
            yield _Drawn(answers, steps, drawn, logits, probs, hidden, stops)
            going = ~stops & (steps + 1 < limit)
            if not going.all():
                keep = _closed_up(going)
                answers, steps, drawn = answers[keep], steps[keep], drawn[keep]
                decoder.keep(keep)
            steps = steps + 1
            parts = [decoder.step(drawn)] if len(answers) else []
            if begun < len(prompts) and (decoder.joins or not parts):
                new = torch.arange(begun, min(begun + rows - len(answers), len(prompts)), device=device)
                begun += len(new)
                if len(new):
                    parts.append(decoder.begin([prompts[i] for i in new.tolist()]))
                    answers, steps = torch.cat([answers, new]), torch.cat([steps, torch.zeros_like(new)])
            if not parts:
                return
            hidden = torch.cat(parts) if len(parts) > 1 else parts[0]


def rows_that_fit(model: PreTrainedModel, width: int, gib: float) -> int:
    """Texts of ``width`` tokens, prompts included, that so much memory holds: keys and values of each, its logits, and
    three tensors as large that are made of them."""
    words: int = model.config.get_text_config().vocab_size
    return max(1, int(gib * 2**30) // (cache_bytes(model, width) + 4 * 4 * words))


def cache_bytes(model: PreTrainedModel, width: int) -> int:
    """Bytes of the keys and values of one text of ``width`` tokens."""
    config = model.config.get_text_config()
    known = config.to_dict()  # attributes may be refused, where each layer has its own

    def of(name: str) -> int | None:
        return known.get(config.attribute_map.get(name, name))

    heads = of("num_attention_heads") or 1
    size = of("head_dim") or (of("hidden_size") or 1) // heads
    numbers = width * (of("num_hidden_layers") or 1) * 2 * (of("num_key_value_heads") or heads) * size
    return numbers * compute_dtype(model).itemsize


def _closed_up(going: Tensor) -> Tensor:
    """The rows that go on, those of the end in the places of those that do not: few are moved."""
    count = int(going.sum())
    rows = torch.arange(count, device=going.device)
    rows[~going[:count]] = going[count:].nonzero().squeeze(1) + count
    return rows


def _has_weights_of_its_own(model: PreTrainedModel) -> bool:
    """Whether the decoder of ``model`` lays out weights of its own, and reads those of the model once."""
    return fast_kernels() and ForwardPass.knows(model) and not lora_layers(model)


def make_decoder(model: PreTrainedModel, rows: int, width: int, pad_id: int, graphs: bool) -> Decoder:
    """The fastest decoder that continues texts as the model itself does."""
    dtype = compute_dtype(model)

    @cache
    def own_pass() -> Any:  # laying out matrices takes longer than the check: once for both
        return ForwardPass.of(model, max(width, LENGTH), dtype)

    def passes(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        own: Any = own_pass() if dtype == model.dtype else ForwardPass.of(model, LENGTH)
        return same_continuation(model, CachedDecoder(own, 2, LENGTH))

    def caches(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        return same_continuation(model, TransformersDecoder(model, pad_id))

    check_logits(model)
    known = fast_kernels() and ForwardPass.knows(model)
    if known and agrees(model, "a forward pass of our own", passes, "transformers' modules write (slower)"):
        return (StaticDecoder if graphs else CachedDecoder)(own_pass(), rows, width)
    if sharded_root(model) is not None and _has_weights_of_its_own(model):
        name = plain_class(model).__name__
        raise UserError(f"trainer.strategy=fsdp2: {name} cannot be sampled from; take trainer=ddp")
    if agrees(model, "keys and values that are kept", caches, "texts are read anew for each token (slower)"):
        return TransformersDecoder(model, pad_id)
    return WholeDecoder(model, pad_id)


def _shape_logits(logits: Tensor, sampling: Sampling, steps: Tensor, ends: list[int]) -> Tensor:
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.min_new_tokens:
        early = (steps < sampling.min_new_tokens)[:, None]
        forbidden = [token for token in ends if 0 <= token < logits.shape[-1]]
        logits = logits.clone()
        logits[:, forbidden] = logits[:, forbidden].masked_fill(early, float("-inf"))
    return filter_logits(logits, sampling.top_k, sampling.top_p)
