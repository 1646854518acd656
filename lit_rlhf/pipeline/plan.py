"""``stage=plan``: the memory that each stage will need, before anything is trained.

The data is read and batched as in the stage itself. The stage's module, with models without values, then runs its own
code once (``dry_run``) inside of a :class:`lit_rlhf.training.dry_run.Meter`. What an earlier stage would have written
and has not is made up in a temporary folder: config.json and tokenizer of its model, rankings."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, users_mistake
from lit_rlhf.files import make_folder, write_json
from lit_rlhf.functional import drawn_figures
from lit_rlhf.models.kernels.decoding import CachedDecoder
from lit_rlhf.models.loading import is_intended
from lit_rlhf.pipeline.process_group import devices_of, processes_of
from lit_rlhf.pipeline.run import make_data, make_module
from lit_rlhf.pipeline.settings import MissingSetting, planned_stages, resolved
from lit_rlhf.rollouts.engine import Engine, Request, Responses
from lit_rlhf.rollouts.fast import cache_bytes, make_decoder, rows_that_fit
from lit_rlhf.stages.contract import SamplesResponses
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training.dry_run import Meter
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.memory import bytes_of, machine_bytes, resident_bytes
from lit_rlhf.training.optim import HIDDEN, decay_groups
from lit_rlhf.training.trainer import precision_of, sharding_of

MARGIN = 0.2  # of all tensors: holes between them that are too small for others, workspaces of libraries
MARGIN_OF_SEVERAL = 0.3  # of several processes on a CPU: what gloo sends through, too
# 10^9 bytes per second that a process sends: NVLink of an H100, one direction, and a network of 400 Gbit/s per GPU.
WITHIN_A_MACHINE, BETWEEN_MACHINES = 450, 50


@dataclass
class Need:
    """Memory of one process of a stage, in bytes; not all parts are there at the same time."""

    stage: str
    weights: int  # of all models that it holds
    gradients: int
    optimizer: int
    activations: int  # that a forward pass keeps for its backward pass
    cache: int  # keys and values of a rollout
    checkpoint: int  # on disk
    loading: int  # in RAM, while models are loaded
    gpu: int  # at most, with the margin; 0 on a CPU
    host: int  # at most, of the first process: with its libraries and its data and, on a CPU, tensors with the margin
    node: int  # of the first machine: the same of all its processes
    sent: int  # by a process in an iteration
    processes: str  # how many, and how they share the work
    seconds: float  # for what is sent, at ``gb_per_s``
    gb_per_s: int
    advice: str  # what makes it smaller, where it does not fit; else ""


@dataclass
class Plan:
    """Needs of all stages, and the memory that there is, in bytes."""

    device: str
    process: int  # with its libraries, before there is a model
    host: int  # of this machine
    gpu: int  # of a GPU here; 0: there is none
    stages: list[Need]
    unplanned: dict[str, str]  # stage -> why nothing is said of it

    def table(self) -> str:
        """The plan as a table for the terminal."""
        names = [f.name for f in fields(Need) if f.type == "int"][:-1]
        rows = [["MiB", *names], *([n.stage, *(f"{getattr(n, x) / 2**20:,.0f}" for x in names)] for n in self.stages)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
        here = f"{_mib(self.host)}{f' and a GPU of {_mib(self.gpu)}' if self.gpu else ''}"
        margin = f"{MARGIN:.0%} (of one of several processes on a CPU {MARGIN_OF_SEVERAL:.0%})"
        lines += ["", f"One process on {self.device}; gpu and host with a margin of {margin}, host with libraries "
                  f"({_mib(self.process)}) and data. This machine has {here}."]  # fmt: skip
        lines += [f"{n.stage}: {n.processes}; what a process sends in an iteration takes {n.seconds:.3f} s at "
                  f"{n.gb_per_s} GB/s" for n in self.stages if n.sent]  # fmt: skip
        lines += [f"{n.stage} does not fit. Smaller, by at most: {n.advice}" for n in self.stages if n.advice]
        return "\n".join([*lines, *(f"{stage}: not planned: {reason}" for stage, reason in self.unplanned.items())])


def write_plan(cfg: DictConfig) -> Plan:
    """Plan all stages, print the table, and write ``plan.json`` into the run's folder.

    Raises ``UserError`` after that where a stage could not be planned, unless a setting that it needs is not given."""
    device = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(cfg.trainer.accelerator, "cpu")
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    plan, wrong = Plan(device, resident_bytes(), machine_bytes(), gpu, [], {}), []
    with tempfile.TemporaryDirectory() as folder:
        for name in planned_stages(cfg):
            try:
                plan.stages.append(plan_stage(cfg, name, plan, Path(folder)))
            except (UserError, InstantiationException, RuntimeError) as error:
                reason = users_mistake(error) or UserError(f"{type(error).__name__}: {error}")
                if isinstance(reason, MissingSetting) and not plan.stages:
                    raise reason from None  # what no stage can do without
                plan.unplanned[name] = str(reason).replace(folder, str(cfg.paths.run_dir)).splitlines()[0][:300]
                wrong += [] if isinstance(reason, MissingSetting) else [name]
    if plan.stages:
        path = write_json(make_folder(Path(cfg.paths.run_dir)) / "plan.json", asdict(plan))
        print(f"{plan.table()}\nplan: {path}")
    if wrong:
        raise UserError("; ".join(f"{name}: {plan.unplanned[name]}" for name in wrong))
    return plan


def plan_stage(cfg: DictConfig, name: str, plan: Plan, folder: Path) -> Need:
    """The need of one stage; writes into ``folder`` what later stages will read of it."""
    run_dir = str(cfg.paths.run_dir)
    settings = OmegaConf.create(tree_map(lambda x: _moved(x, run_dir, folder), resolved(cfg, name)))
    settings.module.pop("progress_file", None)  # of a collection that may be running
    on_gpu, precision = plan.device != "cpu", precision_of(settings.trainer.precision, plan.device)
    data = make_data(settings.data, name)
    module = make_module(name, settings, data, without_values=True)
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "compile": False, "logger": False}
    trainer = module.trainer = instantiate({**settings.trainer, **here, "precision": precision})
    trainer.datamodule = data
    trainer.precision_plugin.convert_module(module)
    module.setup("fit")
    for callback in (*module.configure_callbacks(), *trainer.callbacks):
        callback.setup(trainer, module, "fit")
    trained = [p for p in module.parameters() if p.requires_grad and "optimizer" in settings]
    count = processes_of(settings.trainer)
    strategy = settings.trainer.get("strategy", "auto")
    strategy = strategy if isinstance(strategy, str) else instantiate(strategy)
    strategy = sharding_of(strategy, precision, settings.trainer.get("compile", False))
    if sharded := isinstance(strategy, FSDP2):
        strategy.check_layers(module)
    shards = count if sharded else 1
    state = _state_bytes(settings, module) if trained else 0
    weights, gradients = bytes_of([*module.parameters(), *module.buffers()]), bytes_of(trained)
    checkpoint = bytes_of(module.state_dict().values()) + state
    stored = bytes_of(p for m in module.modules() if is_intended(m) for p in m.parameters())
    loading = weights - stored + stored // shards  # what comes from files is cast part by part where it is sharded
    held = state // shards
    offloaded = held if on_gpu and trained and settings.optimizer.get("offload") else 0
    meter = Meter(module, precision, plan.device, shards)
    meter.adds = count == shards
    meter.live += held - offloaded + (0 if meter.adds else gradients)  # DDP's buckets
    if isinstance(module, SamplesResponses):
        module.engine = DryEngine(module.engine, meter)
    with meter:
        records = module.dry_run(meter, data)
    tensors = int((1 + (MARGIN if count == 1 or on_gpu else MARGIN_OF_SEVERAL)) * meter.peak)
    process = max(resident_bytes(), plan.process)
    host = first = process + (loading + offloaded if on_gpu else max(tensors, loading))
    gathered = meter.gathered + meter.whole + meter.passes * gradients
    if shards > 1:  # the first gathers what is exported
        first = max(host, process + gradients + (offloaded if on_gpu else weights // shards + held))
    sent = int((gathered if shards > 1 else 2 * meter.steps * gradients) * (count - 1) / count)
    speed = WITHIN_A_MACHINE if on_gpu and settings.trainer.get("num_nodes", 1) == 1 else BETWEEN_MACHINES
    own = weights // shards, gradients // shards, held, meter.activations, meter.cache, checkpoint, loading
    most = tensors if on_gpu else 0, first, first + (devices_of(settings.trainer) - 1) * host
    how = f"{count} processes ({'fsdp2' if sharded else 'ddp'})"
    need = Need(name, *own, *most, sent, how, sent / speed / 1e9, speed, advice="")
    if need.node > plan.host or (on_gpu and 0 < plan.gpu < tensors):
        need.advice = _advice(need, on_gpu, "lora" in settings, count)
    if all_stages()[name].in_pipeline:
        if records:
            write_jsonl(folder / "data" / "rankings-0.jsonl", records)
        if trained:
            model, path = getattr(module, all_stages()[name].trained), folder / name / "model"
            model.save_pretrained(path, state_dict={"nothing": torch.zeros(1)})
            data.tokenizer.save_pretrained(path)
    return need


def _state_bytes(settings: DictConfig, module: LightningModule) -> int:
    """Bytes that the optimizer keeps of what is trained; per value, they are found by a step on a small parameter."""
    per_value = {}
    for hidden in (False, True):  # of such matrices Muon keeps less
        parameter = torch.nn.Parameter(torch.ones(64, 64))
        parameter.grad = torch.ones_like(parameter)
        optimizer = instantiate(settings.optimizer)([{"params": [parameter], HIDDEN: [hidden]}])
        optimizer.step()
        per_value[hidden] = sum(t.nbytes for t in optimizer.state[parameter].values()) // parameter.numel()
    matrices, *others = decay_groups(module)
    state = sum(p.numel() * per_value[hidden] for p, hidden in zip(matrices["params"], matrices[HIDDEN]))
    return state + sum(p.numel() * per_value[False] for group in others for p in group["params"])


def _advice(need: Need, on_gpu: bool, has_lora: bool, count: int) -> str:
    """Settings that make a stage smaller, each with what it saves at most."""
    name, trained = need.stage, need.gradients + need.optimizer
    saves = {
        f"{name}.lora.r=8": trained * has_lora,
        f"{name}.trainer.precision=bf16-true": (need.weights + trained) // 2,
        f"{name}.trainer.activation_checkpointing=true": need.activations,
        f"a smaller {name}.trainer.kept_gib or {name}.data.batch_size": need.activations,
        f"{name}.optimizer.offload=true": need.optimizer * on_gpu,
        "a smaller engine.cache_gib": need.cache,
        f"trainer=fsdp, {2 * count} processes": (need.weights + trained) // 2 if trained else 0,
    }
    return ", ".join(f"{how} ({_mib(size)})" for how, size in sorted(saves.items(), key=lambda x: -x[1]) if size)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _moved(value: Any, run_dir: str, folder: Path) -> Any:
    """A path of the run that is not there, below ``folder`` instead; other values as they are."""
    missing = isinstance(value, str) and value.startswith(run_dir) and not Path(value).exists()
    return f"{folder}{value[len(run_dir) :]}" if missing else value


class DryEngine:
    """An engine for dry runs: takes the memory that another one would, and answers in tokens 0, as many as allowed."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self.exact, self.gives_states, self.meter = engine.exact, engine.gives_states, meter
        # Transformers' engine writes one response after the other.
        self.settings = getattr(engine, "settings", {"rows": 1})

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.policy = policy
        return 1

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        prompts, limit = [request.prompt for request in requests], requests[0].sampling.max_new_tokens
        width, known = max(map(len, prompts)) + limit, self.settings
        rows = min(len(prompts), known["rows"] or rows_that_fit(self.policy, width, known["cache_gib"]))
        cache = rows * cache_bytes(self.policy, width)
        self.meter.cache = max(self.meter.cache, cache)
        before = self.meter.live
        decoder = make_decoder(self.policy, rows, width, 0, False)
        # Of a sharded policy all weights are gathered, into what the decoder has laid out where it has its own.
        laid_out = self.meter.live - before - cache if isinstance(decoder, CachedDecoder) else 0
        self.meter.whole = bytes_of(self.policy.parameters()) if self.meter.shards > 1 else 0
        _gathered = torch.empty(max(0, self.meter.whole - laid_out) // 4, device="meta")
        hidden = decoder.begin(prompts[:rows])
        grown = 0 if isinstance(decoder, CachedDecoder) else cache // 4  # its cache grows with what is written
        logits, _ = decoder.logits(hidden).float(), torch.empty(grown, device="meta")
        drawn_figures(logits, logits.softmax(-1), torch.zeros(rows, dtype=torch.int64))
        figures, ended = torch.zeros(len(prompts), limit), torch.zeros(len(prompts), dtype=torch.int64)
        tokens, none = figures.long(), [()] * len(prompts)
        kept = torch.empty(*tokens.shape, hidden.shape[-1], device="meta") if states else None
        return Responses(tokens, tokens == 0, figures, figures, ended, none, states=kept)
