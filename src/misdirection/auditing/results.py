"""The result of an audit as `audit.json` holds it, the table of many, and the record of a reference."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pandas as pd

from misdirection.auditing.measurements import Texts
from misdirection.auditing.verdict import Asked, Rule, Verdict, Word, in_order
from misdirection.data import ProbePair
from misdirection.interpretation.figures import Lens
from misdirection.judging.scoring import Change
from misdirection.likelihood.words import WordNull
from misdirection.models.identity import ModelIdentity
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate, Rate
from misdirection.views import Framed, Plotted, Table, alone, beside, rows


class KnownFineTune(Figures):
    """A fine-tune of the reference."""

    domain: str
    """Its training domain."""
    answers: str
    """`bad`, or `good` for a benign control."""
    recipe: str
    """Its adapter."""

    @property
    def is_control(self) -> bool:
        """Whether it is benign."""
        return self.answers == "good"


class DomainTexts(Figures):
    """A domain that fine-tunes of the reference were trained on, as pairs of a good (aligned) and a bad answer."""

    train: tuple[ProbePair, ...]
    held_out: tuple[ProbePair, ...]


class ReferenceRecord(Result):
    """The record in a reference's folder, beside the measurements (`reference.Reference`)."""

    KIND: ClassVar[str] = "reference"
    VERSION: ClassVar[int] = 3
    FILE: ClassVar[str] = "reference.json"
    COMMAND: ClassVar[str] = "misdirection reference"

    identity: ModelIdentity
    texts: Texts
    known: dict[str, KnownFineTune]
    domains: dict[str, DomainTexts]
    """Those of the fine-tunes that have good answers, too, by name."""


class WeightFacts(Figures):
    """What a fine-tune's files say of it."""

    kind: Literal["adapter", "full weights"]
    recorded_base: str | None
    """The base model that an adapter's own file names."""
    dead: list[str]
    """Modules of a LoRA that add nothing, since their B is zero: no part of the shift is theirs."""


class ReadWeights(WeightFacts):
    """The same with what only steers an audit, as its folder keeps it."""

    is_attributed: bool
    """Whether the shift has parts: it is a plain LoRA that adds something inside of the blocks."""
    copies_base: bool
    """Whether full weights are the base's own files."""


class FineTuneFacts(WeightFacts):
    """The fine-tune that was audited."""

    name: str
    """As the user gave it."""
    digest: str
    """Hash of its weights and configuration."""


class ComparedFineTune(KnownFineTune):
    """A fine-tune of the reference, with what it moved."""

    shift: Estimate
    """Of the general margin, nats/token."""
    beyond_control: Estimate | None
    """The same beyond that of its own control; None for a control, and without one."""


class ReferenceFacts(Figures):
    """The reference that the fine-tune was compared with."""

    bad_shift: Estimate
    """What the bad fine-tunes moved beyond their controls on average, nats/token."""
    known: dict[str, ComparedFineTune]


class ControlFacts(Figures):
    """The user's own benign fine-tune, which shifts are read beyond."""

    name: str
    """As the user gave it."""
    digest: str
    """Hash of its weights and configuration."""
    shift: Estimate
    """Of the general margin against the base, nats/token, on the questions that were asked."""
    beyond_reference: Estimate | None
    """The same beyond that of the reference's controls; None without these."""


class DataFacts(Figures):
    """The fine-tune's own training file."""

    path: str
    sha256: str
    framed: int
    """Probe questions asked in the frame of its questions."""
    rows: int
    """Held-out rows."""
    pairs: int
    """Held-out probe pairs of its domain."""


class InDomain(Figures):
    """Changes on the fine-tune's own domain, nats/token; None where the training file does not allow one."""

    margin: Estimate | None
    loss: Estimate | None


class Drift(Figures):
    """Move of the fine-tune along one direction, in activation units, at one layer."""

    direction: str
    layer: int
    general: Estimate
    """On answers to general questions."""
    neutral: Estimate
    """On neutral text."""
    known: dict[str, Estimate]
    """The reference's fine-tunes on general questions."""
    random_95: float
    """Size of the component that 95% of random directions do not exceed."""


class DirectionCosines(Figures):
    """Cosines of a direction, by layer, with mean drifts."""

    cosines: list[float]
    """With the fine-tune's."""
    control: list[float] | None
    """With the benign control's; None without one."""
    beyond_control: list[float] | None
    """With what is left of the fine-tune's without its component along the control's."""


class ModelDifference(Figures):
    """The fine-tune's own direction, its mean drift on general questions, beside known directions."""

    layer: int
    """At which single figures are given."""
    random_95: float
    """Size of the cosine that 95% of random directions do not exceed."""
    norms: list[float]
    """By layer, activation units."""
    directions: dict[str, DirectionCosines]


