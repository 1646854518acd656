"""A PPO iteration, ours against TRL's PPOTrainer (1.12.0, the last that has it): the same algorithm and settings.

    python benchmarks/ppo.py [--threads 1 2]
    python benchmarks/ppo.py --cases "L, ending early" "L, full length"    # takes longest

Makes an environment of its own with TRL. A lap is one iteration: a rollout, its scoring, and 4 epochs of 4 minibatches
over it, with a critic network of the policy's size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from environment import PPO_TRL, enter

if __name__ == "__main__":
    enter(PPO_TRL)

from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main, vary
from trl_comparison.ours import ADAM_BETAS, ppo_module, prompt_data
from users import BF16, FLOAT32, fit
from workload import NEVER, SHAPES, chance, end_chance, make_models, prompts

from lit_rlhf.models import load_policy, load_reward_model
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule
from lit_rlhf.text import load_tokenizer
from lit_rlhf.training import adamw

LR = 1e-5


@dataclass(frozen=True)
class Case:
    shape: str
    early: bool  # answers end early
    laps: int
    warmup: int = 2  # laps before them, in which memory grows to what is needed
    batch: int = 64  # answers per iteration
    new_tokens: int = 64  # of an answer, at most
    minibatches: int = 4
    epochs: int = 4
    activation: str = "gelu_new"  # of the checkpoint
    precision: str = FLOAT32

    @property
    def end_chance(self) -> float:
        """Of a token to be the last."""
        return end_chance(self.new_tokens) if self.early else NEVER


CASES = {
    "S, ending early": Case("S", early=True, laps=8),
    "S, full length": Case("S", early=False, laps=6),
    "L, ending early": Case("L", early=True, laps=5, warmup=1),
    "L, full length": Case("L", early=False, laps=2, warmup=1),
} | {
    f"135M{', bfloat16' * (precision == BF16)}": Case(
        "135M", early=False, laps=2, warmup=1, batch=16, new_tokens=32, minibatches=2, epochs=2, precision=precision
    )
    for precision in (FLOAT32, BF16)
}


def counted(generate: Callable[..., Any], end: int, lengths: list[float]) -> Callable[..., Any]:
    """``model.generate`` that notes the mean length of the answers."""

    def counting(input_ids: Any, **settings: Any) -> Any:
        output = generate(input_ids=input_ids, **settings)
        ended = output.sequences[:, input_ids.shape[1] :] == end
        lengths.append(((ended.cumsum(1) - ended.long()) == 0).sum().item() / len(ended))
        return output

    return counting


def our_module(case: Case, policy: Path, reward_model: Path, tokenizer: Any, kind: type = PPOModule) -> PPOModule:
    """Our side's module, on the checkpoints in two folders."""
    return ppo_module(
        load_policy(policy, tokenizer), load_reward_model(reward_model, tokenizer), tokenizer, kind=kind,
        sampling=Sampling(case.new_tokens), optimizer=partial(adamw, lr=LR, betas=ADAM_BETAS), critic_lr=LR,
        critic_head_lr=None, ppo_epochs=case.epochs, minibatch_size=case.batch // case.minibatches,
    )  # fmt: skip


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl_comparison.task import Task, train_quietly, trl_trainer

    iterations = laps + case.warmup
    with tempfile.TemporaryDirectory() as folder:
        policy_path, reward_path = make_models(SHAPES[case.shape], Path(folder), case.end_chance, case.activation)
        tokenizer = load_tokenizer(policy_path)
        questions = prompts(iterations * case.batch)

        def ours(end_lap: EndLap) -> None:
            module = our_module(case, policy_path, reward_path, tokenizer)

            def amount(module: Any, parts: list[Any]) -> dict[str, float]:
                logged = module.trainer.callback_metrics
                names = {"length": "response_length", "value_loss": "value_loss"}
                watched = {name: logged[f"ppo/{ours}"].item() for name, ours in names.items()}
                return {"amount": len(parts[0].tokens), **watched}

            fit(
                module, prompt_data(questions, tokenizer, case.batch), -1, end_lap, amount, max_epochs=1,
                log_every_n_steps=1, limit_train_batches=iterations, gradient_clip_val=None, precision=case.precision,
            )  # fmt: skip

        def theirs(end_lap: EndLap) -> None:
            policy, reference = (AutoModelForCausalLM.from_pretrained(policy_path) for _ in range(2))
            reward_model, critic = (AutoModelForSequenceClassification.from_pretrained(reward_path) for _ in range(2))
            lengths: list[float] = []

            class Laps(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    logged = state.log_history[-1]
                    end_lap(case.batch, length=lengths[-1], value_loss=logged["loss/value_avg"])

            trainer = trl_trainer(
                Task(tokenizer, policy, reward_model, questions), policy, reference, critic,
                total_episodes=iterations * case.batch, learning_rate=LR, optim="adamw_torch_fused",
                per_device_train_batch_size=case.batch, num_mini_batches=case.minibatches,
                num_ppo_epochs=case.epochs, response_length=case.new_tokens, bf16=case.precision == BF16,
            )  # fmt: skip
            policy.generate = counted(policy.generate, tokenizer.eos_token_id, lengths)
            trainer.add_callback(Laps())
            train_quietly(trainer)

        found = interleave({OURS: ours, "TRL": theirs}, laps, case.warmup, threads)
    lengths_alike = chance(laps * case.batch) if case.early else 0.05 if case.shape == "135M" else 0.0
    return found, alike(found, length=lengths_alike, value_loss=0.5)


# Three laps, for the value loss of one iteration moves by half.
GROWTH = vary(CASES["S, ending early"], 3, batch=(32, 64, 128), new_tokens=(32, 64, 128), shape=("S", "M", "L"))
WORK = Work("ppo", "answers/s", CASES, measure, ("L, ending early", "L, full length", "135M", "135M, bfloat16"), GROWTH)

if __name__ == "__main__":
    main(WORK, __doc__)
