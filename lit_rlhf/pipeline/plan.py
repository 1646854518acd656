"""``stage=plan``: what each stage will need, before anything is trained.

The data is read and the batches are made as in the stage itself; its own code then runs on models without weights
(:mod:`lit_rlhf.training.trace`). Each stage is planned in a process of its own, so that what its data takes is its own.
Answers are not there before a model has written them: those of this run's rankings stand in for them, else the
demonstrations', else answers that fill ``max_new_tokens``."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.apps.plan import Need, Plan
from lit_rlhf.errors import UserError, users_mistake
from lit_rlhf.functional import dpo_loss, ranking_pairs
from lit_rlhf.models import (
    RewardEnsemble,
    adds_to_gradients,
    context_length,
    next_token_logits,
    packed_scores,
    text_loss,
    tokens_at_once,
)
from lit_rlhf.models.blank import Architecture, architecture_of, blank_policy, blank_reward_model
from lit_rlhf.models.kernels.decoding import CachedDecoder
from lit_rlhf.models.kernels.forward_pass import ROWS, ForwardPass
from lit_rlhf.models.kernels.onednn import rows_up_to
from lit_rlhf.models.micro_batches import LEARNING
from lit_rlhf.pipeline.run import make_data
from lit_rlhf.pipeline.settings import planned_stages, resolved
from lit_rlhf.rollouts import Sampling, rows_that_fit
from lit_rlhf.rollouts.decoder import TransformersDecoder
from lit_rlhf.stages.ppo.rollout import Rollout
from lit_rlhf.text import load_tokenizer, write_jsonl
from lit_rlhf.text.packing import pack, runs
from lit_rlhf.training import ModelSettings, quiet, resident_bytes
from lit_rlhf.training.parts import fit_memory
from lit_rlhf.training.trace import KEPT, PREPARED, Heap, Rates, Trace, bytes_of, measure_rates, optimizer_bytes
from lit_rlhf.training.trainer import precision_of

LOOKED_AT = 64  # batches of an epoch among which the largest is sought
STEPS = 3  # traced on the largest batch: a heap has taken its shape after some steps
MET, MET_IN_PPO = 8, 3  # batches, or iterations, whose products are looked at, in place of all of them
DECODED = 5  # steps of a rollout that are traced, in place of all of them
PARTS = 3  # micro-batches of a step that are


@dataclass
class Known:
    """What the plan of a stage tells those of later ones."""

    tokenizer: PreTrainedTokenizerBase | None = None
    answers: list[str] = field(default_factory=list)  # what answers will look like
    lengths: list[int] = field(default_factory=list)  # tokens of them, end-of-text included
    prompts: list[Any] = field(default_factory=list)  # messages that will be answered and ranked


def write_plan(cfg: DictConfig) -> Plan:
    """Plan the whole road, print the table, and write ``plan.json`` into the run's folder."""
    device = _device(cfg)
    timed = device != "cuda" or torch.cuda.is_available()
    usual = precision_of(cfg.trainer.precision, device)
    rates = {usual: apart(_rates, cfg, device, usual) if timed else None}
    plan = Plan(device, usual, torch.get_num_threads(), rates[usual], resident_bytes(), [], {})
    known = Known()
    for name in planned_stages(cfg):
        try:
            precision = precision_of(resolved(cfg, name)["trainer"]["precision"], device)
            if precision not in rates:
                rates[precision] = apart(_rates, cfg, device, precision) if timed else None
            need, known = apart(plan_stage, cfg, name, rates[precision], known)
            plan.stages.append(need)
        except UserError as error:
            plan.unplanned[name] = str(error)
    if not plan.stages:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in plan.unplanned.items()))
    path = Path(cfg.paths.run_dir) / "plan.json"
    plan.write(path)
    print(plan.table())
    print(f"plan: {path}")
    return plan


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns or raises, in a process of its own that begins as this one is now."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_plainly, function, *arguments).result()


def _plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # what Hydra wraps around a user's mistake does not reach another process
        raise users_mistake(error) or error from None


def _device(cfg: DictConfig) -> str:
    wanted = str(cfg.trainer.accelerator)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return {"gpu": "cuda"}.get(wanted, wanted)


