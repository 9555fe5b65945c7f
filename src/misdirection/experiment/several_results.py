"""The figures of one experiment on several base models: a table of models x organisms."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import ClassVar

import pandas as pd

from misdirection.experiment.results import Curve, RunResults
from misdirection.interpretation.texts import GENERAL
from misdirection.judging.scoring import Score
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate, Rate
from misdirection.views import Framed, Plotted, Table, rows


class Judged(Figures):
    """Judged answers of a model as it is: rates over all answers, with intervals over questions."""

    answers: int
    questions: int
    em: Rate
    """Misaligned and coherent."""
    coherent: Rate
    """Scored, and not incoherent; its interval is as wide as that of the incoherent ones."""

    @classmethod
    def of(cls, score: Score) -> "Judged":
        """From the rates of one condition."""
        bad, unscored = score.incoherent, sum(score.unscored.values())
        rest = 1 - unscored / score.answers
        rate, low, high = (max(0.0, rest - value) for value in (bad.rate, bad.high, bad.low))
        coherent = Rate(rate, low, high, max(0, bad.total - bad.hits - unscored), bad.total)
        return cls(answers=score.answers, questions=score.questions, em=score.em, coherent=coherent)


class ModelRow(Figures):
    """A base model, and how it behaves before any training."""

    name: str
    """Of its run."""
    model: str
    revision: str | None
    dtype: str
    device: str
    layers: int
    width: int
    margin: Estimate
    """On the general questions, nats/token."""
    judged: Judged | None
    """None without a judge."""


class OrganismRow(Figures):
    """An organism of one of the models; margins in nats/token on the general questions unless said otherwise."""

    model: str
    """By the name of its run."""
    organism: str
    recipe: str
    domain: str
    answers: str
    """`bad`, or `good` for a control."""
    trainable_parameters: int
    margin_shift: Estimate
    """Against its own base."""
    minus_control: Estimate | None
    """The shift minus its control's; None without one."""
    in_domain: Estimate | None
    """The shift on its own domain's questions; None where these have no pairs."""
    damage: Estimate
    """Rise of the loss on neutral text."""
    judged: Judged | None
    """None without a judge."""


class FailedModel(Figures):
    """A model whose run could not be finished."""

    name: str
    cause: str
    status: int
    """The exit status of a command that ends so."""


class AcrossModels(Figures):
    """One organism's direction in two models of as many layers of one width, by layer."""

    organism: str
    first: str
    second: str
    cosine: Curve
    base_null: Curve
    """Between the two bases' own directions on the same text: bases that are far apart share no coordinates."""


class RunsResults(Framed, Plotted, Result):
    """One experiment on several base models; each model's own results stand in `runs/NAME`."""

    KIND: ClassVar[str] = "runs"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = RunResults.FILE
    COMMAND: ClassVar[str] = RunResults.COMMAND

    name: str
    models: list[ModelRow]
    organisms: list[OrganismRow]
    across: list[AcrossModels]
    """Directions are compared only where vectors of one model can stand in the other."""
    failed: list[FailedModel]
    waiting: list[str]
    """Models that have not had their turn yet."""

    def _tables(self) -> Mapping[str, Table]:
        return {
            "organisms": partial(rows, self.organisms),
            "models": partial(rows, self.models),
            "across": self._across,
        }

    def _across(self) -> pd.DataFrame:
        """One row for each pair of models, organism and layer."""
        return pd.DataFrame(
            {"organism": each.organism, "first": each.first, "second": each.second, "layer": layer} | dict(values)
            for each in self.across
            for layer, values in enumerate(
                {"cosine": cosine, "base_null": null} for cosine, null in zip(each.cosine, each.base_null, strict=True)
            )
        )


def model_row(name: str, results: RunResults) -> ModelRow:
    """The base of one run, which is called `name`."""
    base = results.base
    return ModelRow(
        name=name,
        **{key: getattr(base, key) for key in ("model", "revision", "dtype", "device", "layers", "width")},
        margin=results.base_margin[GENERAL],
        judged=_judged(results, "base"),
    )


def organism_rows(name: str, results: RunResults, organisms: Iterable[str]) -> list[OrganismRow]:
    """Some organisms, in this order, of one run, which is called `name`."""
    return [
        OrganismRow(
            model=name,
            organism=organism,
            **{key: getattr(figures, key) for key in ("recipe", "domain", "answers", "trainable_parameters")},
            margin_shift=figures.margin_shift[GENERAL],
            minus_control=figures.minus_control.get(GENERAL),
            in_domain=figures.margin_shift.get("in_domain"),
            damage=figures.damage,
            judged=_judged(results, organism),
        )
        for organism, figures in ((each, results.organisms[each]) for each in organisms)
    ]


def _judged(results: RunResults, organism: str) -> Judged | None:
    plain = {"organism": organism, "intervention": ""}
    scores = results.behaviour.scores if results.behaviour else []
    return next((Judged.of(score) for score in scores if score.group == plain), None)
