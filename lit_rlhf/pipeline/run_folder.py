"""A run is a folder: where a stage's results lie, whether it is finished, and by which settings it was made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.files import NEW, Checked, damaged, read_yaml
from lit_rlhf.finished import digest_of
from lit_rlhf.pipeline.failures import of_stage
from lit_rlhf.pipeline.settings import resolved, stages_of
from lit_rlhf.stages.stage import Stage, all_stages


class Seed(Checked):
    """Settings of the world, or of the split."""

    seed: int


class Begun(Checked):
    """Origin of a run as stages write it, beside their settings."""

    from_run: str | None = None
    checkpoint: str | None = None
    recipe: str | None = None


class StageConfig(Checked):
    """The fields of ``config.yaml`` that others read; beside them stand the stage's own settings."""

    __pydantic_extra__: dict[str, dict[str, Any]]
    world: Seed | None = None
    split: Seed | None = None
    origin: Begun | None = None


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings with which the stage in ``folder`` was begun; nothing where it was not."""
    return read_yaml(folder / "config.yaml", StageConfig)


class Origin(NamedTuple):
    """Origin of a run: the seeds, runs and checkpoint that it began with."""

    seeds: dict[str, int]  # of world and split
    runs: list[str]  # names of the runs that its stages started from
    checkpoint: str | None  # a folder or Hub name that took the place of pretraining
    recipe: str | None


def origin_of(run: Path) -> Origin:
    """Origin of a run by all of its stages; empty where there is no such run."""
    folders: dict[Path, None] = {}
    for stages in ("*", "rounds/*/*"):
        found = {file.parent for name in ("config.yaml", "done.json") for file in run.glob(f"{stages}/{name}")}
        folders |= dict.fromkeys(sorted(found))
    written = [origin_of_stage(folder) for folder in folders if folder.suffix != NEW]
    seeds = {part: o.seeds[part] for o in reversed(written) for part in o.seeds}
    runs = list(dict.fromkeys(name for o in written for name in o.runs))
    checkpoint = next((o.checkpoint for o in written if o.checkpoint), None)
    return Origin(seeds, runs, checkpoint, next((o.recipe for o in written if o.recipe), None))


def origin_of_stage(folder: Path) -> Origin:
    """Origin of a run by one of its stages; empty where ``folder`` is not that of a stage."""
    file = folder / "config.yaml"
    if os.path.lexists(file):
        return _origin(file, file.lstat().st_mtime_ns)
    if (folder / "done.json").exists():
        raise damaged(file, "it is gone, and the stage is finished")
    return Origin({}, [], None, None)


@cache
def _origin(file: Path, changed: int) -> Origin:
    """Read once, for many settings ask."""
    settings = read_settings(file.parent)
    seeds = {part: settings[part]["seed"] for part in ("world", "split") if part in settings}
    known = settings.get("origin") or {}
    runs = [known["from_run"]] if known.get("from_run") else []
    return Origin(seeds, runs, known.get("checkpoint"), known.get("recipe"))


def lineage(cfg: DictConfig) -> Iterator[Path]:
    """The folders of this run, of the run that it starts from, of those that these started from, and so on."""
    runs = Path(cfg.paths.runs)
    yield from _behind([Path(cfg.paths.run_dir), runs / cfg.from_run], runs)


def _behind(todo: list[Path], runs: Path) -> Iterator[Path]:
    """Some runs, those that they started from, and so on."""
    seen = set[Path]()
    while todo:
        run = todo.pop(0)
        if run not in seen:
            seen.add(run)
            yield run
            todo += [runs / name for name in origin_of(run).runs]


def check_lineage(cfg: DictConfig) -> list[str]:
    """Names of runs that are not there any more. Raises ``UserError`` where this run would come from itself."""
    runs = Path(cfg.paths.runs)
    if cfg.from_run != cfg.run:
        from_there = OmegaConf.merge(cfg, {"run": cfg.from_run, "paths": {"run_dir": str(runs / cfg.from_run)}})
        if runs / cfg.run in lineage(from_there):
            raise UserError(
                f"from_run={cfg.from_run}: that run itself started from {cfg.run}; choose another run= for what is to "
                "start from both"
            )
    begun = (Path(cfg.paths.run_dir), runs / cfg.from_run)
    return [os.path.relpath(run, runs) for run in lineage(cfg) if run not in begun and not run.is_dir()]


def upstream_model(stage: str, if_there: bool = False, *, _root_: DictConfig) -> str:
    """``${upstream:sft}``: the model folder of a stage that this one starts from.

    That of pretraining may be a checkpoint: the one that is named now, or that a run began with; but where pretraining
    went on from it in this run, its result. A checkpoint from which nothing was fine-tuned counts as fine-tuned.
    ``if_there``: it is done without where there is none, and ``model.path`` need not be given for it."""
    record, found = _record(stage), upstream(_root_, stage, f"{stage}/model")
    if stage in stages_of(_root_) or (found.exists() and found.is_relative_to(_root_.paths.run_dir)):
        return str(found)
    checkpoint = checkpoint_of(_root_) if record.skipped_for_checkpoint else None
    if checkpoint and _began_with(found, _root_) != absolute(checkpoint):
        return upstream_model(record.models[record.trained], _root_=_root_)
    if not record.replaced_by_checkpoint:
        return str(found)
    if OmegaConf.is_missing(_root_.model, "path") and not if_there:
        return _root_.model.path  # raises what says that it is not given
    return checkpoint_of(_root_, found) or str(found)


def checkpoint_of(cfg: DictConfig, pretrained: Path | None = None) -> str | None:
    """The folder or Hub name that takes the place of pretraining, named now or when a run of the lineage began; None
    where ``pretrained``, a result of pretraining, is nearer."""
    if given := OmegaConf.select(cfg, "model.path"):  # None where it is ???: a stage may name its own
        return str(given)
    for run in lineage(cfg):
        if pretrained is not None and pretrained.exists() and pretrained.is_relative_to(run):
            return None
        if checkpoint := origin_of(run).checkpoint:
            return checkpoint
    return None


def _began_with(model: Path, cfg: DictConfig) -> str | None:
    """The checkpoint behind a model of a run; None where there is none, or no such model."""
    runs = [run for run in lineage(cfg) if model.exists() and model.is_relative_to(run)]
    known = (origin_of(run).checkpoint for run in _behind(runs, Path(cfg.paths.runs)))
    return next(filter(None, known), None)


def _record(stage: str) -> Stage:
    if stage not in all_stages():
        raise UserError(f"${{upstream:{stage}}}: there is no such stage; there are {', '.join(all_stages())}")
    return all_stages()[stage]


def collecting_stage() -> str:
    """The stage whose records others read."""
    return next(stage.data_from for stage in all_stages().values() if stage.data_from is not None)


def upstream_data(name: str, *, _root_: DictConfig) -> str:
    """``${upstream_data:rankings-0.jsonl}``: collected data that a stage starts from."""
    return str(upstream(_root_, collecting_stage(), f"data/{name}"))


def newest_round(*, _root_: DictConfig) -> int:
    """``${newest_round:}``: the last round whose answers this run has collected, else ``from_run``; 0 before any."""
    for run in (Path(_root_.paths.run_dir), Path(_root_.paths.runs) / _root_.from_run):
        files = [*run.glob("data/*.jsonl"), *run.glob("rounds/*/data/*.jsonl")]
        found = [re.fullmatch(r"(?:answers|rankings)-(\d+)", file.stem) for file in files]
        if numbers := [int(match[1]) for match in found if match]:
            return max(numbers)
    return 0


def round_data(number: int, *, _root_: DictConfig) -> str:
    """``${round_data:3}``: this run's ``data/`` in which what belongs to a round is kept."""
    run = Path(_root_.paths.run_dir)
    own = run / "rounds" / str(number)
    return str((own if own.is_dir() else run) / "data")


