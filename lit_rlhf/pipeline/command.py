"""``lit-rlhf``: from the command line to a run.

What imports torch is imported where it is needed, so that ``--help`` and a mistyped setting are answered at once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_rlhf import __version__
from lit_rlhf.errors import STOPPED, Interrupted, NoFigure, Pruned, UserError, Waiting, users_mistake
from lit_rlhf.pipeline.checks import check_no_credentials
from lit_rlhf.pipeline.failures import STOPPED_BY_HAND, fail, fail_for, going_on, kept_traceback, reason, stopped_line
from lit_rlhf.pipeline.optuna_sweeper import TRIAL
from lit_rlhf.pipeline.recipe import CHECKPOINT, fitted_settings, recipe_line, unfitted, weights_given
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import (
    check_settings,
    check_top_level,
    command_of,
    compose_settings,
    conf_dir,
    hydra_settings,
    name_loaders,
    opened,
    outside_groups,
    resolved,
    stages_of,
    sweep_jobs,
    without_sweeps,
)
from lit_rlhf.processes import is_main_process, name_submitit_task

MULTIRUN = ("-m", "--multirun")


def main() -> None:
    """Run the command; whatever is raised ends it with one line, a user's mistake with exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when transformers is imported, which is later
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a process that is gone is said by us, in one line
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print with a traceback
    for stream in (sys.stdout, sys.stderr):  # texts have letters that a console of Windows may lack
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):  # while this is importing; then training's own
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, stop_before_it_begins)
    try:
        register_resolvers()
        sys.path.append(os.getcwd())  # modules of the user's, beside the command that names them
        # Hydra's parser takes overrides in one piece only; people put -m anywhere.
        sys.argv[1:] = arguments = opened(sorted(sys.argv[1:], key=lambda a: a not in MULTIRUN))
        if arguments == ["--version"]:
            return print(f"lit-rlhf {__version__} (Hydra {hydra.__version__})")
        check_no_credentials({a.partition("=")[0]: a for a in arguments})  # W&B and sweeps write down the command line
        with imports_kept():
            cfg = one_job(arguments)
        if cfg is None:
            add_overrides(outside_groups())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop_waiting)
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run)()
        else:
            run_one(cfg)
    except Exception as error:
        if _asked_to_stop:  # a launcher raises what its processes, which the signal ended, too, have left
            fail(stopped_line(), STOPPED_BY_HAND)
        fail_for(error)
    except KeyboardInterrupt:
        fail(stopped_line(), STOPPED_BY_HAND)
    except StoppedAtOnce:  # before it began, or by a second signal while what the first had raised was being handled
        fail(stopped_line(), STOPPED)


_asked_to_stop: list[int] = []  # signals that the process which waits for a sweep's jobs has got


def stop_waiting(number: int, _: Any) -> NoReturn:
    """Signal handler of the process that only waits for a sweep's jobs."""
    _asked_to_stop.append(number)
    raise KeyboardInterrupt


@contextmanager
def imports_kept() -> Iterator[None]:
    """Keep the garbage collector away from what importing torch and the others makes, now and later.

    It would look through a million objects that stay as long as the process, again and again: a sixth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def one_job(arguments: list[str]) -> DictConfig | None:
    """The settings of the one job that is asked for, composed once and checked; its imports are made.

    None where Hydra has to go on: for a sweep, whose jobs are all checked here before the first begins, its own options
    (``--help``, ``--cfg``), and settings from elsewhere (``--config-dir``), which are checked as each job starts."""
    if any(a.startswith("-") and a not in MULTIRUN for a in arguments):
        fit_options(arguments)
        return None
    overrides = [a for a in arguments if a not in MULTIRUN]
    single = without_sweeps(overrides)
    cfg = fitted_settings(single, with_hydra=True)
    if any(a in MULTIRUN for a in arguments) or cfg.hydra.mode == RunMode.MULTIRUN:
        check_jobs(overrides, fitting_all=CHECKPOINT if cfg.recipe == "checkpoint" else None)
        return None
    if single != overrides:
        compose_settings(overrides)  # which says that several values need -m
    check(cfg)
    return cfg


def fit_options(arguments: list[str]) -> None:
    """Add the recipe that fits to a command with options of Hydra's, which shows or runs the settings."""
    parser = get_args_parser()
    parser.error = _refuse_option
    asked = parser.parse_args(arguments)
    if len(ways := [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(asked, name)]) > 1:
        raise UserError(f"{' '.join(ways)}: each asks for something else; give one of them")
    if asked.config_dir and not Path(asked.config_dir).is_dir():
        raise UserError(f"--config-dir={asked.config_dir}: there is no such folder")
    if asked.cfg or asked.config_dir:
        given = [f"hydra.searchpath=[file://{Path(asked.config_dir).resolve()}]"] if asked.config_dir else []
        single = without_sweeps(asked.overrides)
        if unfitted(compose_settings([*given, *single]), asked.overrides):
            add_overrides([CHECKPOINT])


