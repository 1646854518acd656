"""Settings, checked before anything is loaded.

The constructors say what they take: a setting's type and range are those of the parameter that it reaches
(``Annotated[float, Field(ge=0)]``), so there is no second list to keep. Each error names the setting's address."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.checks import RunName, check_model, check_no_credentials, check_node, check_value, left_out
from lit_rlhf.pipeline.failures import shortened
from lit_rlhf.pipeline.overrides import addresses, changes_structure, check_structure, chooses_group, exists
from lit_rlhf.pipeline.search_space import outermost_jobs
from lit_rlhf.stages.stage import Stage, all_stages

COMMANDS = ("label", "chat")  # pages and the like: an object with launch(), which ends when a person ends it


class MissingSetting(UserError):
    """Raised where a setting that must be given is not."""


def conf_dir() -> Path:
    """The folder of the settings: inside the package (wheel), or beside it (checkout, editable install)."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "conf"
    # The checkout's comes first: an editable install may leave a stale copy inside the package.
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


class Strict(BaseModel):
    """Plain settings, whose types are not converted."""

    model_config = ConfigDict(strict=True)


Section = dict[str, Any]


class Built(BaseModel):
    """The settings of an object."""

    model_config = ConfigDict(extra="allow", strict=True)

    target: Annotated[str, Field(alias="_target_")]


class OwnSeed(Strict):
    """A seed that a run keeps."""

    seed: Annotated[int, Field(ge=0)] | None


class Paths(Strict):
    """Where a run and what is kept for it lie."""

    runs: Annotated[str, Field(min_length=1)]
    run_dir: Annotated[str, Field(min_length=1)]
    cache: str


class BetweenRounds(Strict):
    """Settings of what a round takes over from those before it."""

    policy: Literal["last", "sft"]
    rankings: Annotated[int, Field(ge=1)] | None


class TopLevel(Strict):
    """The settings that belong to no stage."""

    stage: str | list[str]
    run: RunName
    from_run: RunName
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    rounds: Annotated[int, Field(ge=1)]
    overwrite: bool
    objective: str | None
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    special_tokens: Literal["plain", "refuse", "rendered"]
    recipe: str
    hint: str | None
    between_rounds: BetweenRounds
    world: OwnSeed
    split: OwnSeed
    paths: Paths
    about: Section
    model: Section
    tokenizer: Section
    trainer: Section
    logger: dict[str, Built | None]
    callbacks: Section
    engine: Section
    profiler: Built | None = None


class Keep(Strict):
    """Which weights of a stage are exported."""

    best: bool
    metric: str
    mode: Literal["max", "min"]


