"""A finished run in a notebook: its models, figures and tables."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_rlhf.apps.run_reader import load_run, newest, read_summary, round_folders
from lit_rlhf.errors import UserError
from lit_rlhf.files import read_jsonl
from lit_rlhf.stages.reward import STAGE as REWARD
from lit_rlhf.stages.stage import all_stages

if TYPE_CHECKING:
    from IPython.display import HTML
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadedRun:
    """What a run's folder holds. In a notebook it shows its stages and headline figures; :meth:`show` shows the report.

    Models are read when they are asked for. Of stages that were gone through in rounds, the last round's are meant.
    Raises ``UserError`` where there is no run.

    Args:
        path: the run's folder, such as ``runs/quickstart``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such folder, where a run was expected, as runs/quickstart")
        self._run = load_run(self.path)
        self.summary: dict[str, Any] = read_summary(self.path)
        self.stages = [name for name in all_stages() if name in self._run.figures]

    def figures(self, stage: str) -> dict[str, Any]:
        """The figures of a finished stage; docs/metrics.md defines them."""
        return self._run.figures[self._known(stage, self.stages)]

    def metrics(self, stage: str) -> DataFrame:
        """What a stage logged: a row per step (the index), a column per metric."""
        from pandas import DataFrame

        rows = self._run.metrics[self._known(stage, list(self._run.metrics))]
        return DataFrame.from_dict(rows, orient="index").sort_index().rename_axis("step")

    def samples(self, stage: str) -> DataFrame:
        """The texts that a stage wrote as it went, or that it compared: a row each."""
        from pandas import DataFrame

        return DataFrame(self._run.samples[self._known(stage, [n for n, rows in self._run.samples.items() if rows])])

    def rankings(self) -> DataFrame:
        """The rankings that were collected, of all rounds: prompt, responses, ranks."""
        from pandas import DataFrame

        folders = [self.path, *round_folders(self.path)]
        files = [file for folder in folders for file in sorted((folder / "data").glob("rankings*.jsonl"))]
        return DataFrame([row for file in files for row in read_jsonl(file)])

    def policy(self, stage: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """(model, tokenizer) of a stage; None: of the last one that trained a policy."""
        from lit_rlhf.models import load_policy_and_tokenizer

        policies = [name for name, record in all_stages().items() if record.model is not None]
        there = [name for name in reversed(policies) if self._model(name).is_dir()]
        if not there and stage is None:
            raise UserError(f"{self.path}: no stage of this run has a policy; its stages are {', '.join(self.stages)}")
        return load_policy_and_tokenizer(self._model(self._known(stage or there[0], there)))

    def reward_model(self) -> Any:
        """The reward model, which scores ``input_ids`` and ``attention_mask``; see ``lit_rlhf.models``."""
        from lit_rlhf.models import load_reward_model

        self._known(REWARD.name, [name for name in self.stages if self._model(name).is_dir()])
        return load_reward_model(self._model(REWARD.name))

    def show(self, height: int = 800) -> HTML:
        """The report, inside the notebook; ``height`` in pixels."""
        from IPython.display import HTML

        from lit_rlhf.apps.report import page_of

        page = html.escape(page_of(self._run), quote=True)
        return HTML(f'<div><iframe srcdoc="{page}" style="width: 100%; height: {height}px; border: 0"></iframe></div>')

    def _model(self, stage: str) -> Path:
        return newest(self.path, f"{stage}/model")

    def _known(self, stage: str, known: list[str]) -> str:
        if stage not in known:
            raise UserError(
                f"{self.path}: {stage} has none of this here; one of {', '.join(known) or 'none'} was expected"
            )
        return stage

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.path)!r}, stages={self.stages})"

    def _repr_html_(self) -> str:
        from lit_rlhf.apps.report.comparison import headline

        titles, rows = all_stages(), []
        for stage in self.stages:
            shown = {k: v for k, v in self._run.figures[stage].items() if isinstance(v, int | float)}
            texts = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" for k, v in list(shown.items())[:5])
            text = ", ".join(texts)
            seconds = self._run.seconds.get(stage)
            took = "" if seconds is None else f"{seconds:.0f} s"
            rows.append(
                f"<tr><td>{html.escape(titles[stage].title)}</td><td>{took}</td><td>{html.escape(text)}</td></tr>"
            )
        head = "<tr><th>stage</th><th>time</th><th>figures</th></tr>"
        result = headline(self._run)
        said = "" if result is None else html.escape(f": {result.before}{result.number}{result.after}")
        return f"<p>run <b>{html.escape(str(self.path))}</b>{said}</p><table>{head}{''.join(rows)}</table>"