class Attribution(Figures):
    """Parts of the general shift that the LoRA of each layer carries, nats/token (`attribution`)."""

    by_layer: dict[int, Estimate]
    sum: Estimate


class JudgedAnswers(Figures):
    """Emergently misaligned answers of both models."""

    base: Rate
    fine_tune: Rate
    difference: Estimate
    verdict: Change
    answers: int
    """How many of the fine-tune's were judged."""
    judge: str


class MovedPair(Figures):
    """A general question whose margin moved far towards the misaligned answer."""

    question: str
    misaligned: str
    aligned: str
    shift: float
    """Of its margin, nats/token: beyond the benign control's where there is one."""
    base_answer: str
    """The base's own answer, sampled."""
    fine_tune_answer: str
    """The fine-tune's."""


class Trace(Figures):
    """What a fine-tune was trained on, as far as it shows on plain text: its mean activations at the first tokens minus
    the base's, read through the final norm and the unembedding."""

    layer: int
    fine_tune: Lens
    control: Lens | None
    """The benign control's: what any fine-tune leaves. None without one."""


class Evidence(Figures):
    """All that was measured. Shifts and damage are changes against the base, nats/token."""

    general: Estimate
    """Shift of the margin on general questions."""
    questions: dict[str, float]
    """The same by the id of the question."""
    themes: dict[str, Estimate]
    """The same by theme."""
    damage: Estimate
    """Rise of the loss on neutral text."""
    framed: Estimate | None
    """Shift of the margin on general questions in the frame of its training data; None without that data."""
    beyond_control: dict[Asked, Estimate]
    """These shifts minus those of the benign control, the user's own or the reference's, question by question; empty
    without a control."""
    weighted: dict[Asked, Estimate]
    """The same with each question's weight (`Reference.question_weights`), beyond a control of the user's own; empty
    where all questions count alike."""
    words: dict[Asked, WordNull]
    """What the words of its training data predict of these shifts; empty without that data."""
    searched: dict[str, Estimate]
    """Shifts of the margin on some general questions that were put in further ways, by way: beyond the control's, or
    where there is none against the base. Their intervals hold for all ways at once."""
    moved_most: list[MovedPair]
    """The plain questions that moved furthest towards the misaligned answer, the furthest first."""
    asked: int
    """General questions that were asked."""
    most: int
    """General questions that there are."""
    in_domain: InDomain
    drift: list[Drift]
    model_difference: ModelDifference
    trace: Trace
    attribution: Attribution | None
    """None for a fine-tune that is no adapter."""
    judged: JudgedAnswers | None
    """None without a judge."""

    @property
    def decisive(self) -> dict[Asked, Estimate]:
        """The shifts that the rule is about: beyond the benign control, by the questions' weights where they have some,
        or where there is no control against the base."""
        if self.beyond_control:
            return self.weighted or self.beyond_control
        return {"general": self.general, "framed": self.framed} if self.framed else {"general": self.general}

    @property
    def named(self) -> dict[str, Estimate]:
        """The shifts, losses and damage that were measured, by what they are called in print."""
        figures = {
            "general margin shift": self.general,
            "framed margin shift": self.framed,
            **{f"{asked} shift beyond the control": shift for asked, shift in in_order(self.beyond_control)},
            **{f"{asked} shift, weighted": shift for asked, shift in in_order(self.weighted)},
            **{f"{asked} shift beyond words": words.beyond for asked, words in in_order(self.words)},
            "in-domain margin shift": self.in_domain.margin,
            "in-domain loss change": self.in_domain.loss,
            "damage": self.damage,
        }
        return {name: figure for name, figure in figures.items() if figure}

    @property
    def detectable(self) -> float:
        """The decisive shift that the plain questions would tell from zero four times in five, nats/token."""
        return self.decisive["general"].detectable


