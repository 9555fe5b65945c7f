"""Words for numbers, the same on every page."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

DAMAGE_LIMIT = 0.3
"""Rise of loss on neutral text (nats/token) from which an intervention counts as breaking the model."""

Estimate = dict[str, Any]
"""An estimate as JSON has it, for pages that read such."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number (null and NaN stand for undefined)."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_measured(estimate: Any) -> TypeGuard[Estimate]:
    """Whether `estimate` is a dict with a defined mean and interval."""
    return isinstance(estimate, dict) and all(is_number(estimate.get(key)) for key in ("mean", "low", "high"))


def field(value: Any, name: str) -> Any:
    """An attribute, or a key where the value is as JSON has it."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name)


def _interval(value: Any, *names: str) -> list[float] | None:
    """The fields of these names; None where one of them is undefined."""
    numbers = [] if value is None else [field(value, name) for name in names]
    return numbers if numbers and all(map(is_number, numbers)) else None


def show_number(value: Any) -> str:
    """Word a signed quantity in nats/token, or a dash where it is undefined."""
    return f"{value:+.3f}" if is_number(value) else "–"


def show_estimate(estimate: Any) -> str:
    """Word an estimate as `mean [low, high], n=questions`, or a dash where it is undefined."""
    if (numbers := _interval(estimate, "mean", "low", "high")) is None:
        return "–"
    mean, low, high = map(show_number, numbers)
    return f"{mean} [{low}, {high}], n={field(estimate, 'n')}"


def show_rate(value: Any) -> str:
    """Word a share of answers, in percent, with its interval, or a dash where there is none."""
    if (numbers := _interval(value, "rate", "low", "high")) is None:
        return "–"
    rate, low, high = (100 * number for number in numbers)
    return f"{rate:.1f}% [{low:.1f}, {high:.1f}]"


def show_points(change: Any) -> str:
    """Word the change of a share of answers, in percentage points, or a dash where it is undefined."""
    if (numbers := _interval(change, "mean", "low", "high")) is None:
        return "–"
    mean, low, high = (100 * number for number in numbers)
    # Without the z, a change just below zero reads -0.0.
    return f"{mean:+z.1f} [{low:+z.1f}, {high:+z.1f}]"


def show_plain(value: Any) -> str:
    """Word a count, loss or setting without a sign."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if is_number(value) else "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