def upstream(cfg: DictConfig, stage: str, inside: str) -> Path:
    """This run's own result where it has one or is about to make one, else that of ``from_run``, or of the nearest run
    behind it that has one."""
    from lit_rlhf.apps.run_reader import newest  # here, as all that imports torch: a mistyped setting is found before

    own = newest(Path(cfg.paths.run_dir), inside)
    if own.exists() or stage in stages_of(cfg):
        return own
    found = (newest(run, inside) for run in lineage(cfg))
    return next((path for path in found if path.exists()), newest(Path(cfg.paths.runs) / cfg.from_run, inside))


def sampling_precision(precision: str) -> str:
    """The precision of ``auto`` in stages that sample: in half precision, sampling and training round differently."""
    return "32-true" if precision == "auto" else precision


def by_lora(model: str, full: float, adapters: float, *, _root_: DictConfig) -> float:
    """``${by_lora:sft,5.0e-5,5.0e-4}``: the second value where adapters (``sft.lora``) are trained in place of all."""
    given = (OmegaConf.select(_root_, f"{model}.lora.{name}") for name in ("r", "path"))
    return adapters if any(given) else full


def merge(*addresses: str, _root_: DictConfig) -> DictConfig:
    """``${merge:lora,sft.lora}``: the settings of both, the last one's where both have one."""
    return OmegaConf.merge({}, *(OmegaConf.select(_root_, address) for address in addresses))  # type: ignore[return-value]