class StageLevel(Strict):
    """The settings of a stage that reach no constructor."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    run: Literal["fit", "predict", "test"]
    module: Built
    data: Built
    trainer: Built
    health: Built | None = None
    validate_first: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    samples_every: Annotated[int, Field(ge=1)] = 1
    keep: Keep | None = None
    allow_trained: bool = False
    models: dict[str, str | None] | None = None


def compose_settings(overrides: list[str], config_dir: Path | None = None, with_hydra: bool = False) -> DictConfig:
    """Settings composed from overrides; raises ``UserError`` in one line where it cannot be had.

    ``with_hydra``: with Hydra's own settings, at ``hydra``."""
    overrides = [*outside_groups(), *overrides]
    with initialize_config_dir(str(config_dir or conf_dir()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=overrides, return_hydra_config=True)
            _check_changes(overrides, cfg)
        except UserError:
            raise
        except Exception as error:  # Hydra and OmegaConf have many kinds, and Python's own
            raise UserError(_composition_error(error, overrides)) from error
    if not with_hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfg


def _check_changes(overrides: list[str], cfg: DictConfig) -> None:
    """Raise ``UserError`` where an override adds what nobody reads or takes away what is needed."""
    asked = _parsed(overrides)
    for override in asked:
        key, value = override.key_or_group, override.value()
        if "." in key and isinstance(value, str) and value in _options(key):
            raise UserError(f"{key}={value}: an option of a group of settings is chosen with slashes: "
                            f"{key.replace('.', '/')}={value}")  # fmt: skip
    if changes := [o for o in asked if changes_structure(o, cfg)]:
        kept = [o.input_line for o in asked if chooses_group(o, cfg) or o.key_or_group.startswith("hydra.")]
        optional = {name for name, field in StageLevel.model_fields.items() if not field.is_required()}
        check_structure(changes, cfg, compose("config", overrides=kept, return_hydra_config=True), optional)


class OutsideSettings(SearchPathPlugin):
    """Lets Hydra find the settings of stages of other distributions."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for stage in all_stages().values():
            if stage.settings is not None:
                search_path.append(provider=stage.name, path=f"file://{stage.settings.resolve()}")


def outside_groups() -> list[str]:
    """The overrides that add the settings of stages of other distributions, which Hydra finds from now on."""
    outside = [stage.name for stage in all_stages().values() if stage.settings is not None]
    if outside:
        Plugins.instance().register(OutsideSettings)
    return [f"+{name}=default" for name in outside]


def opened(arguments: list[str]) -> list[str]:
    """Arguments as Hydra takes them: ``evaluate.policies.NAME=FOLDER`` may add a model, without a ``+``."""
    return [f"++{a}" if re.match(r"evaluate\.policies\.\w+=", a) else a for a in arguments]


def name_loaders(cfg: DictConfig) -> None:
    """Write out what stands for a model of ``evaluate.policies`` that is given by its folder or Hub name alone."""
    for name, node in cfg.evaluate.policies.items():
        if isinstance(node, str):
            loader = {"_target_": "lit_rlhf.models.load_policy_and_tokenizer", "path": node}
            OmegaConf.update(cfg, f"evaluate.policies.{name}", loader, force_add=True)


def sweep_jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a multirun with the basic sweeper, those that the settings sweep over included; of
    our Optuna sweeper, the outermost jobs; of another one, which alone knows its jobs, what they have in common."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = hydra_settings(overrides).sweeper
    asked = [f"{name}={values}" for name, values in (sweeper.get("params") or {}).items()]
    if sweeper._target_ == "hydra_plugins.lit_rlhf_optuna.OptunaSweeper":
        return outermost_jobs([*asked, *overrides])
    if not sweeper._target_.endswith(f".{BasicSweeper.__name__}"):
        return [without_sweeps(overrides)]
    try:
        batches = BasicSweeper.split_arguments(_parsed([*asked, *overrides]), max_batch_size=None)
    except HydraException as error:
        hint = "; hydra/sweeper=optuna draws from intervals" if "INTERVAL" in str(error) else ""
        raise UserError(f"{_composition_error(error, overrides)}{hint}") from None
    return [list(job) for batch in batches for job in batch]


def hydra_settings(overrides: list[str]) -> DictConfig:
    """Hydra's own settings, for all jobs of a multirun."""
    return compose_settings(without_sweeps(overrides), with_hydra=True).hydra


def without_sweeps(overrides: list[str]) -> list[str]:
    """The overrides that give one value each: what all jobs of a multirun have in common."""
    return [o.input_line for o in _parsed(overrides) if not o.is_sweep_override()]


def _parsed(overrides: list[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except Exception as error:  # Python's own, too: of a number of thousands of digits
            hint = "" if override.isascii() else "; letters beyond ASCII stand in quotes: 'name=\"value\"'"
            raise UserError(f"{shortened(override, 80)}: {shortened(error).partition(' See https')[0]}{hint}") from None
    return parsed


# Addresses of earlier versions, and of others' commands.
RENAMED = {
    r"(\w+)\.trainer\.gradient_clip_val": r"\1.module.max_grad_norm",
    r"ppo\.trainer\.accumulate_grad_batches": "ppo.module.minibatch_size",  # answers per optimizer step
    r"evaluate\.data\.limit": "evaluate.data.limit_held_out",  # of training prompts, of which there are none
    r"preference\.(module|annotator)\.journal": r"preference.\1.progress_file",
    r"\w+\.optimizer\.fused": "automatic",
    r"(?:[\w.]+\.)?ckpt_path": "automatic (a stage goes on from its own checkpoints; overwrite=true: from the start)",
    r"((?:\w+\.)?trainer)\.(?:onednn|whole_last_layer|batched_attention|row_multiple)": r"\1.kernels (fast or plain)",
    r"keep_freed_memory|engine\.lean|(?:[\w.]+\.)?fused": "trainer.kernels (fast or plain)",
}


def _options(group: str) -> dict[str, Path]:
    """The options of a group of settings (``sft.data`` or ``sft/data``), each with its file."""
    return {file.stem: file for file in sorted((conf_dir() / group.replace(".", "/")).glob("*.yaml"))}


def _options_with(key: str) -> list[str]:
    """The options, as they are chosen, that would bring a setting: ``sft/data=jsonl`` for ``sft.data.path``."""
    parts = key.split(".")
    groups = {"/".join(parts[:n]): ".".join(parts[n:]) for n in range(len(parts) - 1, 0, -1)}
    return [
        f"{group}={name}"
        for group, rest in groups.items()
        for name, file in _options(group).items()
        if exists(OmegaConf.load(file), rest)
    ]


def _composition_error(error: Exception, overrides: list[str]) -> str:
    text = str(error).split("Config search path")[0]
    if "Config group override must be a string" in text:
        for asked in (o for o in _parsed(overrides) if not isinstance(o.value(), str)):
            if options := ", ".join(_options(asked.key_or_group)):
                return (
                    f"{asked.input_line}: this is a group of settings; name one of its options ({options}), or leave "
                    "it as it is"
                )
    if match := re.search(r"Could not load '(.+)/(.+?)'", text):
        return f"{match[1]}: there is no option {match[2]}; there are {', '.join(_options(match[1]))}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        for old, new in RENAMED.items():
            if renamed := re.fullmatch(old, key):
                return f"{key}: there is no such setting; it is {renamed.expand(new)} now"
        kept = ("hydra.searchpath=", *outside_groups())
        base = compose("config", overrides=[o for o in overrides if "/" in o.split("=")[0] or o.startswith(kept)])
        known = list(addresses(base))
        if key in known:
            above = key.rpartition(".")[0]
            within = re.search(r"full_key: (\S+)", str(error.__cause__))
            if within and within[1].startswith(f"{key}."):
                return (
                    f"{within[1]}: there is no such setting, and {key}={{...}} changes only those that there are; for "
                    f"others write an option of your own, {above.replace('.', '/')}/NAME.yaml (--config-dir)"
                )
            return f"{key}: another choice of this command (experiment, or an override) has replaced {above}"
        if options := _options_with(key):
            return f"{key}: this setting comes with {' or '.join(options)}; give that, too"
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        siblings = sorted({k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]})
        there = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(siblings[:40])}."
        return f"{key}: there is no such setting. {there}"
    return shortened(text)


def command_of(cfg: DictConfig) -> str | None:
    """The command that is to run in place of stages, or None."""
    return cfg.stage if isinstance(cfg.stage, str) and cfg.stage in COMMANDS else None


def stages_of(cfg: DictConfig) -> list[str]:
    """The stages that are to run, in their order; none of them for a command or the report."""
    if not isinstance(cfg.stage, str | ListConfig):
        raise UserError(
            f"stage={'null' if cfg.stage is None else cfg.stage}: the name of a stage was expected, or a list of them"
        )
    asked = [cfg.stage] if isinstance(cfg.stage, str) else list(cfg.stage)
    known = all_stages()
    if asked == ["pipeline"]:
        return [name for name, stage in known.items() if stage.in_pipeline and _not_replaced(stage, cfg)]
    if asked in (["report"], ["plan"]) or command_of(cfg):
        return []
    if alone := [name for name in asked if name in COMMANDS]:
        raise UserError(f"stage: {alone[0]} is a page, which runs by itself; give stage={alone[0]} alone")
    if unknown := [name for name in asked if name not in known]:
        near = difflib.get_close_matches(str(unknown[0]), [*known, "pipeline", "report", "plan", *COMMANDS], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"stage: there is no stage {unknown[0]!r}.{hint} There are: pipeline, {', '.join(known)}, report, or a "
            f"list of them; and plan, {', '.join(COMMANDS)}."
        )
    if not asked:
        raise UserError(f"stage: an empty list; give one or more of {', '.join(known)}")
    return [name for name in known if name in asked]


def planned_stages(cfg: DictConfig) -> list[str]:
    """Stages that ``stage=plan`` plans: the pipeline, and others that train a policy on preferences."""
    chosen = {name: stage for name, stage in all_stages().items() if stage.in_pipeline or stage.aligns}
    return [name for name, stage in chosen.items() if _not_replaced(stage, cfg)]


def _not_replaced(stage: Stage, cfg: DictConfig) -> bool:
    """Whether no checkpoint takes a stage's place."""
    return not stage.replaced_by_checkpoint or cfg.model.config is not None


def check_top_level(cfg: DictConfig) -> None:
    """Check types and ranges of the settings that belong to no stage, and that all sections are there."""
    kinds = {name: field.annotation for name, field in TopLevel.model_fields.items() if name in cfg}
    check_model(TopLevel, {name: _top_level(cfg, name, kind) for name, kind in kinds.items()}, "")
    check_value(bool, cfg.trainer.get("requeue", False), "trainer.requeue")
    for name in (*all_stages(), *COMMANDS):
        if not isinstance(cfg.get(name), DictConfig):
            raise UserError(f"{name}: this section of the settings is needed, with all its parts; leave it as it is")


def _top_level(cfg: DictConfig, name: str, kind: Any) -> Any:
    """A setting as a plain value; those of a section that belong to other checks are left as they are written."""
    try:
        value = cfg[name]
        return OmegaConf.to_container(value, resolve=kind != Section) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {_interpolation_error(error)}") from None


def _interpolation_error(error: OmegaConfBaseException) -> str:
    """What OmegaConf says in its first line, which is all of it."""
    return str(error).strip().partition("\n")[0]


def check_settings(cfg: DictConfig) -> None:
    """Check types and ranges of everything that the chosen stages will use."""
    check_no_credentials({key: value for key, value in OmegaConf.to_container(cfg).items() if key != "hydra"})
    check_top_level(cfg)
    if command := command_of(cfg):
        check_node(cfg, resolved(cfg, command), command)
    for name in ("callbacks", "logger", *(["profiler"] if "profiler" in cfg else [])):
        check_node(cfg, resolved(cfg, name), name)
    for name in stages_of(cfg):
        check_stage(cfg, name)
    check_monitors(cfg)
    if cfg.stage == "plan":
        for name in planned_stages(cfg):
            with suppress(MissingSetting):  # what is not given is not planned
                check_stage(cfg, name)


def check_monitors(cfg: DictConfig) -> None:
    """Raise ``UserError`` where a callback watches a metric that is none of the stages that run."""
    for key, node in cfg.callbacks.items():
        monitor = node.get("monitor") if isinstance(node, DictConfig) else None
        if stages_of(cfg) and monitor and stage_of_metric(monitor) not in stages_of(cfg):
            raise UserError(
                f"callbacks.{key}.monitor={monitor}: no metric of a stage that runs; one of "
                f"{', '.join(stages_of(cfg))} was expected, as in val/{stages_of(cfg)[0]}/loss"
            )


def stage_of_metric(metric: str) -> str:
    """The stage that logs ``metric``: ``sft`` for ``val/sft/loss``."""
    return metric.removeprefix("val/").partition("/")[0]


def check_stage(cfg: DictConfig, name: str) -> None:
    """Check types and ranges of a stage's settings."""
    for models in (key for key in all_stages()[name].model_settings if key not in all_stages()[name].models):
        if not isinstance(cfg[name].get(models), DictConfig):
            raise UserError(f"{name}.{models}: several models by name were expected, or {{}}; leave it as it is")
    stage = resolved(cfg, name)
    plain = {key: stage[key] for key in StageLevel.model_fields if key in stage}
    check_model(StageLevel, plain, f"{name}.")
    trainer = stage["trainer"]
    if plain["run"] == "fit" and trainer.get("max_epochs", 1) is None and trainer.get("max_steps", 1) == -1:
        raise UserError(f"{name}.trainer: neither max_epochs nor max_steps says how long to train; set one of them")
    if (stage.get("keep") or {}).get("best") and stage["trainer"]["val_check_interval"] is None:
        raise UserError(
            f"{name}.keep.best=true needs validations during training; set {name}.trainer.val_check_interval "
            "(iterations), 10 say"
        )
    for key, node in stage.items():
        if not left_out(name, key, stage):
            check_node(cfg, node, f"{name}.{key}")


def resolved(cfg: DictConfig, name: str) -> dict[str, Any]:
    """The settings of a stage as plain values; raises ``UserError`` where one that must be given is not."""
    try:
        return OmegaConf.to_container(cfg[name], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        if "issing mandatory value" not in str(error) and not isinstance(error, MissingMandatoryValue):
            raise UserError(f"{error.full_key or name}: {_interpolation_error(error)}") from None
        # Another group (model, tokenizer) may leave open what the stage takes from there.
        missing = [key for key in _missing(cfg) if not key.startswith("hydra.")]
        own = [key for key in missing if key.startswith(f"{name}.")]
        key = (own or missing)[0]
        hint = f" ({cfg.hint})" if cfg.hint else ""
        raise MissingSetting(f"{key} is not given{hint}; give it as {key}=...") from None


def _missing(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Addresses of the settings that are ??? in their own place."""
    for key in node:
        if OmegaConf.is_missing(node, key):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_interpolation(node, key) and isinstance(node[key], DictConfig):
            yield from _missing(node[key], f"{prefix}{key}.")
