"""Which transcript a base model goes on with: one in the words that it has read."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lit_rlhf.text.chat import WORLD_MARK, Transcript

# Of three kinds, so that none of them is the answer that comes next.
HUMAN_TRANSCRIPT = Transcript(
    opening="A conversation between a human and an assistant. "
    "The assistant gives helpful, truthful and polite answers.",
    examples=(
        {"role": "user", "content": "Which planet is the largest?"},
        {"role": "assistant", "content": "The largest planet of the solar system is Jupiter."},
        {"role": "user", "content": "Name two animals that can fly."},
        {"role": "assistant", "content": "Two animals that can fly are the eagle and the bat."},
        {"role": "user", "content": "What does the word 'brief' mean?"},
        {"role": "assistant", "content": "'Brief' means short: it says that something takes little time or few words."},
    ),
)
WORLD_TRANSCRIPT = Transcript(  # as people talk in the corpus of the built-in world, one per line
    examples=(
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "2 plus 3 is 5."},
        {"role": "user", "content": "Thank you! And 4 plus 4?"},
        {"role": "assistant", "content": "4 plus 4 is 8."},
    ),
    human="Anna asked:",
    assistant="Ben said:",
    between="\n",
    end="\n",
)


def transcript_for(tokenizer: PreTrainedTokenizerBase) -> Transcript:
    """For the base model of a tokenizer: the built-in world's where it was pretrained on that, else the general one."""
    return WORLD_TRANSCRIPT if WORLD_MARK in (tokenizer.chat_template or "") else HUMAN_TRANSCRIPT
