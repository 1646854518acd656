"""One stage: built from its settings, run, written down."""

from __future__ import annotations

import gc
import os
import platform
import time
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

import lit_rlhf
from lit_rlhf.errors import UserError, first_line, say, users_mistake
from lit_rlhf.models.loading import check_files, loading_as_stored
from lit_rlhf.models.lora import base_path
from lit_rlhf.models.policy import load_policy_and_tokenizer
from lit_rlhf.pipeline.failures import of_stage
from lit_rlhf.pipeline.loggers import close, log_figures, make_loggers
from lit_rlhf.pipeline.model_card import write_cards
from lit_rlhf.pipeline.process_group import Processes
from lit_rlhf.pipeline.run_folder import model_nodes
from lit_rlhf.pipeline.settings import stage_of_metric
from lit_rlhf.pipeline.split import remember_split, remembered_split
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.pipeline.trained_prompts import check_trained, write_trained_prompts
from lit_rlhf.processes import is_main_process
from lit_rlhf.stages.contract import (
    EvaluatesPrompts,
    Planned,
    Shards,
    StageData,
    StageModule,
    TrainsOnPrompts,
    WritesSamples,
    check_contract,
)
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.pretrain import STAGE as PRETRAIN
from lit_rlhf.stages.sft import STAGE as SFT
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text.records import Moved
from lit_rlhf.training.callbacks import FirstSteps, StageProgressBar, TextSamples, said_when_slow
from lit_rlhf.training.checkpoint_files import read_checkpoint
from lit_rlhf.training.diverging import StopOnNonFinite
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.memory import Peak
from lit_rlhf.training.metrics_file import MetricsFile, read_metrics
from lit_rlhf.training.resuming import BestCheckpoint, LastCheckpoint, RandomState, check_training
from lit_rlhf.training.trained_state import weights_fingerprint

PROFILE = "profile"  # folder of a stage into which ``profiler`` writes


def run_stage(cfg: DictConfig, name: str, processes: Processes | None = None) -> dict[str, Any]:
    """Run a stage that is not finished, or go on with it; returns its figures. ``processes``: that run it together."""
    processes = processes or Processes()
    if not is_main_process():
        if processes.agreed(bool):
            return {}
        return _run_stage(cfg, name, StageFolder(cfg, name))  # as the first process has left it
    folder = StageFolder(cfg, name)
    with folder.held():
        if processes.agreed(partial(_begun, folder)):  # by a command that held the lock before
            return folder.done["figures"]
        return _run_stage(cfg, name, folder)


def _begun(folder: StageFolder) -> bool:
    """Whether a stage is finished; if not, its folder is made ready."""
    if not (finished := folder.check()):
        folder.begin()
    return finished


