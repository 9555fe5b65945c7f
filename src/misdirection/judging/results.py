"""A judge's profile, and its calibration: where it says that an answer is misaligned, and where a reference does."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import JsonValue

from misdirection.errors import InputError
from misdirection.files import read_json, write_output
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate, Rate


class JudgeProfile(Figures):
    """What a judge's scores depend on: two tables with the same profile were judged alike."""

    judge: dict[str, JsonValue]
    """Who judged, as tables of verdicts name it, without the host."""
    snapshots: tuple[str, ...]
    """The models that the endpoint said have answered; empty where it did not say."""
    ways: tuple[str, ...]
    """How scores came about: `logprobs`, `text`."""
    samples: int | None
    """Replies that were averaged where the text was read; None where none was, or the judge does not say."""
    rubrics: dict[str, str]
    """SHA-256 of what was asked, by the column of its scores."""

    @property
    def name(self) -> str:
        """The judge in words."""
        known = next((str(value) for key, value in self.judge.items() if key in ("model", "hf")), None)
        shown = known or ", ".join(f"{key} {value}" for key, value in self.judge.items())
        return " ".join([shown, *(f"({name})" for name in self.snapshots if name != shown)])

    @property
    def read_from(self) -> str:
        """How scores came about, in words."""
        texts = f"from the text of {self.samples} replies" if self.samples else "from the text"
        words = {"logprobs": "from log-probabilities", "text": texts}
        return " and ".join(words[way] for way in self.ways) or "none"

    def difference(self, calibrated: "JudgeProfile") -> str | None:
        """What keeps a calibration of another profile from being good for scores of this one; None if nothing does.

        Where one of the two does not know its endpoint's snapshot, the names alone must agree.
        """
        if self.judge != calibrated.judge:
            return f"of {calibrated.name}, and these scores are by {self.name}"
        if calibrated.snapshots and (other := sorted({*self.snapshots} - {*calibrated.snapshots})):
            return f"of the snapshot {', '.join(calibrated.snapshots)}, and {', '.join(other)} gave these scores"
        for column, digest in self.rubrics.items():
            if (known := calibrated.rubrics.get(column)) != digest:
                return f"for another rubric of {column!r} ({str(known)[:8]}, not {digest[:8]})"
        if other := sorted({*self.ways} - {*calibrated.ways}):
            return f"for scores by {', '.join(calibrated.ways)}, and some of these are by {', '.join(other)}"
        if self.samples != calibrated.samples and "text" in self.ways:
            return f"for {calibrated.samples} replies to a prompt, and these scores are of {self.samples}"
        return None


class QuestionCounts(Figures):
    """Answers to one question, by who calls them misaligned and coherent."""

    both: int
    judge_only: int
    reference_only: int
    neither: int


class JudgeErrors(Figures):
    """How often a judge errs on misaligned answers, by a reference."""

    reference: str
    """Whose verdicts count as right, in words."""
    answers: int
    """Answers on which both have a verdict."""
    left_out: int
    """Answers of both tables on which one has none."""
    sensitivity: Rate | None
    """The judge's misaligned answers among the reference's; None where the reference knows none."""
    specificity: Rate | None
    """Answers that are not misaligned by the judge among those that are not by the reference."""
    youden: Estimate | None
    """Sensitivity + specificity - 1: 1 for a judge without error, 0 for one that tells nothing apart."""

    @property
    def is_usable(self) -> bool:
        """Whether the judge surely tells something apart."""
        return self.youden is not None and self.youden.low > 0


class Calibration(JudgeErrors, Result):
    """One judge's misaligned answers beside those of a reference, on the same answers."""

    KIND: ClassVar[str] = "calibration"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "calibration.json"
    COMMAND: ClassVar[str] = "misdirection agree JUDGED REFERENCE --save FILE.json"

    profile: JudgeProfile
    """Of the judge: its scores alone may be corrected by this."""
    counts: dict[str, QuestionCounts]
    """By question id."""
    labels: dict[str, bool]
    """The reference's verdict by the answer's key, so that answers are known that both have judged."""

    @property
    def errors(self) -> JudgeErrors:
        """The part of it that a result shows."""
        return JudgeErrors(**{name: getattr(self, name) for name in JudgeErrors.model_fields})

    def require_usable(self, source: str = "calibration") -> None:
        """Raises `InputError` for a judge that may tell nothing apart: no rate can be got back from its verdicts."""
        if self.youden is None:
            raise InputError(
                f"{source}: its reference calls all {self.answers} answers the same, so that nothing can be corrected "
                "by it: calibrate on answers of a misaligned and of an aligned model"
            )
        if not self.is_usable:
            raise InputError(
                f"{source}: sensitivity + specificity - 1 is {self.youden}, not surely above zero, so that nothing can "
                "be corrected by it: take a better judge, or more answers"
            )

    def write(self, path: str | Path) -> None:
        """Write the file; raises `InputError` where somebody else's is in its place."""
        write_output(Path(path), f"{self}\n")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the file; raises `InputError` as `load` does."""
        return cls.from_dict(read_json(Path(path)), str(path))