def _refuse_option(said: str) -> NoReturn:
    raise UserError(f"{said} (`lit-rlhf --help` says which options there are)")


def add_overrides(overrides: list[str]) -> None:
    """Add overrides to the command line, before its own: Hydra's parser takes overrides in one piece only."""
    asked = get_args_parser().parse_args(sys.argv[1:]).overrides
    place = sys.argv.index(asked[0]) if asked else len(sys.argv)
    sys.argv[place:place] = overrides


def check_jobs(overrides: list[str], fitting_all: str | None) -> None:
    """Check the settings of all jobs of a sweep; raise ``UserError`` where no one recipe fits them."""
    asked = any(o.startswith("recipe=") for o in overrides)
    if fitting_all and not asked:
        sys.argv.append(fitting_all)
        overrides = [*overrides, fitting_all]
    asked_for = sweep_jobs(overrides)
    if len(asked_for) > 8:
        print(f"checking the settings of {len(asked_for)} jobs ...", flush=True)
    jobs = {tuple(job): compose_settings(job) for job in asked_for}
    starting = [cfg for job, cfg in jobs.items() if unfitted(cfg, [*job])]
    if starting and len(starting) == len(jobs):
        return check_jobs(overrides, CHECKPOINT)
    if starting:
        raise UserError(
            f"some jobs of this sweep start from a checkpoint ({weights_given(starting[0])}) and others do not; sweep "
            "over them apart, or set recipe=scratch or recipe=checkpoint for all"
        )
    hydras = hydra_settings(overrides)
    for cfg in jobs.values():
        check(cfg)
        check_multirun(cfg, hydras.launcher)
        check_direction(cfg, hydras.sweeper)


def run_one(cfg: DictConfig) -> None:
    """Run one job as Hydra does, which would compose the settings twice more."""
    cfg.hydra.mode = RunMode.RUN
    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name="config")
    context = HydraContext(config_loader=None, callbacks=callbacks)  # a loader is for launchers
    try:
        job = run_job(partial(run, checked=True), cfg, job_dir_key="hydra.run.dir", job_subdir_key=None,
                      hydra_context=context)  # fmt: skip
    finally:
        with suppress(OSError):  # it has files, most often
            Path(cfg.paths.run_dir).rmdir()  # Hydra makes it first; empty it stays for a name that was mistyped
    callbacks.on_run_end(config=cfg, config_name="config", job_return=job)
    _ = job.return_value  # raises what the job raised


def check(cfg: DictConfig) -> None:
    """Raise ``UserError`` for settings that cannot be run."""
    prepare(cfg)
    check_settings(cfg)
    check_writable(Path(cfg.paths.runs))


