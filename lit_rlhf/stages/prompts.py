"""Prompts to answer: what sampling, PPO and evaluation have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from lightning import LightningModule
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from lit_rlhf.models.policy import context_length
from lit_rlhf.rollouts import FastEngine, Sampling, fitted, sample
from lit_rlhf.stages.records import RecordDataModule
from lit_rlhf.stages.world import WithoutFiles, WorldFirst
from lit_rlhf.text.chat import encode_prompts, ensure_template
from lit_rlhf.text.records import Messages, PromptRecord, parse_prompt_record, shown
from lit_rlhf.text.rows import Rows
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template import Note
from lit_rlhf.text.template_form import Tools
from lit_rlhf.text.world import Grade, World
from lit_rlhf.training.batches import BatchLoader, dealing, in_order, seeded, sharding

Item = TypeVar("Item")


class PromptBatch(NamedTuple):
    """B prompts. They stay token lists: the rollout engine pads them on the left as it needs them."""

    messages: list[Messages]
    tokens: list[list[int]]
    kinds: list[str]  # what sort of question each is, "" where nobody says
    held_out: list[bool]
    records: list[dict[str, Any]]  # the other fields of each prompt's record


def repeated(batch: PromptBatch, times: int) -> PromptBatch:
    """Each prompt ``times`` times, copies next to each other."""
    return PromptBatch(*([item for item in column for _ in range(times)] for column in batch))


class Judge(Protocol):
    """Protocol of a gold judge, which grades answers."""

    def grade(self, prompt: Messages, response: str, truncated: bool = False) -> Grade:
        """The grade of one answer."""
        ...


def grades_of(
    judge: Judge, prompts: Sequence[Messages], responses: Sequence[str], finished: Sequence[bool]
) -> list[Grade]:
    """The grades of one response to each prompt; ``finished``: False where it was cut off."""
    return [judge.grade(*each, truncated=not whole) for *each, whole in zip(prompts, responses, finished, strict=True)]


class Prompt(NamedTuple):
    """One prompt, ready to be answered."""

    messages: Messages
    tokens: list[int]
    kind: str
    held_out: bool
    record: dict[str, Any]


class SamplePrompt(NamedTuple):
    """A prompt that a model answers while it is trained, for people to read."""

    messages: Messages
    tokens: list[int]


@dataclass(eq=False, repr=False, kw_only=True)
class PromptDataModule(RecordDataModule):
    """Prompts from a file of records with ``prompt`` or ``messages``.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them.
        tokenizer: of the policy, with its chat template.
        batch_size: prompts per process and batch.
        max_length: tokens; longer prompts are handled as ``on_long`` says, and counted.
        on_long: "skip" leaves them out, "cut" keeps their last ``max_length`` tokens.
        held_out: fraction of the prompts kept for evaluation.
        limit_held_out: at most so many of them; None keeps all.
        split_seed: which prompts are held out; the same in every stage.
        special_tokens: what their names mean in prompts: "plain" text; "refuse": a bad record; "rendered": tokens, as a
            prompt is one text that a chat template has written already.
        seed: order of the prompts.
        limit: train on at most so many prompts, to try things out; None: all.
        cache: the folder that keeps records and tokens, which may then be more than memory holds; None: in memory.
        on_bad_record: "fail" names the first bad record, one that the template refuses too; "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    batch_size: Annotated[int, Field(ge=1)] = 128
    max_length: Annotated[int, Field(ge=1)] = 512
    on_long: Literal["skip", "cut"] = "skip"
    limit_held_out: Annotated[int, Field(ge=1)] | None = None
    special_tokens: SpecialTokens = "plain"

    judge: ClassVar[Judge | None] = None  # files come without one; the world brings its own
    parse_record, asked, example = staticmethod(parse_prompt_record), attrgetter("messages"), Prompt
    reads = ("kind",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_prompts: Sequence[Prompt] = []
        self.held_out_prompts: Sequence[Prompt] = []

    def setup(self, stage: str | None = None) -> None:
        if self.held_out_prompts:
            return
        ensure_template(self.tokenizer)
        train, held_out = self.records()
        self._train, self._held_out = train[: self.limit], spread(held_out, self.limit_held_out)
        self.encode()

    def sizes(self) -> dict[str, int]:
        return {"train_prompts": len(self.train_prompts), "held_out_prompts": len(self.held_out_prompts)}

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "gold_judge": self.judge}

    def encode(self) -> None:
        self.long = 0
        self.train_prompts = self.examples_of(self._train, held_out=False)
        self.held_out_prompts = self.examples_of(self._held_out, held_out=True)
        self.check_left("prompts", self.train_prompts, self.held_out_prompts)

    def longest(self) -> int:
        return max(map(self.longest_of, (self.train_prompts, self.held_out_prompts)))

    def sequences(self, item: Prompt) -> list[list[int]]:
        return [item.tokens]

    def encoded(self, records: Sequence[PromptRecord], held_out: bool) -> list[Prompt]:
        prompts = []
        settings = {
            "special_tokens": self.special_tokens,
            "refuse": lambda i, reason: self.refuse(records[i], reason),
            "note": self.note,
        }
        tools = [record.others.get("tools") for record in records]
        encoded = encode_prompts(self.tokenizer, [record.messages for record in records], tools, **settings)
        for (messages, others, _), tokens in zip(records, encoded):
            if len(tokens) > self.max_length:
                self.long += 1
                if self.on_long == "skip":
                    continue
            if tokens:  # else it was refused
                kind = str(others.get("kind") or "")
                prompts.append(Prompt(messages, tokens[-self.max_length :], kind, held_out, others))
        return prompts

    def loader(self, prompts: Sequence[Prompt], shuffle_to: int | None = None) -> BatchLoader[PromptBatch]:
        """Batches of ``prompts``, shared out over the processes: in order, or ``shuffle_to`` of them shuffled."""
        collate = lambda mine, _: _batch(prompts, mine)  # noqa: E731
        if shuffle_to is None:
            return BatchLoader(
                in_order(len(prompts)), self.batch_size, collate, keep_rest=True, **dealing(self.trainer)
            )
        return BatchLoader(self.order(prompts, shuffle_to), self.batch_size, collate, **sharding(self.trainer))

    def sampled(self, prompts: Sequence[Prompt]) -> BatchLoader[PromptBatch]:
        """Batches of ``prompts`` in order, each for one process: what is drawn for a batch follows from its number."""
        size = self.batch_size
        batches = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        deal = dealing(self.trainer)
        if len(batches) < deal.get("world_size", 1):
            self.note(
                f"{len(prompts)} prompts in batches of {size} are {len(batches)} for {deal['world_size']} processes; "
                "with a smaller batch_size all of them have some"
            )
        collate = lambda mine, _: _batch(prompts, batches[mine[0]])  # noqa: E731
        return BatchLoader(in_order(len(batches)), 1, collate, keep_rest=True, **deal)


