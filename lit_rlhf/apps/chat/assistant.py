"""A model that one can talk to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import context_length, freeze, load_policy_and_tokenizer
from lit_rlhf.rollouts import Growing, Sampling, stream_response
from lit_rlhf.text import Transcript, encode_prompts, is_base, transcript_for
from lit_rlhf.text.records import Messages
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.training.batches import seeded


@dataclass(frozen=True)
class Assistant:
    """A model with the way in which it is prompted."""

    name: str  # what it is called where it may be named
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...] = ()  # texts before which an answer ends, beside the end tokens
    special_tokens: SpecialTokens = "plain"  # what their names mean in what is said

    def answer(self, messages: Messages, sampling: Sampling, seed: Sequence[int]) -> Iterator[Growing]:
        """The answer after each token; the same numbers in ``seed`` give the same answer."""
        generator = seeded(*seed)
        settings = replace(sampling, stop=self.stops)
        return stream_response(self.policy, self.tokenizer, messages, settings, generator, self.special_tokens)

    def fits(self, messages: Messages, new_tokens: int) -> bool:
        """Whether the model can see the whole prompt and write so many tokens."""
        [prompt] = encode_prompts(self.tokenizer, [messages], special_tokens=self.special_tokens)
        return len(prompt) + new_tokens <= context_length(self.policy)


def load_assistant(
    name: str,
    path: str | Path,
    transcript: Transcript | None = None,
    device: str = "cpu",
    special_tokens: SpecialTokens = "plain",
) -> Assistant:
    """The model in a folder (or of a Hub name). A base model, which knows no turns, is shown a ``transcript``.

    None: the one in the words that it has read."""
    policy, tokenizer = load_policy_and_tokenizer(path)
    try:
        freeze(policy.to(device))
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        raise UserError(f"chat.device={device}: {str(error).splitlines()[0]}") from None
    if is_base(tokenizer):
        transcript = transcript or transcript_for(tokenizer)
        print(f"{name} is a base model: it goes on with {transcript}")
        return Assistant(name, policy, transcript.prompting(tokenizer), transcript.stops, special_tokens)
    return Assistant(name, policy, tokenizer, special_tokens=special_tokens)


def fit_dialogue(messages: Messages, assistants: Sequence[Assistant], sampling: Sampling) -> tuple[Messages, int]:
    """(the dialogue without its oldest turns, so that it fits each model's context; how many messages were dropped).

    The system message stays. Raises ``UserError`` where the last turn alone is too long."""
    start = 1 if messages[0]["role"] == "system" else 0
    for dropped in range(0, len(messages) - start, 2):
        kept = [*messages[:start], *messages[start + dropped :]]
        if all(assistant.fits(kept, sampling.max_new_tokens) for assistant in assistants):
            return kept, dropped
    context = min(context_length(assistant.policy) for assistant in assistants)
    raise UserError(
        f"this message is too long: with an answer of up to {sampling.max_new_tokens} tokens it does not fit into the "
        f"model's context of {context}; shorten it, or allow fewer new tokens"
    )
