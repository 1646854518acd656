"""Settings held against what they reach: types and ranges are those of a constructor's parameters."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, ValidationError

from lit_rlhf.arguments import adapter_of, fault_of, hints_of, reasons
from lit_rlhf.errors import CREDENTIALS, UserError, first_line
from lit_rlhf.stages.stage import all_stages


def check_node(cfg: DictConfig, node: Any, address: str) -> None:
    """Check every object of a resolved tree against its constructor's parameters."""
    if isinstance(node, dict):
        if "_target_" in node:
            _check_call(cfg, node, address)
        for key, value in node.items():
            check_node(cfg, value, f"{address}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_node(cfg, value, f"{address}[{index}]")
    else:
        check_no_credentials(node, address)  # also where it comes from the environment


def left_out(name: str, key: str, stage: dict[str, Any]) -> bool:
    """Whether a setting is a model with the path null, which the stage's module can do without."""
    if key not in all_stages()[name].model_settings or (stage[key] or {}).get("path", "") is not None:
        return False
    return type(None) in _kinds(hints_of(get_object(stage["module"]["_target_"])).get(key))


def check_no_credentials(node: Any, address: str = "") -> None:
    """Raise ``UserError`` where an address has a password or key in it: settings are written down, and shown."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check_no_credentials(value, f"{address}.{key}" if address else str(key))
    if isinstance(node, str) and CREDENTIALS.search(node):
        raise UserError(
            f"{address}: an address with a password or key in it, which would be written to the run's files; leave it "
            "out of the address, and give it in the environment (api_key_env names the variable)"
        )


def _check_call(cfg: DictConfig, node: dict[str, Any], address: str) -> None:
    below, address = address, origin(cfg, address)
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # import errors of any kind
        raise UserError(f"{address}._target_: {' '.join(str(error).split())}") from None
    try:
        parameters, hints = inspect.signature(target).parameters, hints_of(target)
    except (TypeError, ValueError):
        raise UserError(f"{address}._target_={node['_target_']}: this is nothing that can be called") from None
    further = getattr(target, "further_settings", ())
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()) and not further
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_"):
            continue
        if key not in parameters and key not in further and not open_ended:
            takes = ", ".join([*parameters, *further])
            raise UserError(f"{address}.{key}: {node['_target_']} has no such setting; it takes {takes}")
        if key in hints and not _holds_objects(value):
            place = f"{below}.{key}"
            if value is None and origin(cfg, place) == "model.config":
                stage = address.partition(".")[0]
                init = "checkpoint" if all_stages()[stage].replaced_by_checkpoint else "upstream"
                raise UserError(
                    f"{stage}/init=scratch makes a model from model.config, and model=hf has none; set "
                    f"{stage}/init={init} to go on from the checkpoint"
                )
            try:
                check_value(hints[key], value, place)
            except UserError:  # said once more, with the address at which it is set, which takes its time to find
                check_value(hints[key], value, origin(cfg, place))
    if is_dataclass(target) and target.__dataclass_params__.frozen and not node.get("_partial_"):
        _check_together(target, node, address)


def _check_together(target: Any, node: dict[str, Any], address: str) -> None:
    """Check what settings are to each other: plain values say so themselves when they are made."""
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    if not any(map(_holds_objects, values.values())):
        try:
            target(**values)
        except UserError as error:
            named = str(error).startswith(address.partition(".")[0])
            raise UserError(str(error) if named else f"{address}: {error}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{address}: {first_line(error)}") from None


def origin(cfg: DictConfig, address: str) -> str:
    """Where the value at an address is set: ``ppo.advantage.lam`` for ``ppo.module.advantage.lam``."""
    parts, at, node = address.split("."), "", cfg
    for i, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            break
        at = f"{at}.{part}" if at else part
        if OmegaConf.is_interpolation(node, part):
            there = re.fullmatch(r"\$\{(?:merge:)?([\w.,]+)\}", str(node._get_node(part)._value()))
            if not there:
                return address
            sources, rest = there[1].split(","), parts[i + 1 :]
            holders = [source for source in sources if rest and rest[0] in (OmegaConf.select(cfg, source) or ())]
            return origin(cfg, ".".join([(holders or sources)[-1], *rest]))
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return address


def _holds_objects(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_holds_objects(v) for v in value.values())
    return isinstance(value, list) and any(_holds_objects(v) for v in value)


def check_value(kind: Any, value: Any, address: str) -> None:
    """Raise ``UserError`` where a value is not of the type, or out of its range."""
    if is_dataclass(kind):  # an object is wanted, not what pydantic could make it of
        if not isinstance(value, kind):
            raise UserError(f"{address}={_shown(value)}: it should be an instance of {kind.__name__}")
        return
    if wrong := fault_of(adapter_of(kind), value):
        raise UserError(f"{address}={_shown(value, address)}: {wrong}")
    # Python takes True for 1 and pydantic "3" for 3; a person who writes that has made a mistake.
    if isinstance(value, bool) and bool not in _kinds(kind) and typing.get_origin(kind) is not Literal:
        raise UserError(f"{address}={_shown(value)}: a number was expected, not true or false")


def _kinds(kind: Any) -> set[Any]:
    return {kind}.union(*(_kinds(k) for k in typing.get_args(kind))) if typing.get_args(kind) else {kind}


def check_model(model: type[BaseModel], values: dict[str, Any], prefix: str) -> None:
    """Raise ``UserError`` where values are not as a model has them; ``prefix``: of their addresses."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        first, path, value = error.errors()[0], [], values
        for part in first["loc"]:
            if not isinstance(value, dict) or part not in value:
                break
            path.append(part)
            value = value[part]
        if first["type"] == "missing":
            raise UserError(f"{prefix}{'.'.join(first['loc'])}: this setting is needed, and it is not there") from None
        address = f"{prefix}{'.'.join(path)}"
        raise UserError(f"{address}={_shown(value, address)}: {reasons(error, tuple(path))}") from None


def _shown(value: Any, address: str = "") -> str:
    if re.search(r"(?:_|\.)(?:key|token|secret|password)(?:_|$)", address):  # it may be the secret itself
        return "..."
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def run_name(name: str) -> str:
    """The name of a run's folder; raises ``ValueError`` where it is none."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name):
        raise ValueError("letters, digits, '.', '-' and '_' were expected, in parts with '/' between them")
    return name


RunName = Annotated[str, AfterValidator(run_name)]