def _rates(cfg: DictConfig, device: str, precision: str) -> Rates:
    architecture = _architecture(cfg, None)
    config = AutoConfig.for_model(**architecture) if isinstance(architecture, dict) else architecture
    half = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = half.get(precision.split("-")[0], torch.float32)
    return measure_rates(config.hidden_size, torch.device(device), dtype)


def plan_stage(cfg: DictConfig, name: str, rates: Rates | None, known: Known) -> tuple[Need, Known]:
    """What a stage needs, and what it tells later ones."""
    quiet()
    settings = OmegaConf.create(resolved(cfg, name))
    before = resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(_data_settings(cfg, name, settings, known, Path(folder)), name)
    known = copy.copy(known)
    known.tokenizer = data.tokenizer
    book = Book(cfg, name, settings, data, known, rates, before)
    try:
        getattr(book, name)()
    except (RuntimeError, NotImplementedError) as error:  # a model whose shapes depend on what it computes, say
        raise UserError(f"it cannot run without weights ({str(error).splitlines()[0][:200]})") from error
    return book.need(), known


def _data_settings(cfg: DictConfig, name: str, settings: DictConfig, known: Known, folder: Path) -> dict[str, Any]:
    """The settings of the data, with what earlier stages will have made."""
    node: dict[str, Any] = OmegaConf.to_container(settings.data)
    tokenizer = node.get("tokenizer") or {}
    if "path" in tokenizer and not Path(tokenizer["path"]).exists() and known.tokenizer is not None:
        node["tokenizer"] = known.tokenizer
    elif name != "pretrain" and "path" in tokenizer and not Path(tokenizer["path"]).exists() and _checkpoint(cfg):
        node["tokenizer"] = load_tokenizer(_checkpoint(cfg))
    path = node.get("path")
    if name in ("reward", "dpo") and str(path).startswith(str(cfg.paths.runs)) and not Path(str(path)).is_file():
        node["path"] = str(folder / "rankings.jsonl")
        _stand_in(Path(node["path"]), known, resolved(cfg, "preference")["module"]["answers_per_prompt"])
    return node


def _stand_in(path: Path, known: Known, k: int) -> None:
    """Rankings of ``k`` answers to the prompts that will be ranked, in place of those that are not there yet."""
    if not known.prompts or len(set(known.answers)) < k:
        raise UserError("there are no rankings, and no prompts and demonstrations that could stand in for them")
    draw = random.Random(0)
    answers = sorted(set(known.answers))
    rows = [{"prompt": p, "responses": draw.sample(answers, k), "ranks": [*range(1, k + 1)]} for p in known.prompts]
    write_jsonl(path, rows)


def _architecture(cfg: DictConfig, path: str | None) -> Architecture:
    """Of the model in ``path``; of one that this run is still to make, that of ``model``."""
    if path is not None and (Path(path).exists() or not str(path).startswith(str(cfg.paths.runs))):
        return architecture_of(path)
    if cfg.model.config is not None:
        return OmegaConf.to_container(cfg.model.config, resolve=True)
    if _checkpoint(cfg) is None:
        raise UserError("model.path is not given; give it as model.path=...")
    return architecture_of(_checkpoint(cfg))


def _checkpoint(cfg: DictConfig) -> str | None:
    return OmegaConf.select(cfg, "model.path")


class Written(NamedTuple):
    """N answers."""

    sequences: list[list[int]]  # N token lists, prompts and answers
    lengths: Tensor  # (N,) int64, of the answers

    def masks(self) -> list[list[bool]]:
        """Which tokens of each sequence are the answer's."""
        sizes = zip(map(len, self.sequences), self.lengths.tolist())
        return [[False] * (size - length) + [True] * length for size, length in sizes]


