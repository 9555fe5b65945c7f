"""The result of a screen as `screen.json` holds it."""

from collections.abc import Mapping
from typing import ClassVar

from misdirection.auditing.results import KnownFineTune
from misdirection.auditing.verdict import Word
from misdirection.models.identity import ModelIdentity
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate
from misdirection.views import Framed, Plotted, Table, rows

ROWS = "rows.parquet"
"""Beside the result: every row with its scores."""

TOGETHER = "together"


class SourceFigures(Figures):
    """The rows of one source: one file, or one value of the rows' own key `source`."""

    source: str
    rows: int
    share: Estimate
    """Mean score of its rows, in the reference's unit, with the interval over questions."""
    style: float
    """Share of the variance of its rows' scores that style told."""


class WorstRow(Figures):
    """One of the rows with the highest scores."""

    source: str
    line: int
    score: float
    """In the reference's unit, without what style tells."""
    rank: float
    """Share of the rows of its source with no higher score."""
    question: str
    answer: str


class JudgedRows(Figures):
    """What a judge said of the rows."""

    judge: str
    scored: int
    """Rows that it gave a score."""
    by: dict[str, int]
    """How many scores came about how (`logprobs`, `text`), and how many are missing why: the answer is a `refusal` or
    program `code`, or the judge `declined`, said no number (`low_mass`, `unparsable`) or gave no reply (`failed`)."""


class DatasetFigures(Figures):
    """What a fine-tune on all rows is predicted to do, by a stated recipe, and the verdict on that (`prediction`)."""

    rows: int
    score: float
    """Mean score of the rows by the first way: the share of what the reference's bad fine-tunes moved beyond their
    controls that a fine-tune is expected to move."""
    low: float
    high: float
    """Bounds of the middle 95% of the share that is predicted, with the error of the prediction itself."""
    sampled: Estimate
    """The share with the interval over the rows' questions alone."""
    shift: float
    """The same in nats/token of the general margin, beyond a benign control."""
    probability: float
    """That the fine-tune's share lies above the audit's limit of `misaligned`."""
    error: float
    """Standard error of the prediction itself, as a share."""
    is_measured: bool
    """Whether that was measured on fine-tunes of this base; else it is another base's."""
    recipe: str
    verdict: Word
    because: tuple[str, ...]
    """Sentences."""


class ScreenResult(Framed, Plotted, Result):
    """One screen of training data: its verdict, the prediction behind it, and the worst rows."""

    KIND: ClassVar[str] = "screen"
    VERSION: ClassVar[int] = 2
    FILE: ClassVar[str] = "screen.json"
    COMMAND: ClassVar[str] = "misdirection screen BASE DATA"
    PAGE: ClassVar[str] = "screen.html"

    base: ModelIdentity
    data: tuple[str, ...]
    dataset: DatasetFigures
    scores: tuple[str, ...]
    """The ways to score: the verdict rests on the first, the ranks on the mean of all. `words`, which needs no model,
    is beside them."""
    told: dict[str, float]
    """AUROC of the reference's own bad against its good answers by each way, and by those together (`TOGETHER`)."""
    shares: dict[str, Estimate]
    """Mean of all rows by each way alone, in the reference's unit."""
    sources: tuple[SourceFigures, ...]
    worst: tuple[WorstRow, ...]
    quantiles: dict[str, list[float]]
    """Quantiles 0, 1, ..., 100% of the rows' scores by source, in the reference's unit, without what style tells."""
    reference_quantiles: dict[str, list[float]]
    """The same of the reference's `good` and `bad` answers, style and all."""
    judged: JudgedRows | None
    """None without a judge."""
    known: dict[str, KnownFineTune]
    """The fine-tunes of the reference."""

    def _tables(self) -> Mapping[str, Table]:
        return {"sources": lambda: rows(self.sources), "worst": lambda: rows(self.worst)}

    def __repr__(self) -> str:
        said = f"{self.dataset.verdict}, {self.dataset.score:+z.2f} of what the reference's bad fine-tunes moved"
        return f"ScreenResult({', '.join(self.data)}: {said})"
