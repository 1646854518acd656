"""vLLM as a rollout engine, in the place of :func:`lit_rlhf.models.answer`.

Written against vLLM 0.32. It runs in this process, so weights are handed over as they are, through vLLM's own reloading
of a checkpoint (its worker's ``reload_weights``), before each batch of prompts: there is no update to forget."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Collection, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import plain_weights
from lit_rlhf.models.generation.engine import check_room
from lit_rlhf.models.generation.sampling import Responses, Sampling, seeds
from lit_rlhf.models.onednn import compute_dtype
from lit_rlhf.models.policy import context_length, end_tokens


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

    def __init__(self, gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3, eager: bool = False) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("engine=vllm needs the package vllm: pip install 'lit_rlhf[vllm]'; or choose engine=own")
        self.gpu_memory, self.eager = gpu_memory, eager
        self._models: dict[str, Any] = {}  # a model's config -> vLLM's model of that kind

    @torch.no_grad()
    def __call__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: Generator | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Responses:
        """One answer to each of ``prompts``, as :func:`lit_rlhf.models.answer` gives them."""
        check_room(policy, prompts, sampling)
        from vllm import SamplingParams

        model = self._model(policy, tokenizer)
        model.collective_rpc("reload_weights", kwargs={"weights_iterator": plain_weights(policy)})
        model.reset_prefix_cache()  # what it remembers of prompts comes from the weights before
        ends = end_tokens(policy, tokenizer)
        params = [SamplingParams(**request(sampling, seed, ends)) for seed in seeds(len(prompts), generator, shard)]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        drawn = [drawn_of(output.outputs[0]) for output in model.generate(asked, params, use_tqdm=False)]
        return responses(drawn, tokenizer.pad_token_id, sampling, policy.device)._replace(ends=ends)

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


class Drawn(NamedTuple):
    """One answer."""

    tokens: list[int]
    logprobs: list[float]  # nats
    finished: bool


def request(sampling: Sampling, seed: int, ends: Collection[int] = ()) -> dict[str, Any]:
    """vLLM's ``SamplingParams`` of one answer, which ends with any of ``ends`` besides the config's end-of-text."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_tokens": sampling.min_new_tokens,
        "max_tokens": sampling.max_new_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": sorted(ends),
        "include_stop_str_in_output": True,  # ids of the tokens that write it stay in the answer
        "detokenize": bool(sampling.stop),
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone
    }


def drawn_of(completion: Any) -> Drawn:
    """What vLLM's ``CompletionOutput`` says; it is finished where an end token or a stop text ended it."""
    tokens = list(completion.token_ids)
    logprobs = [position[token].logprob for token, position in zip(tokens, completion.logprobs)]
    return Drawn(tokens, logprobs, completion.finish_reason == "stop")


def responses(drawn: Sequence[Drawn], pad_id: int, sampling: Sampling, device: torch.device) -> Responses:
    """Answers side by side, padded on the right."""

    def laid_out(rows: list[list[Any]], fill: int, dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(r, dtype=dtype) for r in rows], batch_first=True, padding_value=fill)

    tokens = laid_out([d.tokens for d in drawn], pad_id, torch.int64)
    mask = laid_out([[1] * len(d.tokens) for d in drawn], 0, torch.bool)
    logprobs = laid_out([d.logprobs for d in drawn], 0, torch.float32)
    entropy = torch.zeros_like(logprobs).masked_fill_(mask, torch.nan)
    finished = torch.tensor([d.finished for d in drawn])
    return Responses(*(x.to(device) for x in (tokens, mask, logprobs, entropy, finished)), sampling.stop)
