"""Settings, checked before anything is loaded.

The constructors say what they take: a setting's type and range are those of the parameter that it reaches
(``Annotated[float, Field(ge=0)]``), so there is no second list to keep. Each error names the setting's address."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
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
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from lit_rlhf.errors import CREDENTIALS, UserError
from lit_rlhf.stages.stage import Stage, all_stages

COMMANDS = ("label", "chat")  # pages and the like: an object with launch(), which ends when a person ends it


class MissingSetting(UserError):
    """A setting that must be given is not."""


def conf_dir() -> Path:
    """The folder of the settings: inside the package (wheel), or beside it (checkout, editable install)."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "conf"
    # The checkout's comes first: an editable install may leave a stale copy inside the package.
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"


class Strict(BaseModel):
    """Plain settings, whose types are not converted."""

    model_config = ConfigDict(strict=True)


class BetweenRounds(Strict):
    """What a round takes over from those before it."""

    policy: Literal["last", "sft"]
    rankings: Annotated[int, Field(ge=1)] | None


class TopLevel(Strict):
    """The settings that belong to no stage."""

    stage: str | list[str]
    run: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    from_run: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    rounds: Annotated[int, Field(ge=1)]
    overwrite: bool
    objective: str | None
    threads: Annotated[int, Field(ge=1)] | None


class Keep(Strict):
    """Which weights of a stage are exported."""

    best: bool
    metric: str
    mode: Literal["max", "min"]


class StageLevel(Strict):
    """The settings of a stage that reach no constructor."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    run: Literal["fit", "predict", "test"]
    validate_first: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = 1
    samples_every: Annotated[int, Field(ge=1)] = 1
    keep: Keep | None = None
    allow_trained: bool = False
    models: dict[str, str | None] | None = None


def compose_settings(overrides: list[str], config_dir: Path | None = None, with_hydra: bool = False) -> DictConfig:
    """What the command line asks for; raises ``UserError`` in one line where it cannot be had.

    ``with_hydra``: with Hydra's own settings, at ``hydra``."""
    overrides = [*outside_groups(), *overrides]
    with initialize_config_dir(str(config_dir or conf_dir()), version_base="1.3"):
        try:
            return compose("config", overrides=overrides, return_hydra_config=with_hydra)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_composition_error(str(error), overrides)) from None


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
    """The overrides of each job of a multirun with the basic sweeper, those that the settings sweep over included."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    asked = [f"{name}={values}" for name, values in (hydra_settings(overrides).sweeper.get("params") or {}).items()]
    try:
        batches = BasicSweeper.split_arguments(_parsed([*asked, *overrides]), max_batch_size=None)
    except HydraException as error:
        raise UserError(_composition_error(str(error), overrides)) from None
    return [list(job) for batch in batches for job in batch]


def hydra_settings(overrides: list[str]) -> DictConfig:
    """Hydra's own settings, for all jobs of a multirun."""
    return compose_settings(without_sweeps(overrides), with_hydra=True).hydra


def without_sweeps(overrides: list[str]) -> list[str]:
    """The overrides that give one value each: what all jobs of a multirun have in common."""
    return [o.input_line for o in _parsed(overrides) if not o.is_sweep_override()]


def _parsed(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None


# Addresses of earlier versions, which scripts may still have.
RENAMED = {
    r"(\w+)\.trainer\.gradient_clip_val": r"\1.module.max_grad_norm",
    r"ppo\.trainer\.accumulate_grad_batches": "ppo.module.minibatch_size",  # answers per optimizer step
    r"evaluate\.data\.limit": "evaluate.data.limit_held_out",  # of training prompts, of which there are none
    r"preference\.(module|annotator)\.journal": r"preference.\1.progress_file",
    r"\w+\.optimizer\.fused": "automatic",
    r"((?:\w+\.)?trainer)\.(?:onednn|whole_last_layer|batched_attention|row_multiple)": r"\1.kernels (fast or plain)",
    r"keep_freed_memory|engine\.lean|(?:[\w.]+\.)?fused": "trainer.kernels (fast or plain)",
}


def _composition_error(text: str, overrides: list[str]) -> str:
    text = text.split("Config search path")[0]
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        for old, new in RENAMED.items():
            if renamed := re.fullmatch(old, key):
                return f"{key}: there is no such setting any more; it is {renamed.expand(new)} now"
        kept = ("hydra.searchpath=", *outside_groups())
        base = compose("config", overrides=[o for o in overrides if "/" in o.split("=")[0] or o.startswith(kept)])
        known = list(_addresses(base))
        if key in known:
            above = key.rpartition(".")[0]
            return f"{key}: another choice of this command (experiment, or an override) has replaced {above}"
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        siblings = sorted({k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]})
        there = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(siblings[:40])}."
        return f"{key}: there is no such setting. {there}"
    return " ".join(text.split())


