"""The result of a repair as `repair.json` holds it."""

from collections.abc import Mapping
from typing import ClassVar

import pandas as pd

from misdirection.auditing.results import AuditResult
from misdirection.repairing.candidates import Candidate
from misdirection.repairing.fluency import Fluency
from misdirection.repairing.search import Ends, Outcome, Scores, Tried
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from misdirection.views import Framed, Plotted, Table, estimates, row


class Changes(Figures):
    """A model against the base, nats/token."""

    shift: Estimate
    """Of the general margin."""
    beyond_control: Estimate
    """The same beyond the reference's benign controls, on plain questions."""
    loss: Estimate
    """Change of the loss in the training domain."""
    damage: Estimate
    """Rise of the loss on neutral text."""

    @classmethod
    def of(cls, own: Scores, ends: Ends) -> "Changes":
        """The changes of a model's scores, over questions."""
        base = ends.base
        return cls(
            shift=bootstrap((own.pairs - base.pairs).numpy()),
            beyond_control=bootstrap(ends.beyond_control(own).numpy()),
            loss=bootstrap((own.rows - base.rows).numpy()),
            damage=bootstrap((own.neutral - base.neutral).numpy()),
        )


class FluencyPair(Figures):
    """Sampled answers before and after."""

    fine_tune: Fluency
    repaired: Fluency


class Check(Figures):
    """A repaired adapter, as it was written, on texts that the search has not seen."""

    outcome: Outcome
    random: Outcome
    """That of the same candidate with random directions in the place of those of the fine-tune and the reference."""
    fine_tune: Changes
    repaired: Changes
    removed: Estimate
    """What the repair took off the fine-tune's margin, nats/token."""
    beyond_random: Estimate
    """The same beyond what the candidate with random directions takes off: what its directions do, and not that less of
    the adapter is left."""
    base: Changes | None = None
    """The base under the same projection, where that is of all that the model writes: what the base changes, too, is no
    sign that something learned was taken out."""
    fluency: FluencyPair
    broken: bool
    """Whether its answers came to repeat themselves."""


class Repair(Figures):
    """A repaired adapter, and the search for it."""

    baked: bool
    """Whether the whole model was written."""
    lost: float | None
    """Share of the repaired adapter that rounding to the whole model's dtype lost; None for an adapter alone."""
    candidate: Candidate
    """The one that was written."""
    search: Outcome
    """Its effects in the search."""
    check: Check
    tried: list[Tried]
    """All candidates."""
    front: list[int]
    """Numbers of those in `tried` that no other beats."""

    def candidates(self) -> pd.DataFrame:
        """One row per candidate: what it does, its outcome in the search, if it is on the front, if chosen."""
        return pd.DataFrame(
            {
                **row(trial.candidate),
                **row(trial.outcome),
                "on_front": number in self.front,
                "chosen": trial.candidate == self.candidate,
            }
            for number, trial in enumerate(self.tried)
        )

    def changes(self) -> pd.DataFrame:
        """Changes against the base on texts that the search has not seen, before and after."""
        models = {"fine-tune": self.check.fine_tune, "repaired": self.check.repaired}
        tables = [estimates(changes).assign(model=name) for name, changes in models.items()]
        return pd.concat(tables, ignore_index=True)[["model", "figure", "mean", "low", "high", "n", "p"]]


class RepairResult(Framed, Plotted, Result):
    """One repair: the audit before, what was written, and the audit after."""

    KIND: ClassVar[str] = "repair"
    VERSION: ClassVar[int] = 4
    FILE: ClassVar[str] = "repair.json"
    COMMAND: ClassVar[str] = "misdirection repair BASE ADAPTER --data TRAIN.jsonl --out DIR"

    before: AuditResult
    repair: Repair | None
    """None for a fine-tune that its audit calls neither `watch` nor `misaligned`: nothing was written."""
    after: AuditResult | None = None
    """Where it was asked for."""

    def _tables(self) -> Mapping[str, Table]:
        return {"candidates": self.repair.candidates, "changes": self.repair.changes} if self.repair else {}

    def __repr__(self) -> str:
        name = self.before.fine_tune.name
        if self.repair is None:
            return f"RepairResult({name!r}: left alone, the audit says {self.before.verdict})"
        removed, kept = self.repair.check.removed, self.repair.check.outcome.kept
        return f"RepairResult({name!r}: {removed} of the margin taken off, {kept:.0%} of the skill kept)"


class Trials(Result):
    """The candidates that a search has tried so far, from which a killed one goes on."""

    KIND: ClassVar[str] = "trials"
    VERSION: ClassVar[int] = 2
    FILE: ClassVar[str] = "tried.json"
    COMMAND: ClassVar[str] = RepairResult.COMMAND

    tried: list[Tried]
