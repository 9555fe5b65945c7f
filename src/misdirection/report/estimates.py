"""Read and word the numbers of a `results` dict; everything here tolerates a partial run."""

import math
from itertools import combinations
from typing import Any, TypeGuard

Estimate = dict[str, Any]
"""A mean with its 95% bootstrap interval over questions: keys mean, low, high and n."""

Row = dict[str, Any]
"""One steering or ablation measurement, as listed under `steering` and `transfer`."""

DAMAGE_LIMIT = 0.3
"""Rise of loss on neutral text (nats/token) from which an intervention counts as breaking the model."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number (null and NaN stand for undefined)."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_measured(estimate: Any) -> TypeGuard[Estimate]:
    """Whether `estimate` is a dict with a defined mean and interval."""
    return isinstance(estimate, dict) and all(is_number(estimate.get(key)) for key in ("mean", "low", "high"))


def is_measured_row(row: Row) -> bool:
    """Whether an intervention has a margin change, its random control and its damage."""
    estimates = (row.get("margin_change"), row.get("random_change"))
    return all(is_measured(estimate) for estimate in estimates) and is_number(row.get("damage"))


def show_number(value: Any) -> str:
    """Word a signed quantity in nats/token, or a dash where it is undefined."""
    return f"{value:+.3f}" if is_number(value) else "–"


def show_estimate(estimate: Any) -> str:
    """Word an estimate as `mean [low, high], n=questions`, or a dash where it is undefined."""
    if not is_measured(estimate):
        return "–"
    low, high = show_number(estimate["low"]), show_number(estimate["high"])
    return f"{show_number(estimate['mean'])} [{low}, {high}], n={estimate.get('n', '?')}"


def show_rate(value: Any) -> str:
    """Word a share of answers, in percent, with its interval, or a dash where there is none."""
    if value is None:
        return "–"
    return f"{100 * value['rate']:.1f}% [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def show_points(change: Any) -> str:
    """Word the change of a share of answers, in percentage points, or a dash where it is undefined."""
    if not is_measured(change):
        return "–"
    # Without the z, a change just below zero reads -0.0.
    return f"{100 * change['mean']:+z.1f} [{100 * change['low']:+z.1f}, {100 * change['high']:+z.1f}]"


def show_damage(row: Row) -> str:
    """Word the damage of an intervention or organism, with its interval where there is one."""
    interval = row.get("damage_interval")
    return show_estimate(interval) if is_measured(interval) else show_number(row.get("damage"))


def organisms_trained_on(results: dict[str, Any], answers: str) -> dict[str, dict[str, Any]]:
    """Organisms by name whose training answers were "bad" or "good" (the control)."""
    organisms = results.get("organisms") or {}
    return {name: organism for name, organism in organisms.items() if organism.get("answers") == answers}


def bad_pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Every unordered pair of organisms trained on bad answers."""
    return list(combinations(organisms_trained_on(results, "bad"), 2))


def question_sets(results: dict[str, Any]) -> list[str]:
    """Names of the question sets any organism was measured on, `general` first, without `in_domain`."""
    organisms = (results.get("organisms") or {}).values()
    names = {name: None for organism in organisms for name in organism.get("margin_shift") or {}}
    return sorted((name for name in names if name != "in_domain"), key=lambda name: name != "general")


def layer_values(curves: Any, *keys: str) -> list[float]:
    """The per-layer curve under nested `keys`, with NaN for undefined layers; empty when absent."""
    for key in keys:
        curves = (curves or {}).get(key)
    return [float(value) if is_number(value) else math.nan for value in curves or []]
