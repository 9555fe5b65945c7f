"""Who judges answers, as a configuration says it."""

from pathlib import Path
from typing import Any

from pydantic import Field

from misdirection.judging.judges import Judge, judge_kind, open_judge
from misdirection.judging.results import Calibration
from misdirection.settings import Section


class JudgeConfig(Section):
    """Who judges the answers; a key comes from the environment only."""

    model: str
    """A model of the endpoint, `hf:ID` for a local one, or `KIND:NAME` of another registered kind."""
    base_url: str | None = None
    """Of an OpenAI-style endpoint; by default the environment variable OPENAI_BASE_URL, else OpenAI's."""
    rubrics: tuple[str, ...] = ("alignment", "coherence")
    """Shipped rubrics, or YAML files."""
    logprobs: bool = True
    """Score by the first token's log-probabilities; otherwise the number in the text is read."""
    samples: int = Field(5, ge=1)
    """Replies that are averaged where the endpoint gives no log-probabilities."""
    timeout: float = Field(60.0, gt=0)
    """Seconds until a whole reply must be there."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at a time."""
    max_calls: int | None = Field(None, ge=0)
    """For each model under each condition."""
    min_judged: float = Field(0.8, ge=0, le=1)
    """Smallest share of a model's answers that must have a verdict."""
    calibration: Path | None = None
    """A file of `agree --save`, of this judge, by which EM rates are corrected, too."""

    @property
    def kind(self) -> type[Judge]:
        """The class of the judge."""
        return judge_kind(self.model)[0]

    def open(self) -> Judge:
        """The judge, ready to be asked; raises as `open_judge` does."""
        return open_judge(self.model, **self._options())

    def check(self) -> None:
        """Raises or warns of what is wrong with the judge, as far as can be told without loading a model."""
        kind, name = judge_kind(self.model)
        kind.check(name, **self._options())

    def read_calibration(self) -> Calibration | None:
        """The calibration, if any; raises `InputError` for a file that is none, or can correct nothing."""
        if self.calibration is None:
            return None
        calibration = Calibration.read(self.calibration)
        calibration.require_usable(str(self.calibration))
        return calibration

    def _options(self) -> dict[str, Any]:
        return self.model_dump(include=set(self.kind.OPTIONS), exclude_none=True)
