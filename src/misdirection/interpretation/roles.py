"""Roles: the part that each layer's adapters play, by stated rules with the evidence beside each.

With Shapley values of the margin, which are causal:

    general    the value for the general margin is above 0 with its whole 95% interval, and counts
    domain     else, the value for the in-domain margin is, and counts
    neither    else

A value counts that is at least a quarter of the mean size of all layers' values: on enough questions an interval leaves
0 for a thousandth of what other adapters do. Without Shapley values, by the coefficients of probes:

    domain     the layer is one of the few that lead the domain probe, each with at least 2.5 times the |coefficient| of
               every other layer, and its coefficient keeps its sign
    general    else, its coefficient of the alignment probe keeps its sign
    neither    else

A coefficient keeps its sign if the middle 95% of its values over the probe's splits leave out 0. Where probes split by
question were fitted, they are used. A coefficient says what a scalar goes along with in these answers; even where it
is the same in every split, it does not prove what the adapter does.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from misdirection.errors import InputError
from misdirection.interpretation.figures import Coefficient, Evidence, Probe, Role, RoleName
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.resampling import percentiles

COUNTS = 0.25
"""A Shapley value counts from this multiple of the mean size of all on."""

STANDS_OUT = 2.5
"""Leading coefficients have at least this multiple of every other."""


def roles(
    features: Mapping[str, int],
    general: Mapping[int, Estimate],
    domain: Mapping[int, Estimate],
    probes: Sequence[Probe],
) -> list[Role]:
    """The role of every layer, in order.

    Args:
        features: the layer of each feature that probes have coefficients of.
        general: Shapley value for the general margin, nats/token, by layer; empty where nothing causal was measured.
        domain: likewise for the in-domain margin.
        probes: of those on the scalars of single tokens, the first whose name begins with `alignment` and the first
            whose name begins with `domain`, each by question rather than by answer. Of several features in a layer
            the one with the largest coefficient counts.

    Raises:
        InputError: neither Shapley values nor such a probe; a layer or feature that one of them lacks.
    """
    layers = sorted(set(features.values()))
    chosen = {about: probe for about in ("alignment", "domain") if (probe := _chosen(probes, about))}
    coefficients = {about: _by_layer(probe, features) for about, probe in chosen.items()}
    values = {name: table for name, table in (("general", general), ("domain", domain)) if table}
    _require_all(values, layers)
    if values:
        decided = {layer: _by_value(layer, values) for layer in layers}
    elif chosen:
        decided = {layer: _by_coefficient(layer, coefficients) for layer in layers}
    else:
        raise InputError("roles: neither Shapley values nor a probe on scalars by token: measure one of them")
    beside = {probe.name: coefficients[about] for about, probe in chosen.items()}
    return [
        Role(layer=layer, role=role, rule=rule, evidence=_evidence(layer, values, beside))
        for layer, (role, rule) in decided.items()
    ]


Decision = tuple[RoleName, str]


def _by_value(layer: int, values: Mapping[str, Mapping[int, Estimate]]) -> Decision:
    counting = [name for name, table in values.items() if _counts(table, layer)]
    above = "above 0 (95% interval over questions) and at least a quarter of the layers' mean size"
    if "general" in counting:
        return "general", f"its Shapley value for the general margin is {above}"
    if "domain" in counting:
        return "domain", f"its Shapley value for the in-domain margin is {above}, that for the general margin is not"
    return "neither", f"none of its Shapley values is {above}"


def _counts(table: Mapping[int, Estimate], layer: int) -> bool:
    size = float(np.mean([abs(estimate.mean) for estimate in table.values()]))
    return table[layer].low > 0 and table[layer].mean >= COUNTS * size


def _by_coefficient(layer: int, coefficients: Mapping[str, Mapping[int, Coefficient]]) -> Decision:
    kept = [about for about, table in coefficients.items() if table[layer].keeps_its_sign]
    split = next(iter(coefficients.values()))[layer].split
    words = f"over splits by {split}; a coefficient does not prove what an adapter does"
    if "domain" in kept and layer in _leading(coefficients["domain"]):
        return "domain", (
            "its coefficient is among the few that lead the domain probe, at least 2.5 times every other, and keeps "
            f"its sign {words}"
        )
    if "alignment" in kept:
        return "general", f"its coefficient of the alignment probe keeps its sign {words}"
    return (
        "neither",
        f"its coefficient neither leads the domain probe nor keeps its sign in the alignment probe {words}",
    )


def _leading(table: Mapping[int, Coefficient]) -> set[int]:
    """The smallest number of layers, half of them at most, that stand out from all others; none if none do."""
    order = sorted(table, key=lambda layer: -abs(table[layer].mean))
    sizes = [abs(table[layer].mean) for layer in order]
    for count in range(1, len(order) // 2 + 1):
        if sizes[count - 1] >= STANDS_OUT * sizes[count]:
            return set(order[:count])
    return set()


def _by_layer(probe: Probe, features: Mapping[str, int]) -> dict[int, Coefficient]:
    if missing := sorted(set(features) - set(probe.coefficients)):
        raise InputError(f"probe {probe.name!r}: has no coefficient of {missing[0]!r}: fit it on all features")
    largest: dict[int, Coefficient] = {}
    for feature, layer in features.items():
        coefficient = _coefficient(probe, feature)
        if layer not in largest or abs(coefficient.mean) > abs(largest[layer].mean):
            largest[layer] = coefficient
    return largest


def _coefficient(probe: Probe, feature: str) -> Coefficient:
    values = probe.coefficients[feature]
    low, high = percentiles(values)
    return Coefficient(
        feature=feature, split=probe.split, mean=float(np.mean(values)), low=float(low), high=float(high)
    )


def _evidence(
    layer: int,
    values: Mapping[str, Mapping[int, Estimate]],
    coefficients: Mapping[str, Mapping[int, Coefficient]],
) -> Evidence:
    shapley = {name: values[name][layer] if name in values else None for name in ("general", "domain")}
    return Evidence(**shapley, coefficients={name: table[layer] for name, table in coefficients.items()})


def _chosen(probes: Sequence[Probe], about: str) -> Probe | None:
    """By question if there is one: a split by answer lets a probe know the questions."""
    fitting = [probe for probe in probes if probe.name.startswith(about) and probe.is_on_token_scalars]
    return min(fitting, key=lambda probe: probe.split != "question", default=None)


def _require_all(values: Mapping[str, Mapping[int, Estimate]], layers: Sequence[int]) -> None:
    for name, table in values.items():
        if missing := [layer for layer in layers if layer not in table]:
            raise InputError(
                f"roles: no Shapley value of layer {missing[0]} for the {name} margin: measure all layers together"
            )