def _batch(prompts: Sequence[Prompt], places: Sequence[int]) -> PromptBatch:
    return PromptBatch(*(list(column) for column in zip(*(prompts[i] for i in places))))


@dataclass(eq=False, repr=False, kw_only=True)
class WorldPromptDataModule(WithoutFiles, PromptDataModule, WorldFirst):
    """Prompts of the built-in world: ``prompts`` draws by kind to train on, all distinct held-out ones to test on."""

    prompts: Annotated[int, Field(ge=1)] = 4000

    max_length: ClassVar[int] = 512
    on_long: ClassVar[str] = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judge = self.world

    def records(self) -> tuple[list[PromptRecord], list[PromptRecord]]:
        train = self.world.sample_prompts(self.prompts, self.seed, split="train", split_seed=self.split_seed)
        records = [PromptRecord(list(prompt.messages), {"kind": prompt.kind}) for prompt in train]
        return records, held_out_records(self.world, self.split_seed)


def held_out_records(world: World, split_seed: int) -> list[PromptRecord]:
    """All distinct held-out prompts of a world."""
    return [PromptRecord(list(p.messages), {"kind": p.kind}) for p in world.prompts("held_out", split_seed)]


def sample_prompts(
    prompts: Sequence[tuple[Messages, Tools]],
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    note: Note,
) -> list[SamplePrompt]:
    """Prompts encoded as the data are, without those that the chat template refuses."""
    messages, tools = [messages for messages, _ in prompts], [tools for _, tools in prompts]
    settings = {"special_tokens": special_tokens, "refuse": lambda i, reason: None, "note": note}
    encoded = encode_prompts(tokenizer, messages, tools, **settings)
    return [SamplePrompt(asked, tokens) for asked, tokens in zip(messages, encoded) if tokens]


def sample_texts(
    module: LightningModule, sampling: Sampling, prompts: Sequence[SamplePrompt], note: Note
) -> list[tuple[str, str]]:
    """(prompt, response) for people to read while ``module`` trains its ``policy``."""
    texts = written(module, sampling, [prompt.tokens for prompt in prompts], note)
    return [(shown(prompt.messages), text) for prompt, text in zip(prompts, texts)]


def written(module: LightningModule, sampling: Sampling, prompts: Sequence[list[int]], note: Note) -> list[str]:
    """Texts that the ``policy`` of ``module``, as it is now, writes behind prompts, for people to read.

    Where the model's context is too short for prompts and responses, ``note`` says how they were cut."""
    if not prompts:
        return []
    policy, training = module.policy, module.policy.training
    tokens, fitting = fitted(policy, prompts, sampling)
    if (cut := tokens != prompts) or fitting != sampling:
        note(
            f"samples while training: the model's context of {context_length(policy)} has room for answers of "
            f"{fitting.max_new_tokens} tokens{', and for the end of the longer prompts' if cut else ''}"
        )
    generator = seeded(module.trainer.global_step)
    policy.eval()
    responses = sample(FastEngine(), policy, module.tokenizer, tokens, fitting, generator)
    policy.train(training)
    return responses.texts(module.tokenizer)


def last_tokens(name: str, prompts: Sequence[list[int]], room: int, note: Note) -> list[list[int]]:
    """The last ``room`` tokens of each prompt as the model ``name`` is asked; ``note`` says where some are cut."""
    if any(len(prompt) > room for prompt in prompts):
        note(f"as {name} writes them, some prompts have more than {room} tokens; it reads the last {room}")
    return [prompt[-room:] for prompt in prompts]


def spread(items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most ``limit`` of the items, evenly spread: a world lists its prompts kind by kind."""
    if limit is None or limit >= len(items):
        return items
    places = [i * len(items) // limit for i in range(limit)]
    return items.at(np.array(places)) if isinstance(items, Rows) else [items[i] for i in places]
