"""Trackio: metrics in a file of this machine, which ``trackio show`` draws."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """One run of Trackio, under one name however often it is interrupted.

    Args:
        name: of the run.
        project: under which Trackio keeps it.
        kwargs: of ``trackio.init``: group, space_id and so on.
    """

    def __init__(self, name: str, project: str = "lit_rlhf", **kwargs: Any) -> None:
        super().__init__()
        self._name, self._project, self._kwargs = name, project, kwargs
        self._run: Any = None
        self._settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The run's name."""
        return self._name

    @property
    def version(self) -> str:
        """None: a run has a name alone."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun or gone on with."""
        if self._run is None:
            import trackio

            settings = {"config": self._settings, "resume": "allow", "embed": False, **self._kwargs}
            with redirect_stdout(StringIO()):  # five lines at each start
                self._run = trackio.init(self._project, name=self._name, **settings)
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what belongs to a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any) -> None:
        """Settings become the run's config."""
        self._settings |= params
        self.experiment.config.update(params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, and end the run."""
        if self._run is not None:
            import trackio

            with redirect_stdout(StringIO()):
                trackio.finish()
            self._run = None
