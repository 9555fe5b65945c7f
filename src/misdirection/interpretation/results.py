"""Typed results of reading an organism's adapters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from misdirection.interpretation.figures import (
    Causal,
    Dynamics,
    Geometry,
    ImportanceFigures,
    JudgedStep,
    ModuleFigures,
    Patching,
    Probe,
    Role,
    ScaledShare,
    SettingShares,
    TextCounts,
)
from misdirection.models.identity import ModelIdentity
from misdirection.results import Figures, Result
from misdirection.views import Framed, Plotted, Table, alone, beside, row, rows


class AdapterFigures(Framed, Figures):
    """All that was read of one organism's adapters; None or empty where it was not measured."""

    organism: str
    modules: tuple[ModuleFigures, ...]
    saved: tuple[str, ...]
    """Further weights that were trained as a whole: they have no components."""
    dead: tuple[str, ...]
    """Modules that add nothing, since their B is zero: nothing else speaks of them."""
    texts: TextCounts | None
    probes: tuple[Probe, ...]
    roles: tuple[Role, ...]
    causal: Causal | None
    geometry: Geometry | None
    importance: ImportanceFigures | None
    patching: Patching | None
    dynamics: Dynamics | None
    """None where no checkpoints were kept."""
    scaled: tuple[ScaledShare, ...]
    """From a table that was measured elsewhere."""
    shares: tuple[SettingShares, ...]
    """Of judged answers under settings of the adapters, the organism's own or those of such a table."""

    def _tables(self) -> Mapping[str, Table]:
        causal, dynamics = self.causal, self.dynamics
        measured: dict[str, tuple[Any, Callable[[Any], pd.DataFrame]]] = {
            "roles": (self.roles, _roles),
            "shapley": (causal, _shapley),
            "scaling": (causal, _scaling),
            "judged": (causal and causal.judged, rows),
            "importance": (self.importance, _importance),
            "dynamics": (dynamics, _dynamics),
            "judged_steps": (dynamics and dynamics.judged, _judged_steps),
            "probes": (self.probes, _probes),
            "scaled": (self.scaled, rows),
            "shares": (self.shares, _shares),
            "modules": (self.modules, rows),
        }
        return {name: partial(table, figures) for name, (figures, table) in measured.items() if figures}


def _roles(roles: Sequence[Role]) -> pd.DataFrame:
    """The role of every layer's adapters, with the Shapley values that it rests on."""
    evidence = ((role, role.evidence) for role in roles)
    return pd.DataFrame(
        {"layer": role.layer, "role": role.role, **beside("general", of.general), **beside("domain", of.domain)}
        for role, of in evidence
    )


def _shapley(causal: Causal) -> pd.DataFrame:
    return pd.DataFrame(
        {"questions": name, "layer": layer, **alone(value)}
        for name, by_layer in causal.shapley.values.items()
        for layer, value in by_layer.items()
    )


def _scaling(causal: Causal) -> pd.DataFrame:
    """The change of every margin under every setting, and its damage."""
    return pd.DataFrame(
        {"setting": setting.name, "questions": name, **beside("margin", margin), **beside("damage", setting.damage)}
        for setting in causal.settings
        for name, margin in setting.margin.items()
    )


def _shares(settings: Sequence[SettingShares]) -> pd.DataFrame:
    """What share of the coherent answers is misaligned, and of each further rubric's theme, under every setting."""
    return pd.DataFrame(map(_share_row, settings))


def _judged_steps(steps: Sequence[JudgedStep]) -> pd.DataFrame:
    """The rates of judged answers at every checkpoint that was judged."""
    return pd.DataFrame({"step": step.step, **step.score.row()} for step in steps)


def _importance(importance: ImportanceFigures) -> pd.DataFrame:
    return pd.DataFrame({"layer": layer, **row(own)} for layer, own in importance.by_layer.items())


def _dynamics(dynamics: Dynamics) -> pd.DataFrame:
    """The margin's shift against the base at the steps where it was measured."""
    return pd.DataFrame(
        {"step": step, "questions": name, **alone(shift)}
        for name, shifts in dynamics.margin.items()
        for step, shift in zip(dynamics.margin_steps, shifts, strict=True)
    )


def _probes(probes: Sequence[Probe]) -> pd.DataFrame:
    """Every probe's scores, with the spread over its splits; `n` is their number."""
    return pd.DataFrame(map(_probe_row, probes))


def _share_row(shares: SettingShares) -> dict[str, Any]:
    row = {"setting": shares.setting, "questions": shares.questions, **beside("misaligned", shares.misaligned)}
    for each in shares.rubrics:
        row |= {**beside(each.rubric, each.share), **beside(f"{each.rubric}_misaligned", each.misaligned)}
    return row


def _probe_row(probe: Probe) -> dict[str, Any]:
    names = ("name", "split", "pooling", "features", "answers", "questions", "tokens", "baseline")
    scores = {
        f"{name}{end}": getattr(getattr(probe, name), part)
        for name in ("auroc", "null_auroc", "accuracy")
        for end, part in (("", "mean"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
    }
    return {**{name: getattr(probe, name) for name in names}, **scores}


class InterpretationResults(Framed, Plotted, Result):
    """An adapter that was read alone, or tables of one that were measured elsewhere."""

    KIND = "interpretation"
    VERSION = 3
    FILE = "interpretation.json"
    COMMAND = "misdirection interpret"

    base: ModelIdentity | None
    """None for tables."""
    adapters: AdapterFigures
    seconds: dict[str, float]
    """Time that each part took."""

    def _tables(self) -> Mapping[str, Table]:
        return {name: partial(self.adapters.frame, name) for name in self.adapters.tables}
