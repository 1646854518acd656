"""The reference engine: transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models.policy import end_tokens
from lit_rlhf.rollouts.engine import Ended, Request, Response, Responses, check_room, padded_responses


class TransformersEngine:
    """Draws one response after the other with ``policy.generate``: slow, and what the other engines are held against.

    It shares the policy's weights: what ``sync`` was given is sampled from as it is when ``generate`` is called."""

    exact = True
    gives_states = False
    version = 0

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.policy: Any = policy  # torch gives the attributes of modules no types
        self.tokenizer, self.version = tokenizer, self.version + 1
        return self.version

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        if states:
            raise ValueError("this engine keeps no hidden states; see gives_states")
        ends = end_tokens(self.policy, self.tokenizer)
        responses = [self._one(request, sorted(ends)) for request in requests]
        pad_id, device = self.tokenizer.pad_token_id, self.policy.device
        return padded_responses(responses, requests, pad_id, ends, self.version, device)

    def _one(self, request: Request, ends: list[int]) -> Response:
        prompt, sampling, seed = request
        check_room(self.policy, [prompt], sampling)
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens or None,
            do_sample=sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            stop_strings=list(sampling.stop) or None,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = torch.tensor([list(prompt)], device=self.policy.device)
        with torch.random.fork_rng(devices=[self.policy.device] if self.policy.device.type == "cuda" else []):
            torch.manual_seed(seed)
            reads = {"tokenizer": self.tokenizer} if sampling.stop else {}
            mask = torch.ones_like(tokens)
            with _without_settings(self.policy):
                output = self.policy.generate(tokens, attention_mask=mask, generation_config=settings, **reads)
        response = output.sequences[0, len(prompt) :]
        logprobs = torch.cat(output.scores).float().log_softmax(-1)  # (n, V), of what was sampled from
        entropy = -(logprobs.exp() * logprobs).nan_to_num().sum(-1)  # a token that is ruled out counts 0
        written = response.tolist()
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        stopped = any(stop in text for stop in sampling.stop)
        ended = Ended.TOKEN if written[-1] in ends else Ended.STOP if stopped else Ended.LENGTH
        return Response(written, logprobs.gather(1, response[:, None])[:, 0].tolist(), entropy.tolist(), ended)


@contextmanager
def _without_settings(policy: Any) -> Iterator[None]:
    """Within it ``policy`` has no generation settings of its own, with which ``generate`` fills up those it is given:
    a penalty on repetition, say, samples from another policy than the one that is trained."""
    own, policy.generation_config = policy.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        policy.generation_config = own
