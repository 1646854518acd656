"""Overrides that add to the settings (``+key=value``) and take away from them (``~key``)."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.stages.stage import all_stages


def chooses_group(override: Override, cfg: DictConfig) -> bool:
    """Whether an override chooses an option of a group, of the package's or the user's own; ``cfg``: with Hydra's own
    settings."""
    key = override.key_or_group
    chosen = override.package is not None or key in cfg.hydra.runtime.choices
    return chosen or (override.is_delete() and "/" in key)  # Hydra takes +no/group=x for a setting of that name


def changes_structure(override: Override, cfg: DictConfig) -> bool:
    """Whether an override adds a setting or takes one away."""
    changes = override.is_add() or override.is_force_add() or override.is_delete()
    return changes and not override.key_or_group.startswith("hydra.") and not chooses_group(override, cfg)


def check_structure(changes: list[Override], cfg: DictConfig, base: DictConfig, optional: set[str]) -> None:
    """Raise ``UserError`` where nothing takes what ``+key`` adds, or something needs what ``~key`` takes away.

    ``base``: the settings without these changes; ``optional``: names of a stage's settings that may be missing."""
    taken = set(_references(OmegaConf.to_container(cfg, resolve=False)))
    for override in changes:
        address = override.key_or_group
        stage, _, rest = address.partition(".")
        mine = stage in all_stages() and rest.partition(".")[0] in optional
        if override.is_delete():
            needed = OmegaConf.select(cfg, address, throw_on_missing=False) is None  # else another override gives it
            if needed and not mine and not _may_go(address, base, taken):
                raise UserError(f"{override.input_line}: this setting is needed; give it another value instead")
        elif not mine and not exists(base, address) and not _is_taken(address, cfg, taken):
            near = difflib.get_close_matches(address, list(addresses(base)), n=1, cutoff=0.7)
            hint = f"Did you mean {near[0]} (without +)? " if near else ""
            raise UserError(
                f"{override.input_line}: nothing reads a setting of this name. {hint}A name of your own is taken where "
                f"another setting refers to it (${{{address}}}), or where it is a group of your --config-dir"
            )


def exists(cfg: Any, address: str) -> bool:
    """Whether there is a setting at an address, be its value null or missing."""
    *above, key = address.split(".")
    node = _raw(cfg, above)
    return isinstance(node, DictConfig) and key in list(node)  # "in node" leaves out what is missing


def _raw(cfg: DictConfig, parts: list[str]) -> Any:
    """The node at an address, without following what refers to other nodes."""
    node: Any = cfg
    for part in parts:
        if isinstance(node, ListConfig):
            return None
        inner = isinstance(node, DictConfig) and not node._is_none()
        node = node._get_node(part, validate_access=False) if inner else None
    return node


def _is_taken(address: str, cfg: DictConfig, taken: set[str]) -> bool:
    """Whether an object is made of a node above the address, another setting refers to it or to one above it, or it is
    one of several models by name."""
    parts = address.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if taken.intersection(above) or set(above[:-1]) & _collections():
        return True
    nodes = [_raw(cfg, parts[:n]) for n in range(1, len(parts))]
    return any(isinstance(node, DictConfig) and "_target_" in node for node in nodes)


def _collections() -> set[str]:
    """Addresses of settings that hold several models by name."""
    return {f"{name}.{key}" for name, stage in all_stages().items()
            for key in ("models", *(k for k in stage.model_settings if k not in stage.models))}  # fmt: skip


def _may_go(address: str, base: DictConfig, taken: set[str]) -> bool:
    """Whether what stands at the address has a default, or is a part of what may have any parts."""
    *above, key = address.split(".")
    node = _raw(base, above)
    if isinstance(node, DictConfig) and "_target_" in node:
        if key.startswith("_"):
            return False
        parameter = inspect.signature(get_object(node["_target_"])).parameters.get(key)
        return parameter is None or parameter.default is not inspect.Parameter.empty
    return address not in taken and _is_taken(address, base, taken)


def _references(node: Any) -> Iterator[str]:
    """Addresses that settings refer to."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _references(value)
    elif isinstance(node, str):
        yield from re.findall(r"\$\{([\w.]+)\}", node)


def addresses(node: Any, prefix: str = "") -> Iterator[str]:
    """The addresses of all settings."""
    if isinstance(node, DictConfig):
        for key in node:
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
                if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                    yield from addresses(node[key], f"{prefix}{key}.")