def _addresses(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, DictConfig):
        for key in node:
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                    yield from _addresses(node[key], f"{prefix}{key}.")


def command_of(cfg: DictConfig) -> str | None:
    """The command that is to run in place of stages, or None."""
    return cfg.stage if isinstance(cfg.stage, str) and cfg.stage in COMMANDS else None


def stages_of(cfg: DictConfig) -> list[str]:
    """The stages that are to run, in their order; none of them for a command or the report."""
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
    """What ``stage=plan`` looks at: the pipeline, and what else trains a policy on preferences."""
    chosen = {name: stage for name, stage in all_stages().items() if stage.in_pipeline or stage.aligns}
    return [name for name, stage in chosen.items() if _not_replaced(stage, cfg)]


def _not_replaced(stage: Stage, cfg: DictConfig) -> bool:
    """Whether no checkpoint takes a stage's place."""
    return not stage.replaced_by_checkpoint or cfg.model.config is not None


def check_top_level(cfg: DictConfig) -> None:
    """Check types and ranges of the settings that belong to no stage."""
    top = {name: cfg[name] for name in TopLevel.model_fields}
    top["stage"] = list(cfg.stage) if not isinstance(cfg.stage, str) else cfg.stage
    _check_model(TopLevel, top, "")
    _check_model(BetweenRounds, dict(cfg.between_rounds), "between_rounds.")
    _check_value(bool, cfg.trainer.get("requeue", False), "trainer.requeue")
    for part in ("world", "split"):
        if cfg[part].seed is not None:
            _check_value(Annotated[int, Field(ge=0)], cfg[part].seed, f"{part}.seed")


def check_settings(cfg: DictConfig) -> None:
    """Check types and ranges of everything that the chosen stages will use."""
    check_no_credentials({key: value for key, value in OmegaConf.to_container(cfg).items() if key != "hydra"})
    check_top_level(cfg)
    if command := command_of(cfg):
        _check_node(cfg, resolved(cfg, command), command)
    _check_node(cfg, resolved(cfg, "callbacks"), "callbacks")
    for name in stages_of(cfg):
        check_stage(cfg, name)
    if cfg.stage == "plan":
        for name in planned_stages(cfg):
            with suppress(MissingSetting):  # what is not given is not planned
                check_stage(cfg, name)


def check_no_credentials(node: Any, address: str = "") -> None:
    """Raise ``UserError`` where an address has a password or key in it: settings are written down, and shown."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check_no_credentials(value, f"{address}.{key}" if address else str(key))
    if isinstance(node, str) and CREDENTIALS.search(node):
        raise UserError(
            f"{address}: an address with a password or key in it, which would be written to the run's files; leave it "
            "out of the address, and give it in the environment (preference.annotator.api_key_env names the variable)"
        )


def check_stage(cfg: DictConfig, name: str) -> None:
    """Check types and ranges of a stage's settings."""
    stage = resolved(cfg, name)
    plain = {key: stage[key] for key in StageLevel.model_fields if key in stage}
    _check_model(StageLevel, plain, f"{name}.")
    if stage.get("keep", {}).get("best") and stage["trainer"]["val_check_interval"] is None:
        raise UserError(
            f"{name}.keep.best=true needs validations during training; set {name}.trainer.val_check_interval "
            "(iterations), 10 say"
        )
    for key, node in stage.items():
        if not _left_out(name, key, stage):
            _check_node(cfg, node, f"{name}.{key}")


def _left_out(name: str, key: str, stage: dict[str, Any]) -> bool:
    """Whether a setting is a model with the path null, which the stage's module can do without."""
    if key not in all_stages()[name].model_settings or (stage[key] or {}).get("path", "") is not None:
        return False
    return type(None) in _kinds(_hints(get_object(stage["module"]["_target_"])).get(key))


