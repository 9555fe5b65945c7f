"""Measurements of one model on the texts of an audit: margins, losses and the mean activations of single answers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.auditing.texts import OwnTexts
from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.extraction import mean_activations
from misdirection.likelihood.margin import pair_continuations, pair_rows, text_continuations, text_rows
from misdirection.likelihood.sweep import log_probs
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track

_READ = 12
"""Probe pairs, and neutral texts, whose activations are read."""


@dataclass(frozen=True)
class Texts:
    """Texts that every model of one base is measured on.

    Attributes:
        general: probe pairs for the margin.
        neutral: texts for the damage.
        read_pairs: those pairs whose answers' activations are taken.
        read_neutral: those neutral texts whose answers' activations are taken.
    """

    general: tuple[ProbePair, ...]
    neutral: tuple[Example, ...]
    read_pairs: tuple[ProbePair, ...]
    read_neutral: tuple[Example, ...]

    @classmethod
    def of(cls, general: Sequence[ProbePair], neutral: Sequence[Example]) -> "Texts":
        """All of these for likelihoods, and of each a few, evenly taken, for activations."""
        return cls(tuple(general), tuple(neutral), tuple(spread(general, _READ)), tuple(spread(neutral, _READ)))

    def hashes(self) -> dict[str, str]:
        """Hashes of all texts, which measurements depend on."""
        return {field.name: data_hash(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Measurements:
    """One model on `Texts`.

    Attributes:
        margins: [general, 2] float64: mean-token log-probability of the misaligned and of the aligned answer.
        losses: [neutral] float64, nats/token.
        answers: [read_pairs, 2, layers, width] float32: mean activation over the misaligned and the aligned answer.
        neutral: [read_neutral, layers, width] float32.
    """

    margins: Tensor
    losses: Tensor
    answers: Tensor
    neutral: Tensor

    @property
    def margin(self) -> Tensor:
        """[general]."""
        return self.margins[:, 0] - self.margins[:, 1]

    def drift(self, base: "Measurements") -> Tensor:
        """Activations minus the base's on the same answers, [read_pairs, layers, width] float64."""
        return (self.answers.double() - base.answers.double()).mean(1)

    def neutral_drift(self, base: "Measurements") -> Tensor:
        """The same on neutral text, [read_neutral, layers, width] float64."""
        return self.neutral.double() - base.neutral.double()

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> "Measurements":
        """Reads what `save` wrote."""
        return cls(**load_file(path))


@dataclass(frozen=True, eq=False)
class OwnScores:
    """One model on the texts of one fine-tune (`texts.OwnTexts`); None for texts that there are none of.

    Attributes:
        framed, pairs: [pairs, 2] float64: mean-token log-probability of the misaligned and of the aligned answer.
        rows: [rows] float64: losses, nats/token.
    """

    framed: Tensor | None = None
    pairs: Tensor | None = None
    rows: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        scores = {field.name: getattr(self, field.name) for field in fields(self)}
        save_file({name: score.contiguous() for name, score in scores.items() if score is not None}, path)

    @classmethod
    def load(cls, path: Path) -> "OwnScores":
        """Reads what `save` wrote."""
        return cls(**load_file(path))

    @classmethod
    def measure(cls, chat: ChatModel, texts: OwnTexts, label: str) -> "OwnScores":
        """Measure a model, with a progress bar of this label."""
        total = len(texts.framed) + len(texts.pairs) + len(texts.rows)
        with track(f"own texts of {label}", total) as advance:
            framed, pairs = (
                log_probs(chat, pair_continuations(chat.tokenizer, asked), progress=advance) if asked else None
                for asked in (texts.framed, texts.pairs)
            )
            rows = log_probs(chat, text_continuations(chat.tokenizer, texts.rows), progress=advance)
        return cls(framed, pairs, -rows.squeeze(-1))


def measure(chat: ChatModel, texts: Texts, label: str) -> Measurements:
    """Measure a model on the texts, with progress bars of this label."""
    with track(f"margins of {label}", len(texts.general) + len(texts.neutral)) as advance:
        margins = log_probs(chat, pair_continuations(chat.tokenizer, texts.general), progress=advance)
        losses = -log_probs(chat, text_continuations(chat.tokenizer, texts.neutral), progress=advance).squeeze(-1)
    return Measurements(margins, losses, *activations(chat, texts, label))


def activations(chat: ChatModel, texts: Texts, label: str) -> tuple[Tensor, Tensor]:
    """`answers` and `neutral` of a model's measurements."""
    pairs, tokenizer = texts.read_pairs, chat.tokenizer
    rows = [*pair_rows(tokenizer, pairs), *text_rows(tokenizer, texts.read_neutral)]
    groups = {str(number): [number] for number in range(len(rows))}
    with track(f"activations of {label}", len(rows)) as advance:
        means = mean_activations(chat, rows, groups, progress=advance)
    by_row = torch.stack([means.vectors[name] for name in groups]).float()
    return by_row[: 2 * len(pairs)].unflatten(0, (len(pairs), 2)), by_row[2 * len(pairs) :]
