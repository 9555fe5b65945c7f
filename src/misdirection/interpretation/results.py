"""Typed results of reading an organism's adapters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from misdirection.interpretation.figures import (
    Causal,
    Dynamics,
    Geometry,
    ImportanceFigures,
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
        measured = {
            "roles": (self.roles, self._roles),
            "shapley": (self.causal, self._shapley),
            "scaling": (self.causal, self._scaling),
            "judged": (self.causal and self.causal.judged, self._judged),
            "importance": (self.importance, self._importance),
            "dynamics": (self.dynamics, self._dynamics),
            "judged_steps": (self.dynamics and self.dynamics.judged, self._judged_steps),
            "probes": (self.probes, self._probes),
            "scaled": (self.scaled, lambda: rows(self.scaled)),
            "shares": (self.shares, self._shares),
            "modules": (self.modules, lambda: rows(self.modules)),
        }
        return {name: table for name, (figures, table) in measured.items() if figures}

    def _roles(self) -> pd.DataFrame:
        """The role of every layer's adapters, with the Shapley values that it rests on."""
        evidence = ((role, role.evidence) for role in self.roles)
        return pd.DataFrame(
            {"layer": role.layer, "role": role.role, **beside("general", of.general), **beside("domain", of.domain)}
            for role, of in evidence
        )

    def _shapley(self) -> pd.DataFrame:
        values = self.causal.shapley.values if self.causal else {}
        return pd.DataFrame(
            {"questions": name, "layer": layer, **alone(value)}
            for name, by_layer in values.items()
            for layer, value in by_layer.items()
        )

    def _scaling(self) -> pd.DataFrame:
        """The change of every margin under every setting, and its damage."""
        return pd.DataFrame(
            {"setting": setting.name, "questions": name, **beside("margin", margin), **beside("damage", setting.damage)}
            for setting in (self.causal.settings if self.causal else ())
            for name, margin in setting.margin.items()
        )

    def _judged(self) -> pd.DataFrame:
        """The rates of judged answers under every setting, and their change."""
        return rows(self.causal.judged if self.causal else ())

    def _shares(self) -> pd.DataFrame:
        """What share of the coherent answers is misaligned, and of each further rubric's theme, under every setting."""
        return pd.DataFrame(_share_row(shares) for shares in self.shares)

    def _judged_steps(self) -> pd.DataFrame:
        """The rates of judged answers at every checkpoint that was judged."""
        steps = self.dynamics.judged if self.dynamics else ()
        return pd.DataFrame({"step": step.step, **step.score.row()} for step in steps)

    def _importance(self) -> pd.DataFrame:
        by_layer = self.importance.by_layer if self.importance else {}
        return pd.DataFrame({"layer": layer, **row(importance)} for layer, importance in by_layer.items())

    def _dynamics(self) -> pd.DataFrame:
        """The margin's shift against the base at the steps where it was measured."""
        margin = self.dynamics.margin if self.dynamics else {}
        steps = self.dynamics.margin_steps if self.dynamics else ()
        return pd.DataFrame(
            {"step": step, "questions": name, **alone(shift)}
            for name, shifts in margin.items()
            for step, shift in zip(steps, shifts, strict=True)
        )

    def _probes(self) -> pd.DataFrame:
        """Every probe's scores, with the spread over its splits; `n` is their number."""
        return pd.DataFrame(_probe_row(probe) for probe in self.probes)


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