def check_writable(runs: Path) -> None:
    """Raise ``UserError`` where no run could be kept; Hydra would say so with a traceback."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        writable = os.access(runs, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"paths.runs={runs}: this folder cannot be written to; choose another")


def check_multirun(cfg: DictConfig, launcher: DictConfig) -> None:
    """Raise ``UserError`` for what cannot be swept: a command, which waits for a person, and jobs of another number of
    processes than the launcher starts for each."""
    from lit_rlhf.pipeline.process_group import processes_of

    if command := command_of(cfg):
        raise UserError(f"stage={command} cannot run under multirun (-m): start it alone")
    started = launcher.get("tasks_per_node", 1) * launcher.get("nodes", 1)  # submitit's words
    most = max(stages_of(cfg), key=lambda name: processes_of(cfg[name].trainer), default=None)
    if most is not None and (expected := processes_of(cfg[most].trainer)) != started:
        raise UserError(
            f"{most}: {most}.trainer asks for {expected} processes, and under multirun (-m) this launcher starts "
            f"{started} per job. Sweep with trainer.devices=1, or have as many started: hydra/launcher=submitit_slurm "
            "(or submitit_local) hydra.launcher.tasks_per_node=DEVICES hydra.launcher.nodes=NODES"
        )


def check_direction(cfg: DictConfig, sweeper: DictConfig) -> None:
    """Raise ``UserError`` where a search would call the largest loss the best."""
    from lit_rlhf.pipeline.sweep import objective_address

    names = stages_of(cfg)
    objective = objective_address(cfg, names) if names or cfg.objective else ""
    if sweeper.get("direction") == "maximize" and objective.endswith("loss"):
        raise UserError(
            f"hydra.sweeper.direction=maximize: {objective} is a loss, and the largest would be called the best; set "
            "hydra.sweeper.direction=minimize, or another objective="
        )


def prepare(cfg: DictConfig) -> None:
    """Fill in what follows from where the run lives."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.paths.run_dir = HydraConfig.get().runtime.output_dir
    check_top_level(cfg)
    name_loaders(cfg)
    remember_world(cfg)


def run(cfg: DictConfig, checked: bool = False) -> float | None:
    """One job; returns the figure that a sweeper optimizes. A job of a sweep that fails does not end the others.

    A signal that asks to stop ends it as Ctrl-C does; in training, ``LastCheckpoint`` saves."""
    from lit_rlhf.models.kernels import keep_freed_memory, use_kernels
    from lit_rlhf.pipeline.sweep import write_job
    from lit_rlhf.training.notices import quiet
    from lit_rlhf.training.resuming import handle_signals

    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    OmegaConf.set_struct(cfg, True)
    register_resolvers()  # launchers of sweeps run this in processes of their own
    try:
        name_submitit_task()
        prepare(cfg)
        if not checked:
            check_settings(cfg)
        handle_signals(partial(stop_at_once, cfg))
        quiet()
        limit_threads(cfg)
        use_kernels(cfg.trainer.kernels)  # where no stage's trainer does, as in chat
        if cfg.trainer.kernels == "fast":
            keep_freed_memory()
        if is_main_process() and any("optimizer" in cfg[name] for name in stages_of(cfg)):
            print(recipe_line(cfg), flush=True)
        address, value = work(cfg)
    except Exception as raised:
        if isinstance(raised, Interrupted):
            handle_signals(signal.SIG_IGN)  # schedulers ask twice: the second must not end what says what to do
        error = users_mistake(raised) or raised
        if sweeping:
            note_failure(cfg, error)
            if isinstance(error, Interrupted):  # the person meant the sweep
                fail(stopped_line(HydraConfig.get().sweep.dir), code=STOPPED)
            if isinstance(error, NoFigure):  # nor will another job have it
                fail(f"the sweep ends here{going_on(HydraConfig.get().sweep.dir)}, with an objective= that is there")
            return float("nan")
        if isinstance(error, Waiting) and len(stages_of(cfg)) == 1:  # what was asked for is done as far as it can be
            print(error)
            return float("nan")
        if isinstance(error, Interrupted):
            requeue(cfg, error.signal)
            fail(error, code=STOPPED)
        fail_for(raised, _run_dir(cfg))
    except SystemExit as stopped:  # by stop_at_once, or Lightning's answer to a second Ctrl-C
        sweep = HydraConfig.get().sweep.dir if sweeping else None
        fail(stopped_line(sweep), STOPPED if stopped.code == STOPPED else STOPPED_BY_HAND)
    if sweeping and is_main_process():
        write_job(_output_dir(), _overrides(), {"status": "done", "objective": address, "value": value, **about(cfg)})
    return value


def stop_before_it_begins(*_: Any) -> NoReturn:
    """Signal handler until settings are checked and everything is imported."""
    raise StoppedAtOnce(STOPPED)


class StoppedAtOnce(SystemExit):
    """A signal asked to stop, outside of training; ``run`` says so, or ``main`` where ``run`` is past its ``try``."""