def resolved(cfg: DictConfig, name: str) -> dict[str, Any]:
    """The settings of a stage as plain values; raises ``UserError`` where one that must be given is not."""
    # Another group (model, tokenizer) may leave open what the stage takes from there.
    missing = [key for key in _missing(cfg) if not key.startswith("hydra.")]
    try:
        return OmegaConf.to_container(cfg[name], resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        if "issing mandatory value" not in str(error) and not isinstance(error, MissingMandatoryValue):
            raise UserError(f"{name}: {' '.join(str(error).split())}") from None
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


def _check_node(cfg: DictConfig, node: Any, address: str) -> None:
    """Check every object of a resolved tree against its constructor's parameters."""
    if isinstance(node, dict):
        if "_target_" in node:
            _check_call(cfg, node, address)
        for key, value in node.items():
            _check_node(cfg, value, f"{address}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(cfg, value, f"{address}[{index}]")
    else:
        check_no_credentials(node, address)  # also where it comes from the environment


def _check_call(cfg: DictConfig, node: dict[str, Any], address: str) -> None:
    address = origin(cfg, address)
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # import errors of any kind
        raise UserError(f"{address}._target_: {' '.join(str(error).split())}") from None
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if key not in parameters and not open_ended:
            takes = ", ".join(parameters)
            raise UserError(f"{address}.{key}: {node['_target_']} has no such setting; it takes {takes}")
        if key in hints and not _holds_objects(value):
            where = origin(cfg, f"{address}.{key}")
            if where == "model.config" and value is None:
                stage = address.partition(".")[0]
                init = "checkpoint" if all_stages()[stage].replaced_by_checkpoint else "upstream"
                raise UserError(
                    f"{stage}/init=scratch makes a model from model.config, and model=hf has none; set "
                    f"{stage}/init={init} to go on from the checkpoint"
                )
            _check_value(hints[key], value, where)


def _hints(function: Any) -> dict[str, Any]:
    """The types of what a function takes, or a class; a dataclass inherits some that only their own module can tell."""
    kind = next((k for k in getattr(function, "__mro__", ()) if "__init__" in vars(k)), None)
    asked = function if kind is None else kind if "__dataclass_fields__" in vars(kind) else kind.__init__
    return typing.get_type_hints(asked, include_extras=True)


def origin(cfg: DictConfig, address: str) -> str:
    """Where the value at an address is set: ``ppo.advantage.lam`` for ``ppo.module.advantage.lam``."""
    parts, at, node = address.split("."), "", cfg
    for i, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            break
        at = f"{at}.{part}" if at else part
        if OmegaConf.is_interpolation(node, part):
            there = re.fullmatch(r"\$\{([\w.]+)\}", str(node._get_node(part)._value()))
            return origin(cfg, ".".join([there[1], *parts[i + 1 :]])) if there else address
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return address


def _holds_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_holds_objects(v) for v in value.values())
    return isinstance(value, list) and any(_holds_objects(v) for v in value)


def _check_value(kind: Any, value: Any, address: str) -> None:
    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, SchemaError, TypeError):
        return  # nothing that can be checked before the object is made
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise UserError(f"{address}={_shown(value, address)}: {_reasons(error)}") from None
    # Python takes True for 1 and pydantic "3" for 3; a person who writes that has made a mistake.
    if isinstance(value, bool) and bool not in _kinds(kind) and typing.get_origin(kind) is not Literal:
        raise UserError(f"{address}={_shown(value)}: a number was expected, not true or false")


def _kinds(kind: Any) -> set[Any]:
    return {kind}.union(*(_kinds(k) for k in typing.get_args(kind))) if typing.get_args(kind) else {kind}


def _check_model(model: type[BaseModel], values: dict[str, Any], prefix: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"][:1])
        raise UserError(f"{prefix}{key}={_shown(values.get(key))}: {_reasons(error)}") from None


def _reasons(error: ValidationError) -> str:
    """What was expected, in pydantic's words; the alternatives of a union once each."""
    said = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
    return ", or ".join(dict.fromkeys(each.replace("Input should be", "it should be") for each in said))


def _shown(value: Any, address: str = "") -> str:
    if re.search(r"(?:_|\.)(?:key|token|secret|password)(?:_|$)", address):  # it may be the secret itself
        return "..."
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
