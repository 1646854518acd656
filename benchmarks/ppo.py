"""A PPO iteration, ours against TRL's PPOTrainer (1.12.0, the last that has it): the same algorithm and settings.

    python benchmarks/ppo.py [--cases "S, ending early"] [--threads 1 2]

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

from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main
from users import fit
from workload import END_CHANCE, NEVER, SHAPES, chance, make_models, prompts

from lit_rlhf.models import Sampling, load_policy, load_reward_model
from lit_rlhf.text import load_tokenizer

WARMUP = 1
LR, BETAS = 1e-5, (0.9, 0.95)


@dataclass(frozen=True)
class Case:
    shape: str
    end_chance: float  # of a token to be the last
    laps: int
    batch: int = 64  # answers an iteration
    new_tokens: int = 64  # of an answer, at most
    minibatches: int = 4
    epochs: int = 4
    activation: str = "gelu_new"  # of the checkpoint


CASES = {
    "S, ending early": Case("S", END_CHANCE, laps=5),
    "S, full length": Case("S", NEVER, laps=3),
    "L, ending early": Case("L", END_CHANCE, laps=2),
    "L, full length": Case("L", NEVER, laps=2),
}


def counted(generate: Callable[..., Any], end: int, lengths: list[float]) -> Callable[..., Any]:
    """``model.generate`` that notes the mean length of the answers."""

    def counting(input_ids: Any, **settings: Any) -> Any:
        output = generate(input_ids=input_ids, **settings)
        ended = output.sequences[:, input_ids.shape[1] :] == end
        lengths.append(((ended.cumsum(1) - ended.long()) == 0).sum().item() / len(ended))
        return output

    return counting


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl_comparison.curves import our_module, our_prompts
    from trl_comparison.task import Task, train_quietly, trl_trainer

    iterations = laps + WARMUP
    with tempfile.TemporaryDirectory() as folder:
        policy_path, reward_path = make_models(SHAPES[case.shape], Path(folder), case.end_chance, case.activation)
        tokenizer = load_tokenizer(policy_path)
        questions = prompts(iterations * case.batch)

        def ours(end_lap: EndLap) -> None:
            from lit_rlhf.training import adamw

            task = Task(tokenizer, load_policy(policy_path), load_reward_model(reward_path, tokenizer), questions)
            module = our_module(
                task, task.policy, task.reward_model, sampling=Sampling(case.new_tokens),
                optimizer=partial(adamw, lr=LR, betas=BETAS), critic_lr=LR, ppo_epochs=case.epochs,
                minibatch_size=case.batch // case.minibatches,
            )  # fmt: skip

            def amount(module: Any, batch: Any) -> dict[str, float]:
                logged = module.trainer.callback_metrics
                names = {"length": "response_length", "value_loss": "value_loss"}
                watched = {name: logged[f"ppo/{ours}"].item() for name, ours in names.items()}
                return {"amount": len(batch.tokens), **watched}

            fit(
                module, our_prompts(task, case.batch, 0), -1, end_lap, amount, max_epochs=1, log_every_n_steps=1,
                limit_train_batches=iterations, gradient_clip_val=None,
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
                num_ppo_epochs=case.epochs, response_length=case.new_tokens,
            )  # fmt: skip
            policy.generate = counted(policy.generate, tokenizer.eos_token_id, lengths)
            trainer.add_callback(Laps())
            train_quietly(trainer)

        found = interleave({OURS: ours, "TRL": theirs}, laps, WARMUP, threads)
    lengths_alike = chance(laps * case.batch) if case.end_chance > NEVER else 0.0
    return found, alike(found, length=lengths_alike, value_loss=0.5)


WORK = Work("ppo", "answers/s", CASES, measure)

if __name__ == "__main__":
    main(WORK, __doc__)
