"""vLLM as a rollout engine.

Written against vLLM 0.32. It runs in this process, so weights are handed over as they are, through vLLM's own reloading
of a checkpoint (its worker's ``reload_weights``)."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import tempfile
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import plain_weights
from lit_rlhf.models.policy import context_length, end_tokens
from lit_rlhf.models.precision import compute_dtype
from lit_rlhf.rollouts.engine import Ended, Request, Response, Responses, check_room, padded_responses


class VLLMEngine:
    """Answers by vLLM; one of its models for each architecture that it is asked to sample from.

    Log-probs are vLLM's, close to those of a training pass and not the same (``exact`` is False: PPO computes them
    anew); it does not tell entropies, which are NaN here. Raises ``UserError`` where vLLM is not installed, and where
    training runs in several processes.

    Args:
        gpu_memory: fraction of the GPU's memory that vLLM takes for weights and cache.
        eager: no CUDA graphs and no compilation: it starts sooner and runs slower.
    """

    exact = False
    gives_states = False
    version = 0

    def __init__(self, gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3, eager: bool = False) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("engine=vllm needs the package vllm: pip install 'lit_rlhf[vllm]'; or choose engine=own")
        self.gpu_memory, self.eager = gpu_memory, eager
        self._models: dict[str, Any] = {}  # a model's config -> vLLM's model of that kind

    @torch.no_grad()
    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.policy, self.tokenizer, self.version = policy, tokenizer, self.version + 1
        model = self._model(policy, tokenizer)
        model.collective_rpc("reload_weights", kwargs={"weights_iterator": plain_weights(policy)})
        model.reset_prefix_cache()  # what it remembers of prompts comes from the weights before
        return self.version

    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        from vllm import SamplingParams

        if states:
            raise ValueError("vLLM gives no hidden states; see gives_states")
        for request in requests:
            check_room(self.policy, [request.prompt], request.sampling)
        ends = end_tokens(self.policy, self.tokenizer)
        params = [SamplingParams(**settings_of(request, ends)) for request in requests]
        asked = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self._model(self.policy, self.tokenizer).generate(asked, params, use_tqdm=False)
        drawn = [response_of(output.outputs[0], ends) for output in outputs]
        return padded_responses(drawn, requests, self.tokenizer.pad_token_id, ends, self.version, self.policy.device)

    def _model(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
        config = copy.deepcopy(policy.config)
        config.architectures = [type(policy).__name__]
        config.eos_token_id = tokenizer.eos_token_id
        config.tie_word_embeddings = False  # a tied output embedding is lost when vLLM 0.32 reloads weights
        dtype = str(compute_dtype(policy)).removeprefix("torch.")
        key = f"{dtype} {config.to_json_string(use_diff=False)}"
        if key not in self._models:
            self._models[key] = self._make(config, tokenizer, dtype, context_length(policy))
        return self._models[key]

    def _make(self, config: Any, tokenizer: PreTrainedTokenizerBase, dtype: str, length: int) -> Any:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError("engine=vllm runs in one process: set trainer.devices=1, or choose engine=own")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else weights would have to travel to another process
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return LLM(
                model=folder,
                runner="generate",
                load_format="dummy",  # weights are handed over
                dtype=dtype,
                max_model_len=length if length < 2**31 else None,
                gpu_memory_utilization=self.gpu_memory,
                enforce_eager=self.eager,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
                generation_config="vllm",
            )


def settings_of(request: Request, ends: Collection[int] = ()) -> dict[str, Any]:
    """vLLM's ``SamplingParams`` of a request, whose response ends with any of ``ends`` besides the config's
    end-of-text."""
    _, sampling, seed = request
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": sorted(ends),
        "include_stop_str_in_output": True,  # ids of the tokens that write it stay in the response
        "detokenize": bool(sampling.stop),
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone
    }


def response_of(completion: Any, ends: Collection[int]) -> Response:
    """The response in vLLM's ``CompletionOutput``; it is finished where an end token or a stop text ended it."""
    tokens = list(completion.token_ids)
    logprobs = [position[token].logprob for token, position in zip(tokens, completion.logprobs)]
    ended = Ended.LENGTH
    if completion.finish_reason == "stop":
        ended = Ended.TOKEN if tokens[-1] in ends else Ended.STOP
    return Response(tokens, logprobs, [math.nan] * len(tokens), ended)