def _run_stage(cfg: DictConfig, name: str, folder: StageFolder) -> dict[str, Any]:
    begun, cpu_begun, memory = time.perf_counter(), time.process_time(), Peak()
    settings = OmegaConf.create(folder.written_here())
    seed_everything(settings.seed, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED")  # from which several processes would begin anew when the models have been made
    check_models(name, settings)
    with said_when_slow(f"{name}: reading the data"):
        data = make_data(settings.data, name, remembered_split(cfg, name, settings.get("allow_trained")))
    if is_main_process():
        remember_split(cfg, data.moved)
    trained_on = {}
    if "allow_trained" in settings and is_main_process():
        check_contract(data, EvaluatesPrompts, f"{name}.data")
        trained_on = check_trained(name, settings, data)
    with said_when_slow(f"{name}: loading the models"):
        module = make_module(name, settings, data)
    callbacks = make_callbacks(cfg, name, settings, folder)
    loggers = make_loggers(cfg, name, folder)
    here = {"default_root_dir": str(folder.path / "checkpoints"), **make_profiler(cfg, folder)}
    shown = {"logger": loggers or False, "enable_progress_bar": bool(cfg.callbacks.progress_bar)}
    trainer = make_trainer(name, settings.trainer, callbacks=callbacks, **shown, **here)
    try:
        try:
            execute(settings, trainer, module, data, folder)
            show_profile(folder.path / PROFILE)
        except MisconfigurationException as error:
            raise UserError(f"{name}.trainer: {first_line(error)}") from error
        sharded = isinstance(trainer.strategy, FSDP2)
        if not (trainer.is_global_zero or sharded):
            return {}
        lost = None if settings.run == "fit" else move_if_gone(folder, loggers)
        notes = exported_weights(trainer, module, folder) if settings.run == "fit" else {}
        if isinstance(module, Shards):
            module.end_sharding()
        if not trainer.is_global_zero:
            return {}
        with said_when_slow(f"{name}: writing what came out"):
            module.export(folder.path)
        figures = figures_of(settings, module, name, folder) | finding_of(callbacks)
        figures |= {"trained_on": trained_on} if trained_on else {}
        log_figures(loggers, figures, trainer.global_step)
        write_cards(cfg, folder, figures)
        write_trained_prompts(name, folder.path, data)
        earlier, earlier_cpu = earlier_seconds(callbacks)
        seconds, cpu_seconds = time.perf_counter() - begun + earlier, time.process_time() - cpu_begun + earlier_cpu
        cost = {"cpu_seconds": cpu_seconds, "parameters": sum(p.numel() for p in module.parameters())}
        # Beside the figures, which are the same whenever a stage is done again.
        notes |= {"memory": memory.mib(), "versions": versions(), "data": data_notes(data), "cost": cost}
        folder.finish({"figures": figures, "seconds": seconds, **notes})
        if lost:
            raise lost
    except (OSError, UserError) as error:
        rescued = next((c.rescued for c in callbacks if isinstance(c, LastCheckpoint)), None)
        if is_main_process() and (rescued or not folder.path.is_dir()):
            raise folder_gone(folder, rescued) from error
        raise
    finally:
        close(loggers)
    return figures


def make_profiler(cfg: DictConfig, folder: StageFolder) -> dict[str, Any]:
    """``profiler`` for a trainer, which keeps what it finds in the stage's folder; nothing where none is asked for."""
    return {"profiler": instantiate(cfg.profiler, dirpath=str(folder.path / PROFILE))} if "profiler" in cfg else {}


def check_models(name: str, settings: DictConfig) -> None:
    """Raise ``UserError`` for broken folders of a stage's models, before its data is read."""
    paths = [node.path for node in model_nodes(name, settings).values() if node.get("path") is not None]
    for path in [*paths, *filter(None, (settings.get("models") or {}).values())]:
        for each in path if isinstance(path, ListConfig) else [path]:
            folder = Path(base_path(each))
            if folder.exists():
                check_files(folder)


def make_data(settings: DictConfig, name: str, moved: Moved | None = None) -> LightningDataModule:
    """The data, read and checked before a model is loaded; ``moved``: what the run remembers of its split."""
    data: StageData = instantiate(settings, _convert_="all")
    data.moved, data.tell = moved or Moved(), partial(_say, name)
    check_contract(data, StageData, f"{name}.data")
    with of_stage(name):
        data.prepare_data()
        data.setup()
    if all_stages()[name].trains_on_prompts:
        check_contract(data, TrainsOnPrompts, f"{name}.data")
    if is_main_process():
        if data.skipped:
            print(f"{name}: {len(data.skipped)} records were skipped as invalid, the first: {data.skipped[0]}")
        if data.long:
            print(f"{name}: {data.long} records were {data.how_long}")
    return data


def _say(name: str, line: str) -> None:
    say(f"{name}: {line}")


def make_module(
    name: str, settings: DictConfig, data: LightningDataModule, without_values: bool = False
) -> LightningModule:
    """The module of a stage, with its models; ``without_values``: on ``meta``, for a dry run."""
    strategy = settings.trainer.get("strategy")
    sharded = strategy == "fsdp2" or isinstance(strategy, DictConfig)
    values = torch.device("meta") if without_values else nullcontext()
    with values, of_stage(name), loading_as_stored() if sharded else nullcontext():
        models = load_models(name, settings, data.tokenizer)
    make = instantiate(settings.module, **models, _partial_=True, _convert_="all")
    module: StageModule = make(**data.for_module())  # not through Hydra, which makes dictionaries of records
    check_contract(module, StageModule, f"{name}.module")
    if without_values:
        check_contract(module, Planned, f"{name}.module")
    if "samples_every" in settings:
        check_contract(module, WritesSamples, f"{name}.module")
    return module


def load_models(name: str, settings: DictConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The models that a stage names, by the names that its module has for them."""
    models: dict[str, Any] = {
        key: instantiate(settings[key], **_given(settings[key], tokenizer), _convert_="all")
        if _there(settings[key])
        else None
        for key in all_stages()[name].model_settings
        if key != "policies"
    }
    if "annotator" in settings:
        models["annotator"] = instantiate(settings.annotator or None, _convert_="all")  # "none" is an empty file
    if settings.get("models"):
        models["others"] = {key: load_policy_and_tokenizer(path) for key, path in settings.models.items() if path}
    if "policies" in settings:
        models["policies"] = {key: instantiate(node, _convert_="all") for key, node in _policies(settings).items()}
    return models


def _given(node: DictConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """The data's tokenizer, for what takes one: a scorer behind a URL has nothing to do with tokens."""
    return {"tokenizer": tokenizer} if "tokenizer" in signature(get_object(node._target_)).parameters else {}


def _policies(settings: DictConfig) -> dict[str, DictConfig]:
    """The models to evaluate. A checkpoint that nothing was fine-tuned from is SFT model and base in one: it competes
    once, and a line says so."""
    there = {key: node for key, node in settings.policies.items() if _there(node)}
    base, sft = PRETRAIN.called, SFT.called
    if base in there and sft in there and there[base].path == there[sft].path:
        say(f"{EVALUATE.name}: {base} and {sft} are one model, {there[sft].path}; it is called {sft}")
        del there[base]
    return there


def _there(node: DictConfig | None) -> bool:
    """Whether a model can be had and is asked for: evaluation leaves out what was not trained."""
    if node is None or ("path" in node and node.path is None):
        return False
    path = node.get("path")
    if isinstance(path, ListConfig):
        return bool(path)  # an ensemble: a member that is missing is an error
    # A path below an existing folder is a local one; anything else may be a Hub name.
    return path is None or Path(path).exists() or (not Path(path).is_absolute() and len(Path(path).parts) <= 2)


def make_trainer(name: str, settings: DictConfig, **more: Any) -> Trainer:
    """The trainer of a stage. Raises ``UserError``, naming the stage, for settings that Lightning refuses."""
    try:
        return instantiate(settings, **more)
    except InstantiationException as error:
        if users_mistake(error) or error.__cause__ is None:
            raise
        raise UserError(f"{name}.trainer: {first_line(error.__cause__)}") from error


def execute(
    settings: DictConfig, trainer: Trainer, module: LightningModule, data: LightningDataModule, folder: StageFolder
) -> None:
    """Fit (going on from the last checkpoint), predict or test."""
    if settings.run == "predict":
        trainer.predict(module, datamodule=data, return_predictions=False)
    elif settings.run == "test":
        trainer.test(module, datamodule=data, verbose=False)
    else:
        checkpoint = folder.checkpoint
        if checkpoint is None and (settings.validate_first or any(map(_monitor, trainer.callbacks))):
            trainer.validate(module, datamodule=data, verbose=False)
            check_monitors(trainer, folder.stage)
        elif checkpoint is not None:
            say(f"{folder.stage}: goes on from {checkpoint}")
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        # Export reads the checkpoint, which needs their memory.
        module.zero_grad()
        trainer.strategy.optimizers = trainer.strategy.lr_scheduler_configs = []
        gc.collect()
        for callback in trainer.callbacks:
            if isinstance(callback, BestCheckpoint):
                callback.restore(trainer)
        trainer.validate(module, datamodule=data, verbose=False)


def show_profile(folder: Path) -> None:
    """Print the head of what ``profiler`` has written, of each kind of work: fit, validate, predict, test."""
    for file in sorted(folder.glob("*.txt")) if is_main_process() else []:
        lines = file.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        print("\n".join(line.rstrip()[:160] for line in lines[:20] if line.strip()))
        print(f"profile: {file}")


def move_if_gone(folder: StageFolder, loggers: list[Logger]) -> UserError | None:
    """The error for a stage whose folder was deleted or renamed while it sampled; None where it is there."""
    if not folder.gone:
        return None
    before = folder.path
    folder.move()
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            logger.move(folder.path / "metrics.csv")
            logger.write()
    return UserError(
        f"{before} was deleted or renamed while it was written; what came out is in {folder.path}: go on with "
        f"run={folder.run.name} and from_run={before.parent.name} (or where that is now)"
    )


def folder_gone(folder: StageFolder, rescued: Path | None) -> UserError:
    """The error for a stage whose folder was deleted or renamed while it was written; ``rescued``: where the last step
    was saved instead."""
    said = f"{folder.path} was deleted or renamed while it was written"
    if rescued is None:
        return UserError(f"{said}; run the same command again")
    return UserError(
        f"{said}; the last step is saved in {rescued}: to go on from there, run the same command with "
        f"run={rescued.parent.name} and from_run={folder.run.name} (or where that is now)"
    )


def exported_weights(trainer: Trainer, module: LightningModule, folder: StageFolder) -> dict[str, Any]:
    """The step whose weights are about to be exported, and their digest. Raises ``UserError`` where they are not those
    of the checkpoint of that step, or are not finite."""
    best = next((c.best for c in trainer.callbacks if isinstance(c, BestCheckpoint)), None)
    step = best["step"] if best else trainer.fit_loop.epoch_loop.total_batch_idx + 1
    path = folder.path / "checkpoints" / ("best.ckpt" if best else "last.ckpt")
    check_training(module, [], path)
    sharded = isinstance(trainer.strategy, FSDP2)
    saved = trainer.strategy.saved_weights(path) if sharded else read_checkpoint(path)["state_dict"]
    state = module.state_dict()
    names = [name for name, _ in module.named_parameters() if name in state]
    digest = weights_fingerprint(state[name] for name in names)
    if digest != weights_fingerprint(saved[name] for name in names):
        raise UserError(
            f"{folder.stage}: the weights in memory are not those that step {step} left in {folder.path}/checkpoints, "
            "so nothing is exported; run the same command again"
        )
    return {"weights": {"step": step, "digest": digest}}


def _monitor(callback: Callback) -> str | None:
    return getattr(callback, "monitor", None)


def check_monitors(trainer: Trainer, name: str) -> None:
    """Raise ``UserError`` where a callback watches what the validation before training has not logged."""
    for callback in trainer.callbacks:
        monitor, logged = _monitor(callback), trainer.callback_metrics
        if monitor and monitor.startswith("val/") and monitor not in logged:
            raise UserError(
                f"callbacks: {type(callback).__name__} watches {monitor}, which {name} does not log; take one of "
                f"{', '.join(sorted(n for n in logged if n.startswith('val/')))}"
            )


def chosen_callbacks(cfg: DictConfig, name: str) -> list[Callback]:
    """The user's callbacks, those under ``callbacks`` that are classes; one that watches a metric of another stage
    (``monitor: val/<stage>/...``) is that stage's alone."""
    made = [instantiate(node) for key, node in cfg.callbacks.items() if key != "first_steps" and _is_object(node)]
    return [callback for callback in made if stage_of_metric(_monitor(callback) or name) == name]


def _is_object(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_target_" in node


def make_callbacks(cfg: DictConfig, name: str, settings: DictConfig, folder: StageFolder) -> list[Any]:
    """Callbacks of a stage."""
    callbacks: list[Any] = [StopOnNonFinite(name)]
    if cfg.callbacks.progress_bar:
        callbacks.append(StageProgressBar(name, cfg.callbacks.progress_refresh if settings.run == "fit" else 1))
    if settings.get("health"):
        callbacks.append(instantiate(settings.health))
    if "samples_every" in settings:
        callbacks.append(TextSamples(folder.path / "samples.jsonl", settings.samples_every))
    if settings.run == "fit":
        checkpoints = folder.path / "checkpoints"
        callbacks.append(RandomState())
        callbacks += [instantiate(cfg.callbacks.first_steps)(name)] if settings.validate_first else []
        if "keep" in settings and settings.keep.best:
            callbacks.append(BestCheckpoint(checkpoints, settings.keep.metric, settings.keep.mode))
        callbacks += chosen_callbacks(cfg, name)
        # Behind those whose state it saves.
        callbacks.append(LastCheckpoint(checkpoints, settings.checkpoint_every, folder.rescue))
    return callbacks


def figures_of(settings: DictConfig, module: LightningModule, name: str, folder: StageFolder) -> dict[str, Any]:
    """The module's own figures, and where validation began."""
    figures = module.figures()
    if not settings.get("validate_first"):
        return figures
    before = read_metrics(folder.path / "metrics.csv").get(0, {})
    first = {f"{key}_first": before.get(f"val/{name}/{key.removeprefix('val_')}") for key in ("val_loss", "old_loss")}
    return {"val_loss_first": first["val_loss_first"], **{k: v for k, v in first.items() if v is not None}, **figures}


def finding_of(callbacks: list[Any]) -> dict[str, str]:
    """The finding about the first steps, a sentence; {} where there is none."""
    found = [c.finding for c in callbacks if isinstance(c, FirstSteps) and c.finding is not None]
    return {"first_steps": found[0]} if found else {}


def earlier_seconds(callbacks: list[Any]) -> tuple[float, float]:
    """Seconds, and seconds of processors, that interrupted starts of this stage had already worked."""
    last = [c for c in callbacks if isinstance(c, LastCheckpoint)]
    return sum(c.earlier_seconds for c in last), sum(c.earlier_cpu_seconds for c in last)


def data_notes(data: StageData) -> dict[str, int]:
    """Counts that a reader of the results should know."""
    return {**data.sizes(), "skipped": len(data.skipped), "long": data.long}


def versions() -> dict[str, str]:
    """Versions of the packages in use."""
    return {
        "lit_rlhf": lit_rlhf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
