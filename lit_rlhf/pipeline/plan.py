"""``stage=plan``: the memory that each stage will need, before anything is trained.

The data is read and batched as in the stage itself. The stage's module, with models without values, then runs its own
code once (``dry_run``) inside of a :class:`lit_rlhf.training.dry_run.Meter`. What an earlier stage would have written
and has not is made up in a temporary folder: config.json and tokenizer of its model, rankings."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.errors import UserError, users_mistake
from lit_rlhf.files import make_folder, write_text
from lit_rlhf.models.micro_batches import limit_kept, trunks
from lit_rlhf.pipeline.run import make_data, make_module
from lit_rlhf.pipeline.settings import MissingSetting, planned_stages, resolved
from lit_rlhf.rollouts.dry_run import DryEngine
from lit_rlhf.stages.contract import Planned, check_contract
from lit_rlhf.stages.records import FitContext
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training.dry_run import Meter, bytes_of
from lit_rlhf.training.memory import machine_bytes, resident_bytes
from lit_rlhf.training.notices import quiet
from lit_rlhf.training.trained_models import ModelSettings
from lit_rlhf.training.trainer import precision_of

MARGIN = 0.2  # of all tensors: holes between them that are too small for others, workspaces of libraries
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
    """What all stages need, and what there is, in bytes."""

    device: str
    process: int  # with its libraries, before there is a model
    host: int  # of this machine
    gpu: int  # of a GPU here; 0: there is none
    stages: list[Need]
    unplanned: dict[str, str]  # stage -> why nothing is said of it

    def table(self) -> str:
        """For the terminal."""
        names = [f.name for f in fields(Need) if f.type == "int"][:-1]
        rows = [["MiB", *names], *([n.stage, *(f"{getattr(n, x) / 2**20:,.0f}" for x in names)] for n in self.stages)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
        here = f"{_mib(self.host)}{f' and a GPU of {_mib(self.gpu)}' if self.gpu else ''}"
        lines += ["", f"One process on {self.device}; gpu and host with a margin of {MARGIN:.0%}, host with libraries "
                  f"({_mib(self.process)}) and data. This machine has {here}."]  # fmt: skip
        lines += [f"{n.stage}: {n.processes}; what a process sends in an iteration takes {n.seconds:.3f} s at "
                  f"{n.gb_per_s} GB/s" for n in self.stages if n.sent]  # fmt: skip
        lines += [f"{n.stage} does not fit. Smaller, by at most: {n.advice}" for n in self.stages if n.advice]
        return "\n".join([*lines, *(f"{stage}: not planned: {reason}" for stage, reason in self.unplanned.items())])


def write_plan(cfg: DictConfig) -> Plan:
    """Plan all stages, print the table, and write ``plan.json`` into the run's folder.

    Raises ``UserError`` after that where a stage could not be planned, unless a setting that it needs is not given."""
    quiet()
    device = {"gpu": "cuda", "auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(cfg.trainer.accelerator, "cpu")
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    plan, wrong = Plan(device, resident_bytes(), machine_bytes(), gpu, [], {}), []
    with tempfile.TemporaryDirectory() as folder:
        for name in planned_stages(cfg):
            try:
                plan.stages.append(plan_stage(cfg, name, plan, Path(folder)))
            except Exception as error:
                reason = users_mistake(error)
                if reason is None and not isinstance(error, (RuntimeError, NotImplementedError)):
                    raise
                if isinstance(reason, MissingSetting) and not plan.stages:
                    raise reason from None  # what no stage can do without
                said = str(reason or f"{type(error).__name__}: {error}").replace(folder, str(cfg.paths.run_dir))
                plan.unplanned[name] = said.splitlines()[0][:300]
                wrong += [] if isinstance(reason, MissingSetting) else [name]
    if plan.stages:
        path = make_folder(Path(cfg.paths.run_dir)) / "plan.json"
        write_text(path, json.dumps(asdict(plan), indent=2) + "\n")
        print(f"{plan.table()}\nplan: {path}")
    if wrong:
        raise UserError("; ".join(f"{name}: {plan.unplanned[name]}" for name in wrong))
    return plan


def plan_stage(cfg: DictConfig, name: str, plan: Plan, folder: Path) -> Need:
    """What a stage needs; in ``folder``, what later stages will ask of it."""
    settings = OmegaConf.create(_made_up(resolved(cfg, name), str(cfg.paths.run_dir), str(folder)))
    settings.module.pop("progress_file", None)  # of a collection that may be running
    on_gpu, precision = plan.device != "cpu", precision_of(settings.trainer.precision, plan.device)
    data = make_data(settings.data, name)
    module = make_module(name, settings, data, without_values=True)
    if precision.endswith("-true"):
        module.to({"bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}[precision.split("-")[0]])
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": precision}
    here |= {"compile": False, "logger": False, "enable_progress_bar": False}
    module.trainer = instantiate({**settings.trainer, **here})
    module.trainer.datamodule = data
    module.setup("fit")
    for callback in (*module.configure_callbacks(), *module.trainer.callbacks):
        if isinstance(callback, FitContext | ModelSettings):
            callback.setup(module.trainer, module, "fit")
    trained = [p for p in module.parameters() if p.requires_grad and "optimizer" in settings]
    devices, nodes, kind = _processes(settings.trainer)
    count = devices * nodes if trained else 1  # those that sample hold all of their models each
    shards = count if kind == "fsdp2" else 1
    state = sum(p.numel() for p in trained) * _state_bytes(settings) if trained else 0
    weights, gradients = bytes_of([*module.parameters(), *module.buffers()]), bytes_of(trained)
    checkpoint = bytes_of(module.state_dict().values()) + state
    held = state // shards
    offloaded = held if on_gpu and trained and settings.optimizer.get("offload") else 0
    if shards > 1 and precision.endswith("-mixed"):  # models are read in half precision: as many tokens as otherwise
        for trunk in trunks(module):
            limit_kept(trunk, settings.trainer.kept_gib / 2)
    meter = Meter(module, precision, plan.device, held - offloaded, shards)
    if hasattr(module, "engine"):
        module.engine = DryEngine(module.engine, meter)
    check_contract(module, Planned, f"{name}.module")
    with meter:
        records = module.dry_run(meter, data)
    buckets = gradients if count > shards else 0  # DDP's
    tensors = int((1 + MARGIN) * (meter.peak + buckets))
    process = max(resident_bytes(), plan.process)
    host = first = process + (weights + offloaded if on_gpu else max(tensors, weights))
    sent = 2 * meter.steps * gradients
    if shards > 1:
        sent = meter.gathered + meter.whole + meter.passes * gradients
        kept = offloaded if on_gpu else weights // shards + held
        first = max(host, process + kept + gradients)  # it gathers what is exported
    sent = int(sent * (count - 1) / count)
    speed = WITHIN_A_MACHINE if on_gpu and nodes == 1 else BETWEEN_MACHINES
    own = weights // shards, gradients // shards, held, meter.activations, meter.cache, checkpoint, weights
    most = tensors if on_gpu else 0, first, first + (devices - 1) * host
    need = Need(name, *own, *most, sent, f"{count} processes ({kind})", sent / speed / 1e9, speed, advice="")
    if need.node > plan.host or (on_gpu and 0 < plan.gpu < tensors):
        need.advice = _advice(need, on_gpu, "lora" in settings, count)
    if all_stages()[name].in_pipeline:
        if records:
            write_jsonl(folder / "data" / "rankings-0.jsonl", records)
        if trained:
            _make_up(module, all_stages()[name].trained, data, folder / name / "model")
    return need


def _processes(trainer: DictConfig) -> tuple[int, int, str]:
    """(those of a machine, machines, how they share the work)"""
    devices = max(1, torch.cuda.device_count()) if trainer.devices == "auto" else trainer.devices
    devices = devices if isinstance(devices, int) else len(devices)
    return devices, trainer.get("num_nodes", 1), "fsdp2" if "fsdp2" in str(trainer.get("strategy")).lower() else "ddp"


def _state_bytes(settings: DictConfig) -> int:
    """Bytes that the optimizer keeps per trained value, found by a step on a small parameter."""
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = instantiate(settings.optimizer)([{"params": [parameter]}])
    optimizer.step()
    return sum(t.nbytes for t in optimizer.state[parameter].values()) // parameter.numel()


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


def _made_up(node: Any, run: str, folder: str) -> Any:
    """``node`` with the paths of the run that are not there replaced by those in ``folder``."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        made = {key: _made_up(value, run, folder) for key, value in items}
        return made if isinstance(node, dict) else list(made.values())
    missing = isinstance(node, str) and node.startswith(run) and not Path(node).exists()
    return folder + node[len(run) :] if missing else node


def _make_up(module: LightningModule, trained: str, data: LightningDataModule, folder: Path) -> None:
    """The folder of a trained model, without values, from which later stages start."""
    folder.mkdir(parents=True)
    getattr(module, trained).save_pretrained(folder, state_dict={"nothing": torch.zeros(1)})
    data.tokenizer.save_pretrained(folder)
