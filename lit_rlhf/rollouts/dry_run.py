"""What an engine takes, in a dry run (:mod:`lit_rlhf.training.dry_run`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import drawn_figures
from lit_rlhf.models.kernels.decoding import CachedDecoder
from lit_rlhf.rollouts.engine import Engine, Request, Responses
from lit_rlhf.rollouts.fast import cache_bytes, make_decoder, rows_that_fit
from lit_rlhf.training.dry_run import Meter, bytes_of


class DryEngine:
    """Takes the memory that another engine would, and answers in tokens 0, as many as are allowed."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self.exact, self.gives_states, self.meter = engine.exact, engine.gives_states, meter
        # Transformers' engine writes one response after the other.
        self.settings = getattr(engine, "settings", {"rows": 1})

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.policy = policy
        return 1

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        prompts, limit = [request.prompt for request in requests], requests[0].sampling.max_new_tokens
        width, known = max(map(len, prompts)) + limit, self.settings
        rows = min(len(prompts), known["rows"] or rows_that_fit(self.policy, width, known["cache_gib"]))
        cache = rows * cache_bytes(self.policy, width)
        self.meter.cache = max(self.meter.cache, cache)
        before = self.meter.live
        decoder = make_decoder(self.policy, rows, width, 0, False)
        # Of a sharded policy all weights are gathered, into what the decoder has laid out where it has its own.
        laid_out = self.meter.live - before - cache if isinstance(decoder, CachedDecoder) else 0
        self.meter.whole = bytes_of(self.policy.parameters()) if self.meter.shards > 1 else 0
        _gathered = torch.empty(max(0, self.meter.whole - laid_out) // 4, device="meta")
        hidden = decoder.begin(prompts[:rows])
        grown = 0 if isinstance(decoder, CachedDecoder) else cache // 4  # its cache grows with what is written
        logits, _ = decoder.logits(hidden).float(), torch.empty(grown, device="meta")
        drawn_figures(logits, logits.softmax(-1), torch.zeros(rows, dtype=torch.int64))
        figures, ended = torch.zeros(len(prompts), limit), torch.zeros(len(prompts), dtype=torch.int64)
        tokens, none = figures.long(), [()] * len(prompts)
        kept = torch.empty(*tokens.shape, hidden.shape[-1], device="meta") if states else None
        return Responses(tokens, tokens == 0, figures, figures, ended, none, states=kept)
