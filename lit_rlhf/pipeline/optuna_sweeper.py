"""Sweeps by Optuna: trials that learn from those before them.

Hydra imports this with every command, so what takes long is imported where it is needed."""

from __future__ import annotations

import math
import warnings
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.errors import UserError, first_line, say
from lit_rlhf.files import make_folder, write_text, written_anew
from lit_rlhf.pipeline.search_space import search_space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

# How a job is told which trial it is, where it reports to a pruner.
TRIAL = tuple(f"callbacks.pruning.{name}" for name in ("storage", "study_name", "trial"))
FIXED = "fixed"  # attribute of a study: the settings that its trials share
FOLDER = "folder"  # attribute of a trial: the sweep that runs it; others may share the storage


class OptunaSweeper(Sweeper):
    """Asks a study for the settings of ``n_jobs`` trials at a time, has the launcher run them, and tells the study how
    they ended, until it has ``n_trials``.

    A study that was stopped goes on in the same ``hydra.sweep.dir``: trials that were running are run first, in their
    own folders, where their finished stages and checkpoints are. The arguments: ``conf/hydra/sweeper/optuna.yaml``."""

    def __init__(
        self,
        direction: str,
        n_trials: int,
        n_jobs: int,
        study_name: str,
        storage: str,
        seed: int,
        sampler: partial[BaseSampler],
        pruner: BasePruner,
        params: dict[str, Any] | None,
    ) -> None:
        self.direction, self.n_trials, self.n_jobs = direction, n_trials, n_jobs
        self.study_name, self.storage, self.seed = study_name, storage, seed
        self.sampler, self.pruner, self.params = sampler, pruner, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the trials that the study lacks."""
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        from lit_rlhf.pipeline.stage_folder import held

        if self.n_trials < 1 or self.direction not in ("maximize", "minimize"):
            raise UserError(
                f"hydra.sweeper: n_trials={self.n_trials} direction={self.direction}; at least one trial, and maximize "
                "or minimize, were expected"
            )
        folder = make_folder(Path(self.config.hydra.sweep.dir))
        fixed, space = search_space([*(f"{name}={values}" for name, values in self.params.items()), *arguments])
        with held(folder / ".study.lock", folder, "hydra.sweep.dir="):
            write_text(folder / "multirun.yaml", OmegaConf.to_yaml(self.config))
            try:
                return self._sweep(folder, fixed, space)
            except (OptunaError, SQLAlchemyError, ImportError) as error:
                raise UserError(
                    f"hydra.sweeper.storage={self.storage}: the study cannot be read or written ({first_line(error)}); "
                    "put it back, make room for it, or begin another one with another hydra.sweep.dir="
                ) from error

    def _sweep(self, folder: Path, fixed: list[str], space: dict[str, BaseDistribution]) -> list[JobReturn]:
        study = self._study(folder)
        check_study(study, self.direction, fixed, space)
        stopped = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get(FOLDER) == str(folder)]
        asked = {t.number: t.params for t in stopped if not t.state.is_finished()}
        returns: list[JobReturn] = []
        while asked or self._lacks_trials(study):
            while len(asked) < self.n_jobs and self._lacks_trials(study):
                trial = study.ask(space)
                trial.set_user_attr(FOLDER, str(folder))
                asked[trial.number] = trial.params
            first = min(asked)  # a launcher numbers the jobs of a batch one after the other
            batch = list(takewhile(asked.__contains__, range(first, first + self.n_jobs)))
            returns += self._run(study, fixed, {number: asked.pop(number) for number in batch})
        report(study, folder)
        return returns

    def _lacks_trials(self, study: Study) -> bool:
        begun = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() or FOLDER in t.user_attrs]
        return len(begun) < self.n_trials  # a start that was killed as it asked for one has left it to nobody

    def _study(self, folder: Path) -> Study:
        """The study, anew or as it was left; raises ``UserError`` where it is not there any more."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=self.storage, study_name=self.study_name, direction=self.direction, pruner=self.pruner,
            load_if_exists=True,
        )  # fmt: skip
        if there := len(study.trials):
            say(f"study {self.study_name}: {there} of {self.n_trials} trials are in {self.storage}; it goes on")
        elif job := next(folder.glob("*/job.json"), None):
            raise UserError(
                f"{job.parent} is a job of a sweep that study {self.study_name} in {self.storage} knows nothing of; "
                "put the study back, or begin another one with another hydra.sweep.dir="
            )
        study.sampler = self.sampler(seed=self.seed + there)  # the same numbers would ask for the same trials again
        return study

    def _run(self, study: Study, fixed: list[str], trials: dict[int, dict[str, Any]]) -> list[JobReturn]:
        """Run trials whose numbers follow each other, and tell the study how they ended."""
        from optuna.trial import TrialState

        from lit_rlhf.apps.sweep_reader import Job

        jobs = []
        for number, params in trials.items():
            job = [*fixed, *(f"{name}={value}" for name, value in params.items())]
            if "pruning" in self.config.callbacks:
                told = f"'{self.storage}'", self.study_name, number
                job += [f"{address}={value}" for address, value in zip(TRIAL, told)]
            jobs.append(job)
        self.validate_batch_is_legal(jobs)
        returns: list[JobReturn] = [*self.launcher.launch(jobs, initial_job_idx=min(trials))]
        for number, returned in zip(trials, returns):
            value = returned.return_value  # raises what a job raised that could not write down how it ended
            if Job(Path(returned.hydra_cfg.hydra.runtime.output_dir)).status == "pruned":
                study.tell(number, state=TrialState.PRUNED)
            elif math.isfinite(value):
                study.tell(number, value)
            else:
                study.tell(number, state=TrialState.FAIL)
        return returns


