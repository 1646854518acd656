"""What Optuna searches: overrides with several values, and what each is drawn from.

Hydra imports this with every command, so Optuna is imported where it is needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, RangeSweep, Transformer
from hydra.errors import HydraException

from lit_rlhf.errors import UserError, first_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def search_space(overrides: list[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """(the overrides that all trials have, address -> what it is drawn from).

    Later ones replace those before them. Raises ``UserError`` where nothing is to be searched."""
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(overrides)}
    space = {}
    for name, override in parsed.items():
        if override.is_sweep_override():
            try:
                space[name] = distribution(override)
            except ValueError as error:
                raise UserError(f"{override.input_line}: no value can be drawn ({first_line(error)})") from None
    if not space:
        raise UserError(
            "hydra/sweeper=optuna: nothing is to be searched; give a setting several values, as in "
            "'ppo.module.kl_coef=interval(0.02,0.2)'"
        )
    return [o.input_line for name, o in parsed.items() if name not in space], space


def outermost_jobs(overrides: list[str]) -> list[list[str]]:
    """Overrides of jobs that have, between them, each value of a list and both ends of an interval."""
    try:
        fixed, space = search_space(overrides)
    except ModuleNotFoundError:
        raise UserError("hydra/sweeper=optuna needs the package optuna: pip install 'lit_rlhf[sweep]'") from None
    values = {name: getattr(drawn, "choices", None) or (drawn.low, drawn.high) for name, drawn in space.items()}
    count = max(map(len, values.values()))
    return [[*fixed, *(f"{name}={own[i % len(own)]}" for name, own in values.items())] for i in range(count)]


def distribution(override: Override) -> BaseDistribution:
    """What the values of one setting are drawn from: an interval, the steps of a range, or a list of values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values: Any = override.value()
    if isinstance(values, IntervalSweep):
        kind = IntDistribution if isinstance(values.start, int) else FloatDistribution
        return kind(values.start, values.end, log="log" in values.tags)
    if isinstance(values, RangeSweep) and not values.shuffle:
        kind = IntDistribution if isinstance(values.start, int) and isinstance(values.step, int) else FloatDistribution
        steps = math.ceil((values.stop - values.start) / values.step - 1e-9) - 1  # the end is not one of them
        return kind(values.start, values.start + steps * values.step, step=values.step)
    return CategoricalDistribution([_written(value) for value in override.sweep_iterator()])


def _written(value: Any) -> Any:
    """A value of a list as an override has it: of a text, Hydra has taken the quotes off that it may need."""
    quoted = isinstance(value, str) and not _is_text(value)
    return Transformer.encode(QuotedString(value, Quote.single) if quoted else value)


def _is_text(value: str) -> bool:
    """Whether a text, not in quotes, is read as that text."""
    try:
        return OverridesParser.create().parse_override(f"x={value}").value() == value  # type: ignore[no-any-return]
    except HydraException:
        return False