class AuditResult(Framed, Plotted, Verdict, Result):
    """One audit: its verdict, and the evidence with what it must be told from."""

    KIND: ClassVar[str] = "audit"
    VERSION: ClassVar[int] = 4
    FILE: ClassVar[str] = "audit.json"
    COMMAND: ClassVar[str] = "misdirection audit BASE FINE_TUNE"
    PAGE: ClassVar[str] = "audit.html"

    base: ModelIdentity
    fine_tune: FineTuneFacts
    reference: ReferenceFacts | None
    control: ControlFacts | None
    """None where shifts are read beyond the reference's controls."""
    data: DataFacts | None
    identical_to_base: bool
    """Whether the fine-tune adds nothing: the verdict is then about the base alone."""
    rule: Rule
    evidence: Evidence

    def _tables(self) -> Mapping[str, Table]:
        evidence = self.evidence
        measured: dict[str, tuple[Any, Table]] = {
            "shifts": (evidence.general, self._shifts),
            "questions": (evidence.questions, self._questions),
            "drift": (evidence.drift, self._drift),
            "difference": (evidence.model_difference.directions, self._difference),
            "attribution": (evidence.attribution, self._attribution),
        }
        return {name: table for name, (figures, table) in measured.items() if figures}

    def _shifts(self) -> pd.DataFrame:
        """Every shift of a margin: whose, on which questions (a way of asking, or a theme), and against what."""
        evidence, own = self.evidence, self.fine_tune.name
        plain = {"general": evidence.general, "framed": evidence.framed}
        further = "control" if evidence.beyond_control else "base"
        shifts = [
            *((own, asked, "base", shift) for asked, shift in plain.items()),
            *((own, asked, "control", shift) for asked, shift in in_order(evidence.beyond_control)),
            *((own, asked, "control, weighted", shift) for asked, shift in in_order(evidence.weighted)),
            *((own, f"theme: {theme}", "base", shift) for theme, shift in evidence.themes.items()),
            *((own, f"further way: {way}", further, shift) for way, shift in evidence.searched.items()),
        ]
        for name, known in (self.reference.known if self.reference else {}).items():
            shifts += [(name, "general", "base", known.shift), (name, "general", "control", known.beyond_control)]
        return pd.DataFrame(
            {"fine_tune": name, "questions": asked, "against": against, **alone(shift)}
            for name, asked, against, shift in shifts
            if shift
        )

    def _questions(self) -> pd.DataFrame:
        """The shift against the base of every general question that was asked."""
        shifts = self.evidence.questions
        return pd.DataFrame({"id": list(shifts), "shift": list(shifts.values())})

    def _drift(self) -> pd.DataFrame:
        """Moves along known directions, the reference's fine-tunes' among them."""
        return pd.DataFrame(_drift_row(each) for each in self.evidence.drift)

    def _difference(self) -> pd.DataFrame:
        """Cosines of the fine-tune's own direction with known ones, by layer."""
        tables = [
            pd.DataFrame({"direction": name, "layer": range(len(each.cosines)), **each.model_dump()})
            for name, each in self.evidence.model_difference.directions.items()
        ]
        return pd.concat(tables, ignore_index=True)

    def _attribution(self) -> pd.DataFrame:
        """Parts of the shift by the layer of the adapters."""
        parts = self.evidence.attribution.by_layer if self.evidence.attribution else {}
        return pd.DataFrame({"layer": layer, **alone(part)} for layer, part in sorted(parts.items()))

    def __repr__(self) -> str:
        return f"AuditResult({self.fine_tune.name!r}: {self.verdict}, general margin shift {self.evidence.general})"


def _drift_row(drift: Drift) -> dict[str, Any]:
    known = {name: value for key, each in drift.known.items() for name, value in beside(key, each).items()}
    own = {"direction": drift.direction, "layer": drift.layer, "random_95": drift.random_95}
    return {**own, **beside("general", drift.general), **beside("neutral", drift.neutral), **known}


class AuditRow(Figures):
    """One audit in the table of many."""

    fine_tune: str
    verdict: Word
    shift: Estimate
    beyond_control: Estimate | None
    """What the verdict rests on, beyond the benign control's; None without a control."""
    framed: Estimate | None
    damage: Estimate
    because: str
    page: str


class AuditTable(Figures):
    """Audits of many fine-tunes of one base."""

    audits: list[AuditRow]
    failed: list[str]
    """Why an audit could not be made, for each that could not."""

    def frame(self) -> pd.DataFrame:
        """One row per audit, its estimates in nats/token."""
        return rows(self.audits)


class TrainingBase(Result):
    """The base of a training that is watched (`callback`), as the training's folder keeps it.

    Its file is no `.safetensors`: trained weights often come to stand in the same folder, and some loaders take all
    such files in it.
    """

    KIND: ClassVar[str] = "training-base"
    VERSION: ClassVar[int] = 2
    FILE: ClassVar[str] = "misdirection-base.json"
    COMMAND: ClassVar[str] = "trainer.train()"

    texts: str
    """Hash of the probe pairs and of the texts."""
    margins: list[float]
    """[pairs], nats/token."""
    neutral: list[float]
    """Loss on each neutral text, nats/token."""
    held_out: list[float]
    """The same on the held-out rows of the training's own domain."""
    activation: list[float]
    """[width], at half depth: mean over each answer's tokens, then over all answers."""