def check_study(study: Study, direction: str, fixed: list[str], space: dict[str, BaseDistribution]) -> None:
    """Raise ``UserError`` where a study was begun with another direction, or other values to choose from; say so of
    settings that all trials have."""
    from optuna.distributions import check_distribution_compatibility

    another, changed = "begin another one with another hydra.sweep.dir=", dict[str, str]()
    if (before := study.direction.name.lower()) != direction:
        raise UserError(f"hydra.sweeper.direction={direction}: the study that goes on has {before}; {another}")
    for trial in study.get_trials(deepcopy=False):
        for name in space.keys() & trial.distributions.keys():
            was, now = _shown(trial.distributions[name]), _shown(space[name])
            try:
                check_distribution_compatibility(trial.distributions[name], space[name])
            except ValueError:
                raise UserError(f"{name}={now}: the study that goes on has {was}; {another}") from None
            if was != now:
                changed[name] = f"{was} so far, {now} from here on"
    for name, how in changed.items():
        say(f"study {study.study_name}: {name} is drawn from {how}; the best is the best of both")
    known = study.user_attrs.get(FIXED, fixed)
    if {*known} != {*fixed}:
        say(f"study {study.study_name}: its trials so far had {' '.join(known)}; those to come are compared with them")
    study.set_user_attr(FIXED, fixed)


def _shown(values: BaseDistribution) -> str:
    """What is drawn from, as it is written on the command line."""
    known: Any = values
    if hasattr(known, "choices"):
        return f"choice({','.join(map(str, known.choices))})"
    if known.step and not known.log:
        return f"range({known.low:g},{known.high + known.step:g},{known.step:g})"
    interval = f"interval({known.low:g},{known.high:g})"
    return f"tag(log,{interval})" if known.log else interval


def report(study: Study, folder: Path) -> None:
    """Print the best trial, and draw ``study.png``."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return
    best = study.best_trial
    print(f"best of {len(done)} finished trials: {best.number} with {best.value:.4g}, "
          f"{' '.join(f'{name}={value}' for name, value in best.params.items())}", flush=True)  # fmt: skip
    draw(study, folder / "study.png")
    print(f"study: {folder / 'study.png'}", flush=True)


def draw(study: Study, path: Path) -> None:
    """Two panels: the objective trial by trial with the best so far; the importance of each setting (PED-ANOVA)."""
    from matplotlib.figure import Figure
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    from lit_rlhf.apps.sweep_reader import load_jobs

    figure = Figure(figsize=(11, 4), layout="constrained")
    history, importance = figure.subplots(1, 2)
    styles = {TrialState.COMPLETE: ("o", "#1f4e9c", "finished"), TrialState.PRUNED: ("x", "#7a8ba8", "ended early")}
    for state, (marker, colour, label) in styles.items():
        trials = [t for t in study.get_trials(deepcopy=False, states=(state,)) if t.value is not None]
        if trials:
            history.plot([t.number for t in trials], [t.value for t in trials], marker, color=colour, label=label)
    better = max if study.direction.name == "MAXIMIZE" else min
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    so_far = [better(t.value for t in done[: i + 1] if t.value is not None) for i in range(len(done))]
    history.step([t.number for t in done], so_far, where="post", color="#1f4e9c", alpha=0.5, label="best so far")
    objective = next((job.objective[0] for job in load_jobs(path.parent) if job.done), "objective")
    history.set(xlabel="trial", ylabel=objective, title=f"best: trial {study.best_trial.number}")
    history.xaxis.get_major_locator().set_params(integer=True)
    history.legend()
    evaluator = PedAnovaImportanceEvaluator()  # asks for no further package, as fANOVA does
    told = len(done) > 1 and len({t.value for t in done}) > 1
    with warnings.catch_warnings(record=True) as rough:  # Optuna's, of values that few trials had
        warnings.simplefilter("always")
        shares = get_param_importances(study, evaluator=evaluator) if told else {}
    importance.barh([*shares][::-1], [*shares.values()][::-1], height=0.5, color="#1f4e9c")
    importance.set(
        xlabel="share of what tells the best trials from the others (PED-ANOVA)",
        title="importance: too few trials" if not shares else f"importance{', roughly: few trials' if rough else ''}",
    )
    with written_anew(path, "wb") as file:
        figure.savefig(file, dpi=150)