def register_resolvers() -> None:
    """Make ``${upstream:...}`` and the like known to the settings."""
    OmegaConf.register_new_resolver("upstream", upstream_model, replace=True)
    for resolver in (by_lora, merge, upstream_data, newest_round, round_data, sampling_precision):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def remember_world(cfg: DictConfig) -> None:
    """Fill in ``world.seed`` and ``split.seed``: what the run was begun with, inherited through ``from_run``.

    A sweep over ``seed`` then varies the training, not the questions."""
    runs = (Path(cfg.paths.run_dir), Path(cfg.paths.runs) / cfg.run, *lineage(cfg))
    known = next((seeds for run in runs if (seeds := origin_of(run).seeds)), {})
    for part in ("world", "split"):
        if cfg[part].seed is None:
            cfg[part].seed = known.get(part, cfg.seed)


def absolute(path: str) -> str:
    """A folder's whole path, for later commands may be given elsewhere; a Hub name as it is."""
    return os.path.abspath(path) if os.path.isdir(path) else str(path)


def start_of(cfg: DictConfig, stage: str) -> str | None:
    """The model that a stage goes on from; None where it makes one, or only looks at models."""
    return (resolved(cfg, stage).get(all_stages()[stage].trained) or {}).get("path")


def input_paths(stage: str, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """(address, path) of the models and collected data that a stage starts from."""
    found = []
    for address, node in model_nodes(stage, settings).items():
        if adapter := (node.get("lora") or {}).get("path"):
            found.append((f"{stage}.{address}.lora.path", adapter))
        paths = node.get("path") or []
        found += [(f"{stage}.{address}.path", path) for path in ([paths] if isinstance(paths, str) else paths)]
    found += [(f"{stage}.models.{name}", path) for name, path in (settings.get("models") or {}).items() if path]
    for name in ("path", "export"):
        given = (settings.get("annotator") or {}).get(name) or []
        found += [(f"{stage}.annotator.{name}", path) for path in ([given] if isinstance(given, str) else given)]
    if all_stages()[stage].data_from is not None:
        found += _data_paths(stage, settings)
    return found


def model_nodes(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Address -> the settings that build a model, of all models of a stage that are wanted."""
    nodes: dict[str, Any] = {}
    record = all_stages()[stage]
    for name in record.model_settings:
        node = settings.get(name) or {}
        nodes |= {name: node} if name in record.models else {f"{name}.{key}": each for key, each in node.items()}
    return {address: node for address, node in nodes.items() if node is not None}


def _data_paths(stage: str, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """(address, path) of the user's own files: what is missing should be said before earlier stages have run."""
    from lit_rlhf.text.records import files_of

    return [(f"{stage}.data.path", path) for path in files_of(settings["data"].get("path") or [])]


def fingerprint_of(path: Path) -> str | None:
    """Fingerprint of a model folder's weights or of a data file; None where there is nothing."""
    from lit_rlhf.models.checkpoint import fingerprint

    if path.is_dir():
        return fingerprint(path)
    return digest_of(path) if path.is_file() else None  # a person who turns a ranking round changes no length


def check_inputs(cfg: DictConfig) -> None:
    """Raise ``UserError`` where a stage would start from something that is not there and will not be made."""
    names, gone = stages_of(cfg), check_lineage(cfg)
    for name in names:
        made = [Path(cfg.paths.run_dir) / earlier for earlier in names[: names.index(name)]]
        coming = [str(folder / part) for folder in made for part in ("model", "adapter")]
        coming += [str(Path(cfg.paths.run_dir) / "data")] * (collecting_stage() in names)
        settings = resolved(cfg, name)
        missing = [
            (address, path)
            for address, path in [*input_paths(name, settings), *_data_paths(name, settings)]
            if not Path(path).exists() and (path.startswith((str(cfg.paths.runs), "/", ".")))
            if not any(path.startswith(start) for start in coming)
        ]
        if needed := all_stages()[name].at_least:  # models of stages that were not run are left out
            given = OmegaConf.select(cfg, "model.path")
            made = [n for n, stage in all_stages().items() if not (given and stage.replaced_by_checkpoint)]
            own = [upstream_model(stage, True, _root_=cfg) for stage in made]
            left_out = [m for m in missing if m[0] != f"{name}.{needed}.path" and m[1] in own]
            missing = [m for m in missing if m not in left_out]
            for address, path in left_out if not missing else []:
                if gone or not path.startswith(str(cfg.paths.runs)):
                    print(f"{name}: {address.split('.')[-2]} is left out, for {path} is not there{_lost(gone)}")
        for address, path in missing:
            if not path.startswith(str(cfg.paths.runs)):
                raise UserError(f"{address}={path}: there is no such file or folder")
            made_by = next((s for s in all_stages() if f"/{s}/" in f"{path}/"), collecting_stage())
            raise UserError(
                f"{name}: {path} is not there. Run stage={made_by} first (run={cfg.from_run}), name a run that has it "
                f"by from_run=, or set {address}={_lost(gone)}"
            )


def _lost(gone: list[str]) -> str:
    return f"; this run goes back to {', '.join(gone)}, which is not there any more" if gone else ""


def check_records(cfg: DictConfig) -> None:
    """Read the user's files of several stages: a bad line is better known now than when hours have passed."""
    from lit_rlhf.stages.records import FileDataModule, RecordDataModule
    from lit_rlhf.text.records import Reading, Seen, entries_of, kinds_of, read_records, records_key, stored_records
    from lit_rlhf.text.records.sources import FORMATS, format_of, readable

    names = stages_of(cfg)
    for name in names if len(names) > 1 else []:  # one alone reads its own in a moment
        data = resolved(cfg, name)["data"]
        kind = get_class(data["_target_"])
        if not issubclass(kind, FileDataModule) or kind.parse_record is None or not kind.ends:
            continue  # nobody knows its records, or how many there are
        how = kind.parse_record, data.get("on_bad_record", "fail"), data.get("fields")
        try:
            entries = entries_of(data.get("path") or [])
            files = [Path(file) for entry in entries for file in entry if "://" not in file]
            for file in files:
                if format_of(file) in FORMATS and not file.is_relative_to(cfg.paths.runs):
                    readable(str(file))
        except UserError as error:
            raise UserError(f"{name}.data.path: {error}") from None
        whole = len(files) == sum(map(len, entries))
        there = [file for file in files if file.is_file() and not file.is_relative_to(cfg.paths.runs)]
        on_disk = data.get("cache") and issubclass(kind, RecordDataModule) and kinds_of(kind.parse_record)
        with of_stage(name):
            if on_disk and whole and there and len(there) == len(files):  # the stage finds them there
                reading = Reading(*how, kind.asked, data["split_seed"], kind.about)
                stored_records(entries, reading, records_key(entries, reading), Path(data["cache"]))
            else:
                for path in there:
                    for _ in read_records(path, how[0], Seen(), *how[1:]):
                        pass