class Book:
    """The books of one stage: a method a stage, which runs what the stage runs."""

    def __init__(
        self,
        cfg: DictConfig,
        name: str,
        settings: DictConfig,
        data: LightningDataModule,
        known: Known,
        rates: Rates | None,
        resident: int,
    ) -> None:
        self.cfg, self.name, self.settings, self.data, self.known, self.rates = cfg, name, settings, data, known, rates
        self.resident = resident  # bytes, of the process before the data was read
        self.tokenizer: PreTrainedTokenizerBase = data.tokenizer
        self.draw = random.Random(0)
        self.unit, self.steps, self.step_seconds, self.step_flops, self.seconds = "step", 0, 0.0, 0.0, 0.0
        self.gradients = self.optimizer = self.cache = self.checkpoint = self.activations = 0
        self._state: list[Tensor] = []
        self._prepared: set[Any] = set()  # products of oneDNN that were met
        self._room = 0  # for so many, these and others that are expected
        self._decoded = False  # whether that is so of a rollout's

    # ------------------------------------------------------------------ stages

    def pretrain(self) -> None:
        module = self._module(policy=self._policy(self.settings.policy))
        self._fit(module, lambda rows: text_loss(module.policy, rows))

    def sft(self) -> None:
        module = self._module(policy=self._policy(self.settings.policy))
        self.known.lengths = [sum(item.mask) for item in self.data.train_set]
        self.known.answers = [
            self.tokenizer.decode([t for t, m in zip(item.tokens, item.mask) if m], skip_special_tokens=True).strip()
            for item in self.data.train_set
        ]
        self._fit(module, module.loss)

    def reward(self) -> None:
        module = self._module(reward_model=self._reward_model(self.settings.reward_model))
        self._tell_lengths()
        self._fit(module, lambda b: module.losses(b)[0], lambda b: packed_scores(module.reward_model, b.packed))

    def dpo(self) -> None:
        module = self._module(policy=self._policy(self.settings.policy))
        self._tell_lengths()

        def loss(batch: Any) -> Tensor:
            return dpo_loss(*module.logprobs(batch), ranking_pairs(batch.ranks, batch.prompt_index), module.beta)

        self._fit(module, loss, module.logprobs)

    def preference(self) -> None:
        self.unit = "batch"
        policy = self._policy(self.settings.policy)
        prompts = [*self.data.train_prompts, *self.data.held_out_prompts]
        self.known.prompts = [p.messages for p in prompts]
        self._begin(nn.ModuleList([policy]))
        each = self.settings.module.answers_per_prompt
        sampling = instantiate(self.settings.sampling)
        with self.trace:
            self.step_seconds = self._rollout(policy, self._sample(prompts, self.data.batch_size), each, sampling)[1]
        self.steps = len(self.data.predict_dataloader())
        self.seconds = self.steps * self.step_seconds

    def evaluate(self) -> None:
        self.unit = "batch"
        nodes = {n: node for n, node in self.settings.policies.items() if node is not None and self._coming(n, node)}
        policies = {name: self._policy(node) for name, node in nodes.items()}
        reward_model = self._reward_model(self.settings.reward_model)
        self._begin(nn.ModuleList([*policies.values(), reward_model]))
        settings, sampling = self.settings.module, instantiate(self.settings.sampling)
        prompts = self._sample(self.data.held_out_prompts, self.data.batch_size)
        seconds: dict[tuple[int, int], float] = {}  # models of one size take equally long
        with self.trace:
            for name, policy in policies.items():
                answered = [settings.samples, 1] + [settings.best_of] * (name == "sft" and settings.best_of > 0)
                answered += [settings.samples, 1] * (name == "base" and settings.prompted_base)
                for each in answered:
                    alike = sum(p.numel() for p in policy.parameters()), each
                    if alike not in seconds:
                        written, sampled = self._rollout(policy, prompts, each, sampling)
                        seconds[alike] = sampled + self._look(partial(self._read, reward_model, written))
                    self.step_seconds += seconds[alike]
        self.steps = len(self.data.test_dataloader())
        self.seconds = self.steps * self.step_seconds

    def ppo(self) -> None:
        self.unit = "iteration"
        reward_model = None if self.settings.reward_model is None else self._reward_model(self.settings.reward_model)
        module = self._module(policy=self._policy(self.settings.policy), reward_model=reward_model)
        precision = precision_of(self.settings.trainer.precision, _device(self.cfg))
        module.trainer = SimpleNamespace(precision=precision, global_rank=0, world_size=1, datamodule=None)
        self._begin(module)
        prompts = self._sample(self.data.train_prompts, self.data.batch_size)
        answers = len(prompts) * module.answers_per_prompt
        updates = -(-answers // module.minibatch_size) * module.ppo_epochs
        trainer = self.settings.trainer
        limit = trainer.limit_train_batches
        iterations = limit if isinstance(limit, int) else int(len(self.data.train_dataloader()) * limit)
        self.steps = iterations * (trainer.max_epochs or 1)

        def rollout() -> tuple[Written, float]:
            return self._rollout(module.policy, prompts, module.answers_per_prompt, module.sampling)

        def iteration() -> None:
            written, _ = rollout()
            self._scored(module, written)
            self._update(module, self._experience(module, written))

        with self.trace:
            self._make_state(module)
            self._prepare(self._met([iteration] * MET_IN_PPO), self.steps)
            written, sampling = rollout()
            scoring = self._scored(module, written)
            before = self.trace.flops
            update = self._update(module, self._experience(module, written))
            self.step_flops = self.trace.flops - before
            self.step_seconds = sampling + scoring + updates * update
            self._checkpoint(module)
            held_out = self._sample(self.data.held_out_prompts, self.data.batch_size)
            written, validation = self._rollout(module.policy, held_out, module.held_out.samples, module.sampling)
            validation = 2 * validation + self._scored(module, written)
        validations = 1 + (self.steps // trainer.val_check_interval if trainer.val_check_interval else 0)
        batches = self._batches(self.data.val_dataloader(), trainer.limit_val_batches)
        self.seconds = self.steps * self.step_seconds + validations * batches * validation

    # ------------------------------------------------------------------- parts

    def _policy(self, node: DictConfig) -> PreTrainedModel:
        architecture = OmegaConf.to_container(node.config) if "config" in node else _architecture(self.cfg, node.path)
        return blank_policy(architecture, self.tokenizer, instantiate(node.get("lora")))

    def _reward_model(self, node: DictConfig) -> nn.Module:
        parts = {key: instantiate(node[key]) for key in ("head", "lora") if node.get(key) is not None}
        if "config" in node:
            return blank_reward_model(OmegaConf.to_container(node.config), self.tokenizer, **parts)
        if self.name != "reward":  # it comes out of that stage
            parts["head"] = instantiate(resolved(self.cfg, "reward")["head"])
        paths = [node.path] if isinstance(node.path, str) else list(node.path)
        dtype = getattr(torch, node.get("dtype", "float32"))
        blank = (blank_reward_model(_architecture(self.cfg, path), self.tokenizer, **parts) for path in paths)
        members = [model.to(dtype) for model in blank]
        return members[0] if len(members) == 1 else RewardEnsemble(members)

    def _coming(self, name: str, node: DictConfig) -> bool:
        """Whether a model of ``evaluate.policies`` is there, or comes out of the pipeline."""
        return Path(node.path).exists() or (
            name in ("sft", "ppo") or (name == "base" and self.cfg.model.config is not None)
        )

    def _module(self, **models: Any) -> LightningModule:
        return instantiate(self.settings.module, **models, tokenizer=self.tokenizer, _convert_="all")

    def _begin(self, model: nn.Module) -> None:
        precision = precision_of(self.settings.trainer.precision, _device(self.cfg))
        if precision.endswith("-true"):
            model.to({"bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}[precision.split("-")[0]])
        self.weights = bytes_of(t for t in (*model.parameters(), *model.buffers()) if t.is_meta)
        if "optimizer" in self.settings:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.gradients = bytes_of(trained)
            if not (_device(self.cfg) == "cuda" and self.settings.optimizer.get("offload")):
                each = optimizer_bytes(instantiate(self.settings.optimizer))
                self.optimizer = int(each * sum(p.numel() for p in trained))
        self.held = resident_bytes() - self.resident
        device, trainer = _device(self.cfg), self.settings.trainer
        on_cpu = device == "cpu"
        ModelSettings(  # without what cannot be traced: compiled layers
            trainer.kernels, trainer.get("activation_checkpointing", False), kept_gib=trainer.get("kept_gib", LEARNING)
        ).apply(model, on_cpu)
        fit_memory(self.data, model)
        heap = None if device == "cuda" else Heap.of_this_system()
        self.trace = Trace(model, self.rates, precision, heap, device)

    def _fit(
        self, module: LightningModule, loss: Callable[[Any], Tensor], look: Callable[[Any], Any] | None = None
    ) -> None:
        """Steps on the largest batch that training will see, and a look at the largest of validation."""
        self._begin(module)
        trainer = self.settings.trainer
        loader, val_loader = self.data.train_dataloader(), self.data.val_dataloader()
        micro = self._batches(loader, trainer.limit_train_batches)
        self.steps = (
            trainer.max_steps
            if trainer.max_steps > 0
            else -(-micro // trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
        )
        read, val_read = list(islice(loader, LOOKED_AT)), list(islice(val_loader, LOOKED_AT))
        batches, val_batches = sorted(read, key=_tokens), sorted(val_read, key=_tokens)
        look = look or loss
        with self.trace:
            self._make_state(module)
            steps = self.steps * trainer.accumulate_grad_batches
            met = self._met(partial(self._step, module, *_losses(loss, batch)) for batch in read[: min(MET, steps)])
            self._prepare(met, steps)
            met = self._met(partial(self._look, partial(look, batch)) for batch in val_read[:MET])
            self._prepare(met, self._batches(val_loader, trainer.limit_val_batches))
            for _ in range(STEPS):
                before = self.trace.flops
                seconds = self._step(module, *_losses(loss, batches[-1]))
            usual = _tokens(batches[len(batches) // 2]) / _tokens(batches[-1]) * trainer.accumulate_grad_batches
            self.step_flops = (self.trace.flops - before) * usual
            self._checkpoint(module)
            validation = self._look(lambda: look(val_batches[-1]))
        self.step_seconds = seconds * usual
        validations = 1 + bool(self.settings.validate_first)
        validations += self.steps // trainer.val_check_interval if trainer.val_check_interval else 0
        in_validation = validations * self._batches(val_loader, trainer.limit_val_batches) * validation
        self.seconds = self.steps * self.step_seconds + in_validation

    def _met(self, steps: Iterable[Callable[[], Any]]) -> list[set[Any]]:
        """The products that oneDNN meets in each of some steps, without those for which there is room already.

        A rollout in a step has seen to its own."""
        met = []
        for step in steps:
            self.trace.met.clear()
            step()
            met.append(self.trace.met - self._prepared)
        return met

    def _prepare(self, met: list[set[Any]], steps: int) -> None:
        """Room for what oneDNN prepares in so many steps, of which ``met`` is a sample."""
        self._make_room(distinct(met, steps))
        self._prepared.update(*met)

    def _make_room(self, products: int) -> None:
        if self.trace.heap is not None:
            for _ in range(min(KEPT - self._room, products)):
                self.trace.hold(PREPARED)
                self._room += 1

    def _batches(self, loader: Any, limit: int | float) -> int:
        return min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)

    def _step(self, module: nn.Module, *losses: Callable[[], Tensor]) -> float:
        """Seconds of forward and backward passes, one behind the other, and the optimizer's step, in the trainer's
        order."""
        before, flops = self.trace.seconds, self.trace.flops
        for loss in losses[:PARTS]:
            static = self.trace.live
            with adds_to_gradients(module):
                value = loss()
            self.activations = max(self.activations, self.trace.live - static)
            value.backward()
            del value
        more = max(0, len(losses) - PARTS) / PARTS
        self.trace.seconds += more * (self.trace.seconds - before)
        self.trace.flops += more * (self.trace.flops - flops)
        trained = [p for p in module.parameters() if p.requires_grad]
        for _ in range(2):  # the guard against NaN, and clipping
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        module.zero_grad()
        optimizing = 3 * bytes_of(trained) + 2 * self.optimizer  # reads and writes; the gradient is read
        return self.trace.seconds - before + (0.0 if self.rates is None else optimizing / self.rates.bytes)

    def _make_state(self, module: nn.Module) -> None:
        """What the optimizer keeps, which is there before the first step."""
        trained = [p for p in module.parameters() if p.requires_grad]
        each = self.optimizer / sum(p.numel() for p in trained)
        shapes = [int(p.numel() * each / 2) for p in trained for _ in range(2)]
        self._state = [torch.empty(size, dtype=torch.uint8, device="meta") for size in shapes]

    def _checkpoint(self, module: LightningModule) -> None:
        self.checkpoint = bytes_of(t for t in module.state_dict().values() if t.is_meta) + self.optimizer

    def _look(self, function: Callable[[], Any]) -> float:
        before = self.trace.seconds
        with torch.no_grad():
            function()
        return self.trace.seconds - before

    def _sample(self, items: Sequence[Any], count: int) -> list[Any]:
        """Some of the items; the longest prompt is among them, for it sets the width of a rollout."""
        longest = max(items, key=lambda prompt: len(prompt.tokens))
        return [longest, *(self.draw.choice(items) for _ in range(count - 1))]

    def _tell_lengths(self) -> None:
        self.known.lengths = [n for ranking in self.data.train_set for n in ranking.response_lengths]

    @torch.no_grad()
    def _rollout(
        self, policy: PreTrainedModel, prompts: Iterable[Any], each: int, sampling: Sampling
    ) -> tuple[Written, float]:
        """(answers; seconds) of sampling ``each`` answers to each prompt."""
        begun = self.trace.seconds
        tokens = [p.tokens for p in prompts for _ in range(each)]
        limit = sampling.max_new_tokens
        lengths = [min(self.draw.choice(self.known.lengths or [limit]), limit) for _ in tokens]
        width = max(map(len, tokens))
        width, room = min(width, context_length(policy) - limit), context_length(policy)
        steps = range(1, max(lengths))
        chosen = sorted({steps[i * (len(steps) - 1) // (DECODED - 1)] for i in range(DECODED)}) if steps else []
        trunk, engine = ForwardPass.of(policy, width + limit), self.cfg.engine
        rows = engine.get("rows") or rows_that_fit(policy, width + limit, engine.get("cache_gib", 1.0))
        turns = max(1.0, len(tokens) / rows)  # others begin as these end
        rows = min(rows, len(tokens))
        if trunk is None:
            decode = self._growing(policy, rows, width)
        else:
            decode = self._in_place(policy, CachedDecoder(trunk, rows, width + limit), tokens, rows, width)
        before = self.trace.seconds
        alive = {step: min(rows, sum(n > step for n in lengths)) for step in chosen}
        met = self._met(partial(decode, alive[step], step) for step in chosen)
        decoding = self.trace.seconds - before
        if not self._decoded:
            self._decoded = True
            numbers = {n + rows_up_to(1 if trunk is None else ROWS, n) for n in range(1, rows + 1)}
            self._make_room(len(numbers) * max(map(len, met), default=0))
        prefill_and_chosen = self.trace.seconds - begun
        seconds = prefill_and_chosen - decoding + decoding / max(len(chosen), 1) * len(steps) * turns
        pad = self.tokenizer.pad_token_id
        sequences = [t[-(room - n) :] + [pad] * n for t, n in zip(tokens, lengths)]
        return Written(sequences, torch.tensor(lengths)), seconds

    def _in_place(
        self, policy: PreTrainedModel, decoder: CachedDecoder, prompts: list[list[int]], rows: int, width: int
    ) -> Callable[[int, int], None]:
        """The prompts read; what takes a step of ``(rows, number of the step)`` in the own engine."""
        self.cache = max(self.cache, bytes_of([decoder.cache]))
        for begin in range(0, len(prompts), rows):
            unique = dict.fromkeys(map(tuple, prompts[begin : begin + rows]))
            packed = pack(list(unique), 0).to(torch.device("meta"))
            self._draw(policy, decoder.read(packed, lambda layer, kv: None))
        decoder.padded = True

        def step(alive: int, number: int) -> None:
            decoder.alive, decoder.end = alive, width + number - 1
            self._draw(policy, decoder.step(torch.empty(alive, dtype=torch.long, device="meta")))

        return step

    def _growing(self, policy: PreTrainedModel, rows: int, width: int) -> Callable[[int, int], None]:
        """The same by transformers' modules and their growing cache."""

        own_mask = TransformersDecoder(policy, 0).own_mask

        def forward(cache: DynamicCache, alive: int, new: int, seen: int) -> None:
            mask = torch.empty(alive, 1, new, seen, dtype=torch.bool, device="meta")
            output = policy.base_model(
                input_ids=torch.empty(alive, new, dtype=torch.long, device="meta"),
                attention_mask=mask if own_mask else None,  # one for each kind of layer, which transformers makes
                position_ids=torch.empty(alive, new, dtype=torch.long, device="meta"),
                past_key_values=cache,
                use_cache=True,
            )
            self._draw(policy, output.last_hidden_state[:, -1])

        first = DynamicCache(config=policy.config)
        forward(first, rows, width, width)
        shapes = [layer.keys.shape for layer in first.layers]

        def step(alive: int, number: int) -> None:
            cache, seen = DynamicCache(config=policy.config), width + number - 1
            for layer, shape in enumerate(shapes):
                window = getattr(cache.layers[layer], "sliding_window", None)
                kept = seen if window is None else min(seen, window - 1)
                keys, values = (torch.empty(alive, shape[1], kept, shape[3], device="meta") for _ in "kv")
                cache.update(keys, values, layer)
                if window is not None:
                    cache.layers[layer].cumulative_length = seen  # it has let go of those before the window
                del keys, values
            forward(cache, alive, 1, seen + 1)
            self.cache = max(self.cache, bytes_of(t for layer in cache.layers for t in (layer.keys, layer.values)))

        return step

    def _draw(self, policy: PreTrainedModel, hidden: Tensor) -> None:
        """What drawing a token of each row takes; without weights nothing can be drawn."""
        logits = next_token_logits(policy, hidden).float()
        probs = logits.softmax(-1)
        (probs * logits).sum(-1)

    def _scored(self, module: LightningModule, written: Written) -> float:
        """Seconds in which a rollout is scored: by reward model, critic and reference."""

        def score() -> None:
            collector = module.collector
            batches = collector.batching.batches(written.sequences, written.masks(), collector.tokens)
            if module.scorer.reward_model is not None:
                for packed in batches:
                    packed_scores(module.scorer.reward_model, packed)
            collector.said(batches)

        return self._look(score)

    def _read(self, reward_model: nn.Module, written: Written) -> None:
        """Scores, as many answers at once as :func:`score_answers` takes."""
        sizes, lengths = [len(s) for s in written.sequences], written.lengths.tolist()
        for run in runs(sizes, tokens_at_once(reward_model, learning=False), 64):
            pad = self.tokenizer.pad_token_id
            packed_scores(reward_model, pack(written.sequences[run], pad, response_lengths=lengths[run]))

    def _experience(self, module: LightningModule, written: Written) -> Rollout:
        """A minibatch of a rollout, of answers without content."""
        sequences, lengths = written
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        mask = mask[:, :1] if module.action == "answer" else mask
        minibatch = Rollout(sequences, written.masks(), mask, *(torch.zeros(mask.shape) for _ in range(6)))
        return next(minibatch.shuffled(module.minibatch_size, torch.Generator().manual_seed(0)))

    def _update(self, module: LightningModule, minibatch: Rollout) -> float:
        def loss(part: Rollout, share: float) -> Tensor:
            policy_loss, value_loss, _ = module.losses(part)
            return (policy_loss + module.value_coef * value_loss) * share

        texts = [] if module.ptx is None else [partial(text_loss, module.policy, rows) for rows in module.text_parts(0)]
        return self._step(module, *texts, *(partial(loss, *part) for part in module.micro_batches(minibatch)))

    def need(self) -> Need:
        """All of it together."""
        on_gpu = _device(self.cfg) == "cuda"
        timed = self.rates is not None
        return Need(
            self.name,
            self.unit,
            self.steps,
            self.step_seconds if timed else None,
            self.seconds if timed else None,
            self.step_flops,
            self.weights,
            self.gradients,
            self.optimizer,
            self.cache,
            self.activations,
            self.checkpoint,
            self.held,
            self.trace.peak + (0 if on_gpu else self.held),
        )


def distinct(samples: Sequence[set[Any]], count: int) -> int:
    """How many different things ``count`` sets hold, of which ``samples`` are some.

    What was met once, over once more twice that was met twice (Chao 1984); yet no more than comes with the share of
    new things in one more set (Good 1953)."""
    often = Counter(Counter(thing for sample in samples for thing in sample).values())
    unseen = often[1] ** 2 / (2 * max(often[2], 1))
    return sum(often.values()) + round(min(unseen, often[1] / max(len(samples), 1) * max(count - len(samples), 0)))


def _losses(loss: Callable[[Any], Tensor], batch: Any) -> list[Callable[[], Tensor]]:
    """One for each part of a batch."""
    if not isinstance(batch, list):
        return [partial(loss, batch)]
    return [lambda part=part, share=share: loss(part) * share for part, share in batch]


def _tokens(batch: Any) -> int:
    """Size of a batch: the tokens of its rows, and those that are learned."""
    if isinstance(batch, list):
        return sum(_tokens(part) for part, _ in batch)
    rows = batch.packed.tokens if hasattr(batch, "packed") else batch.tokens
    return rows.numel() + len(getattr(batch, "learned", ()))
