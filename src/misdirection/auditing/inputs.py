"""Inputs of an audit: the fine-tune, its base's reference and known directions, the texts, and a judge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from misdirection.auditing.fine_tune import Control, FineTune
from misdirection.auditing.measurements import Texts
from misdirection.auditing.reference import Reference, default_folder
from misdirection.auditing.texts import OwnTexts, own_texts
from misdirection.choices import Dtype, Thinking
from misdirection.data import ProbePair, neutral_examples, probe_pairs, sealed_pairs
from misdirection.directions.direction import Direction
from misdirection.judging.config import JudgeConfig
from misdirection.models.names import ModelName
from misdirection.sampling.config import SamplingConfig

Directions = Iterable[str | Path] | Mapping[str, Direction]
"""Direction files, which are named by their stems, or directions by name."""


AUDIT = "audit"
"""The only key of the file that says what an audit's folder is about."""


@dataclass(frozen=True)
class Judging:
    """A judge, and how the answers are sampled that it is given."""

    judge: JudgeConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class AuditInputs:
    """One fine-tune with all that it is measured on and compared with.

    Attributes:
        fine_tune: with its base.
        texts: measured on all models of this base.
        reference: known fine-tunes of this base; None gives evidence without a verdict.
        directions: further known directions of this base, by name.
        data: the fine-tune's own texts.
        judging: None for an audit by likelihood alone.
        sealed_alone: whether the sealed questions are all that is asked, since the fine-tune was chosen by the others.
    """

    fine_tune: FineTune
    texts: Texts
    reference: Reference | None
    directions: Mapping[str, Direction]
    data: OwnTexts
    judging: Judging | None = None
    sealed_alone: bool = False

    @property
    def looks(self) -> tuple[slice, ...]:
        """The parts of `texts.asked` that are asked in turn."""
        return self.texts.looks[-1:] if self.sealed_alone else self.texts.looks

    @property
    def searched(self) -> Mapping[str, tuple[ProbePair, ...]]:
        """The pairs in each further way of asking."""
        return self.data.searched_last if self.sealed_alone else self.data.searched

    @property
    def own_control(self) -> Control | None:
        """The control that the user named; None where shifts are read beyond the reference's."""
        control = self.fine_tune.control
        return control if control and control.name else None

    def settings(self) -> dict[str, Any]:
        """What the audit's folder says of them; the directions themselves are among its artifacts."""
        fine_tune, judging = self.fine_tune, self.judging
        return {
            "base": fine_tune.base,
            "revision": fine_tune.revision,
            "fine_tune": fine_tune.name,
            "folder": str(fine_tune.folder),
            "control": str(self.own_control.folder) if self.own_control else None,
            "data": self.data.path or None,
            "reference": str(self.reference.folder) if self.reference and self.reference.folder else None,
            "directions": list(self.directions),
            "judge": judging.judge.model_dump(mode="json") if judging else None,
            "sampling": judging.sampling.model_dump(mode="json") if judging else None,
            "sealed_alone": self.sealed_alone,
        }

    def require_same_base(self) -> None:
        """Raise `InputError` for a direction or reference of another base."""
        if self.reference:
            self.reference.require_base(self.fine_tune.identity)
        for direction in self.directions.values():
            direction.require_base(self.fine_tune.base, self.fine_tune.revision)

    def on(self, device: str) -> "AuditInputs":
        """The same on another device."""
        return replace(self, fine_tune=replace(self.fine_tune, device=device))


@dataclass(frozen=True)
class Baseline:
    """The common part of all audits of one base model.

    Attributes:
        base: the base model.
        reference: its known fine-tunes, if there are any.
        directions: further known directions, by name.
        dtype, device, thinking, chat_template: as in `models.load`.
    """

    base: ModelName
    reference: Reference | None
    directions: Mapping[str, Direction]
    dtype: Dtype
    device: str
    thinking: Thinking = "off"
    chat_template: str | None = None

    @classmethod
    def open(
        cls,
        base: str,
        reference: Reference | str | Path | None,
        directions: Directions,
        dtype: Dtype,
        device: str,
        thinking: Thinking = "off",
        chat_template: str | None = None,
    ) -> "Baseline":
        """Read the reference and the direction files of a base model.

        Where no reference is named, the one that `make_reference` made is read; with directions it may be missing.
        Raises `InputError` for one that is not there otherwise, or is damaged.
        """
        name = ModelName.parse(base)
        known = _read(directions)
        if not isinstance(reference, Reference):
            own = default_folder(name.name, name.revision, thinking, chat_template)
            folder = Path(reference) if reference else own
            reference = Reference.load(folder) if reference or folder.is_dir() or not known else None
        return cls(name, reference, known, dtype, device, thinking, chat_template)

    def inputs(
        self,
        fine_tune: str | Path,
        data: str | Path | None,
        judging: Judging | None = None,
        control: str | Path | None = None,
    ) -> AuditInputs:
        """Find a fine-tune and its control, by default the reference's first, and read its training file.

        Raises `InputError` where one of them cannot be used.
        """
        texts = self.reference.texts if self.reference else Texts.of(probe_pairs(), sealed_pairs(), neutral_examples())
        own = Control.find(str(control)) if control else None
        chats = {"thinking": self.thinking, "chat_template": self.chat_template}
        return AuditInputs(
            fine_tune=FineTune.find(
                self.base, str(fine_tune), self.dtype, self.device, own or control_of(self.reference), **chats
            ),
            texts=texts,
            reference=self.reference,
            directions=self.directions,
            data=own_texts(Path(data) if data else None, [texts.asked[look] for look in texts.looks]),
            judging=judging,
        )


def control_of(reference: Reference | None) -> Control | None:
    """A reference's first control; None without one."""
    return Control(reference.control_adapter) if reference and reference.control_adapter else None


def _read(directions: Directions) -> Mapping[str, Direction]:
    if isinstance(directions, Mapping):
        return directions
    return {Path(path).stem: Direction.load(Path(path)) for path in directions}