def stop_at_once(cfg: DictConfig, number: int, _: Any) -> None:
    """Signal handler outside of training: what is finished, batches of a collection among it, is on disk already."""
    from lit_rlhf.training.resuming import handle_signals

    sys.unraisablehook = _raise_again
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    handle_signals(signal.SIG_IGN)
    requeue(cfg, number)
    raise StoppedAtOnce(STOPPED)


def _raise_again(what: Any) -> None:
    """What a signal's handler raises while the interpreter is in a finalizer ends nothing: it is raised again, soon."""
    if not isinstance(what.exc_value, SystemExit | KeyboardInterrupt) or not hasattr(signal, "setitimer"):
        return sys.__unraisablehook__(what)

    def again(*_: Any) -> None:
        raise what.exc_value

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def requeue(cfg: DictConfig, number: int | None) -> None:
    """Have Slurm start this job again where ``trainer.requeue`` asks for it and the signal is Slurm's warning of a
    time limit or a preemption (``sbatch --signal=USR1@120``), not somebody's wish to end the job."""
    if not (cfg.trainer.get("requeue") and is_main_process() and number == getattr(signal, "SIGUSR1", None)):
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"trainer.requeue: `scontrol requeue {job}` failed ({error})", file=sys.stderr)


def work(cfg: DictConfig) -> tuple[str, float]:
    """Run the stages, or the command or the plan in their place; returns (address, value) of the objective."""
    from lit_rlhf.pipeline.plan import write_plan
    from lit_rlhf.pipeline.process_group import together
    from lit_rlhf.pipeline.rounds import run_rounds
    from lit_rlhf.pipeline.runner import run_chain
    from lit_rlhf.pipeline.sweep import objective_of

    if command := command_of(cfg):
        instantiate(resolved(cfg, command), _convert_="all").launch()
        return "", float("nan")
    if cfg.stage == "plan":
        write_plan(cfg)
        return "", float("nan")
    with together(cfg, stages_of(cfg)) as processes:
        summary = (run_rounds if cfg.rounds > 1 else run_chain)(cfg, processes)
    if not is_main_process() or not stages_of(cfg):
        return "", float("nan")
    return objective_of(cfg, summary, stages_of(cfg))


def note_failure(cfg: DictConfig, error: Exception) -> None:
    """Name a job of a sweep that failed, or that a pruner ended, and write down why."""
    from lit_rlhf.pipeline.sweep import write_job

    if not is_main_process():
        return
    why = f"{reason(error)}{kept_traceback(error, _output_dir())}"
    status = "pruned" if isinstance(error, Pruned) else "failed"
    print(f"job {HydraConfig.get().job.num} {status}: {why}", file=sys.stderr)
    write_job(_output_dir(), _overrides(), {"status": status, "error": why, **about(cfg)})


def about(cfg: DictConfig) -> dict[str, Any]:
    """Fields of a job on the page of its sweep."""
    return {"about": OmegaConf.to_container(cfg.about)}


def limit_threads(cfg: DictConfig) -> None:
    """Share this machine's cores, at most ``OMP_NUM_THREADS`` each, between the processes of a stage, and the jobs of
    a sweep that run at a time."""
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (
        cfg.trainer.devices if isinstance(cfg.trainer.devices, int) and cfg.trainer.accelerator != "gpu" else 1
    )
    jobs = HydraConfig.get().launcher.get("n_jobs", 1) if HydraConfig.get().mode == RunMode.MULTIRUN else 1  # joblib's
    jobs = jobs if jobs > 0 else cores()
    share = max(1, cores() // (processes * jobs))
    most = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(cfg.threads or (min(share, int(most)) if most.isdigit() and int(most) else share))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_dir(cfg: DictConfig) -> Path | None:
    """The run's folder, where the settings are good enough to know it."""
    path = OmegaConf.select(cfg, "paths.run_dir", throw_on_resolution_failure=False)
    return Path(path) if isinstance(path, str) else None


def _output_dir() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def _overrides() -> list[str]:
    """What was asked for, without what the command adds to every one, and a sweeper to tell a job its number."""
    asked = HydraConfig.get().overrides.task
    return [o for o in asked if o not in outside_groups() and o.partition("=")[0] not in TRIAL]
