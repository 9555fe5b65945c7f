"""Words for numbers, the same on every page."""

import math
from typing import Any, Protocol

from misdirection.likelihood.measure import DAMAGE_LIMIT as DAMAGE_LIMIT
from misdirection.statistics.estimates import Estimate, Rate


class Interval(Protocol):
    """An estimate, or a probe's spread over its splits."""

    @property
    def mean(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def n(self) -> int: ...


def show_number(value: float | None, digits: int = 3) -> str:
    """Word a signed quantity, or a dash where it is undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+z.{digits}f}"


def show_estimate(estimate: Interval | None) -> str:
    """Word an estimate as `mean [low, high], n=questions`, or a dash where there is none."""
    if estimate is None:
        return "–"
    mean, low, high = map(show_number, (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}], n={estimate.n}"


def in_percent(rate: Rate) -> Estimate:
    """A share of answers as an estimate in percent."""
    return Estimate(100 * rate.rate, 100 * rate.low, 100 * rate.high, rate.total)


def show_rate(rate: Rate | None) -> str:
    """Word a share of answers, in percent, with its interval, or a dash where there is none."""
    return "–" if rate is None else f"{100 * rate.rate:.1f}% [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def show_points(change: Interval | None) -> str:
    """Word the change of a share of answers, in percentage points, or a dash where there is none."""
    if change is None:
        return "–"
    # Without the z, a change just below zero reads -0.0.
    return f"{100 * change.mean:+z.1f} [{100 * change.low:+z.1f}, {100 * change.high:+z.1f}]"


def show_plain(value: Any) -> str:
    """Word a count, loss or setting without a sign."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value.is_integer():
            return f"{value:g}"
        return f"{value:z.3f}" if math.isfinite(value) else "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
