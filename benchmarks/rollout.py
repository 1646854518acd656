"""Our rollout engine against transformers' ``generate`` with scores, from which log-probs are taken as TRL does it.

    python benchmarks/rollout.py [--cases "S, ending early"] [--threads 1 2]

Both sample from the same checkpoint, prompts of 8 to 32 tokens padded on the left; a lap is one rollout. In the
cases "by plain kernels" the other side is our engine, too, through transformers' modules (``kernels=plain``)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main, vary
from transformers import AutoModelForCausalLM, GenerationConfig
from workload import NEVER, SHAPES, chance, end_chance, make_models, prompts

from lit_rlhf.models import load_policy
from lit_rlhf.models.kernels import Kernels, use_kernels
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.text import load_tokenizer
from lit_rlhf.text.packing import left_pad

WARMUP = 3


@dataclass(frozen=True)
class Case:
    shape: str
    early: bool  # answers end early
    laps: int
    batch: int = 64  # answers per rollout
    new_tokens: int = 64  # at most
    activation: str = "gelu_new"  # of the checkpoint
    peer: str = "transformers"  # or PLAIN
    dtype: str = "float32"  # of both sides' models

    @property
    def end_chance(self) -> float:
        """Of a token to be the last."""
        return end_chance(self.new_tokens) if self.early else NEVER


PLAIN = "kernels=plain"
CASES = {
    "S, ending early": Case("S", early=True, laps=15),
    "S, full length": Case("S", early=False, laps=10),
    "L, ending early": Case("L", early=True, laps=5),
    "L, full length": Case("L", early=False, laps=5),
}
SIZES = {"64 x 32": (64, 3), "4 x 32": (4, 8)}  # answers and tokens of each: answers, laps
CHECKPOINT = {
    f"135M, {name}{', bfloat16' * (dtype == 'bfloat16')}": Case(
        "135M", early=False, laps=laps, batch=batch, new_tokens=32, dtype=dtype
    )
    for dtype in ("float32", "bfloat16")
    for name, (batch, laps) in SIZES.items()
}
CASES |= {f"{name}, by plain kernels": replace(case, peer=PLAIN) for name, case in CASES.items()} | CHECKPOINT


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    batches = [prompts(case.batch, seed) for seed in range(laps + WARMUP)]
    with tempfile.TemporaryDirectory() as folder:
        policy, _ = make_models(SHAPES[case.shape], Path(folder), case.end_chance, case.activation)
        tokenizer = load_tokenizer(policy)
        ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}

        def ours(end_lap: EndLap, kernels: Kernels = "fast") -> None:
            use_kernels(kernels)
            model = load_policy(policy, tokenizer, dtype=case.dtype).eval()
            for batch in batches:
                answers = generate(model, batch, Sampling(case.new_tokens), seeds=range(len(batch)), **ends)
                logprobs, tokens = answers.logprobs.sum().item(), answers.mask.sum().item()
                end_lap(tokens, logprob=logprobs / tokens, answers=len(answers.tokens))

        def theirs(end_lap: EndLap) -> None:
            model = AutoModelForCausalLM.from_pretrained(policy, dtype=case.dtype).eval()
            settings = GenerationConfig(
                max_new_tokens=case.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=ends["eos_id"], pad_token_id=ends["pad_id"],
            )  # fmt: skip
            for batch in batches:
                tokens, mask = left_pad(batch, ends["pad_id"])
                with torch.no_grad():
                    output = model.generate(
                        input_ids=tokens, attention_mask=mask.long(), generation_config=settings,
                        return_dict_in_generate=True, output_scores=True,
                    )  # fmt: skip
                    answers = output.sequences[:, tokens.shape[1] :]
                    logprobs = torch.stack(output.scores, 1).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
                ended = answers == ends["eos_id"]
                real = (ended.cumsum(1) - ended.long()) == 0
                end_lap(real.sum().item(), logprob=logprobs[real].mean().item(), answers=len(answers))

        other = theirs if case.peer == "transformers" else partial(ours, kernels="plain")
        found = interleave({OURS: ours, case.peer: other}, laps, WARMUP, threads)
    # A Llama's chance of ending is one in its vocabulary: an answer in hundreds ends early.
    amount = chance(laps * case.batch) if case.early else 0.02 if case.shape == "135M" else 0.0
    return found, alike(found, amount=amount, logprob=0.01)


GROWTH = vary(CASES["S, full length"], 3, batch=(16, 64, 256), new_tokens=(32, 64, 128), shape=("S", "M", "L"))
WORK = Work("rollout", "tokens/s", CASES, measure, tuple(CHECKPOINT), GROWTH)

if __name__ == "__main__":
    main(WORK, __doc__)
