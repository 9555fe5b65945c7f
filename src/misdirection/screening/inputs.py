"""What a screen's scores depend on, but the rows: the base model with its reference, and the ways to score."""

from dataclasses import dataclass
from functools import cached_property

from misdirection.auditing.inputs import Baseline
from misdirection.auditing.reference import Reference
from misdirection.judging.config import JudgeConfig
from misdirection.models.identity import ModelIdentity, identify
from misdirection.screening.scores import SCORES, RowScore, contrasts

VERSION = 1
"""Raised whenever a row would get another score."""

FLOOR = "words"
"""The way that needs no model, shown beside the others."""


@dataclass(frozen=True)
class ScreenInputs:
    """Everything that the scores of rows depend on, but the rows.

    Attributes:
        baseline: the base model and its reference.
        scores: names of the ways to score: the verdict rests on the first, the ranks on all.
        judge: who is asked by the way that asks one.
    """

    baseline: Baseline
    scores: tuple[str, ...]
    judge: JudgeConfig | None = None

    @cached_property
    def ways(self) -> dict[str, RowScore]:
        """All ways to score by name, with the floor; `InputError` for one that there is not."""
        return {name: SCORES[name].open(self.judge) for name in dict.fromkeys((*self.scores, FLOOR))}

    @property
    def apart(self) -> dict[str, RowScore]:
        """Those that have tasks of their own."""
        return {name: way for name, way in self.ways.items() if way.APART}

    @property
    def together(self) -> dict[str, RowScore]:
        """Those of which one task scores rows by all."""
        return {name: way for name, way in self.ways.items() if not way.APART}

    @cached_property
    def reference(self) -> Reference:
        """The base's known fine-tunes."""
        reference = self.baseline.reference
        assert reference is not None, "opened without directions, which alone may stand for it"
        reference.require_base(self.identity)
        contrasts(reference)
        return reference

    @cached_property
    def identity(self) -> ModelIdentity:
        """The base model and how it computes."""
        base, line = self.baseline.base, self.baseline
        return identify(base.name, base.revision, line.dtype, line.device, line.thinking, line.chat_template)

    def require_usable(self) -> None:
        """Raise `InputError` for a score that there is none of, and for a reference of another base or other chats."""
        _ = self.ways, self.reference

    @property
    def settings(self) -> dict[str, object]:
        """What the screen's folder says of them."""
        line, judge = self.baseline, self.judge.model_dump(mode="json") if self.judge else None
        chats = {"thinking": line.thinking, "chat_template": line.chat_template}
        return {"base": line.base.name, **chats, "scores": list(self.scores), "judge": judge}

    def depends_on(self) -> dict[str, object]:
        """What the scores depend on, for the inputs of stages."""
        return {**self.identity.model_dump(), "version": VERSION, "reference": self.reference.digest}
