"""Figures beside figures, one by one, each under its key."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from misdirection.bundles.assembling import Assembled
from misdirection.bundles.results import Difference, FigureCheck, NotRecomputed
from misdirection.experiment.experiment import EXTENSIONS

TOLERANCE = 1e-6
"""Largest difference, as a share of a figure, that other versions and processors make by rounding alone."""

_TINY = 1e-9
"""Below this a figure is rounding."""

_NAMES = ("kind", "version")
_RECORDED = ("made_with", "made_on", "environment")
WHEN = "says when and on what it was made"


def compare(values: Mapping[str, Any], assembled: Assembled, tolerance: float, name: str = "") -> FigureCheck:
    """A result's figures beside those that were computed again.

    Args:
        values: the result, as its file has it.
        assembled: what was computed again.
        tolerance: largest difference that is taken for rounding, as a share of a figure.
        name: begins every key.
    """
    figures = {key: value for key, value in values.items() if key not in _NAMES}
    own, other = (dict(leaves(each, name)) for each in (figures, assembled.figures))
    lacking, rounded, differences = Counter[tuple[str, str]](), 0, []
    for key, value in own.items():
        if reason := _reason(key.removeprefix(name), assembled):
            lacking[_head(key, name), reason] += 1
        elif key not in other or not _same(value, other[key], tolerance):
            differences.append(Difference(figure=key, bundle=value, recomputed=other.get(key)))
        else:
            rounded += value != other[key]
    differences += [
        Difference(figure=key, bundle=None, recomputed=value)
        for key, value in other.items()
        if key not in own and not _reason(key.removeprefix(name), assembled)
    ]
    reasons = [NotRecomputed(figures=head, count=count, reason=reason) for (head, reason), count in lacking.items()]
    equal = len(own) - sum(lacking.values()) - sum(each.figure in own for each in differences)
    return FigureCheck(equal=equal, rounded=rounded, differences=differences, not_recomputed=reasons)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value with its key, such as `a.b[3]`; an empty list or mapping is one."""
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from leaves(each, f"{key}.{name}" if key and not key.endswith(": ") else f"{key}{name}")
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from leaves(each, f"{key}[{number}]")
    else:
        yield key, value


def _reason(key: str, assembled: Assembled) -> str | None:
    """Why a figure was not computed again; None for one that was."""
    first, *rest = key.split(".")
    first = first.partition("[")[0]
    if first in _NAMES or first in _RECORDED:
        return WHEN
    known = assembled.figures
    if first == EXTENSIONS and rest:
        first, known = rest[0], known.get(EXTENSIONS, {})
    if first in known:
        return None
    return "; ".join(assembled.reasons) or "no stage of this program gives it"


def _head(key: str, name: str) -> str:
    return name + key.removeprefix(name).partition(".")[0].partition("[")[0] or "all"


def _same(value: Any, other: Any, tolerance: float) -> bool:
    if isinstance(value, float) and isinstance(other, int | float) and not isinstance(other, bool) and tolerance:
        return math.isclose(value, other, rel_tol=tolerance, abs_tol=_TINY)
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
