"""Measurements of one model on the texts of an audit: margins, losses and the mean activations of single answers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.auditing.texts import OwnTexts
from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.extraction import mean_activations, row_means
from misdirection.likelihood.margin import margins_of, pair_continuations, pair_rows, text_continuations, text_rows
from misdirection.likelihood.sweep import log_probs
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track

FIRST_LOOK = 60
"""General pairs that an audit begins with."""

_FIRST_TOKENS = 5
"""Tokens of a neutral text that the trace of the training is read at."""

_READ = 12
"""Probe pairs, and neutral texts, whose activations are read."""


@dataclass(frozen=True)
class Texts:
    """Texts that every model of one base is measured on.

    Attributes:
        general: probe pairs for the margin, those of the first look first.
        sealed: further ones, that nothing was ever chosen on.
        neutral: texts for the damage.
        read_pairs: those pairs whose answers' activations are taken.
        read_neutral: those neutral texts whose answers' activations are taken.
    """

    general: tuple[ProbePair, ...]
    sealed: tuple[ProbePair, ...]
    neutral: tuple[Example, ...]
    read_pairs: tuple[ProbePair, ...]
    read_neutral: tuple[Example, ...]

    @classmethod
    def of(cls, general: Sequence[ProbePair], sealed: Sequence[ProbePair], neutral: Sequence[Example]) -> "Texts":
        """All of these for likelihoods, and of each a few, evenly taken, for activations."""
        first = spread(general, FIRST_LOOK)
        rest = [pair for pair in general if pair not in first]
        read = tuple(spread(general, _READ)), tuple(spread(neutral, _READ))
        return cls((*first, *rest), tuple(sealed), tuple(neutral), *read)

    @property
    def asked(self) -> tuple[ProbePair, ...]:
        """All general pairs in the order in which they are measured."""
        return (*self.general, *self.sealed)

    @property
    def looks(self) -> tuple[slice, ...]:
        """The parts of `asked` that an audit measures in turn: a first few, the other open ones, the sealed ones."""
        bounds = {0, min(FIRST_LOOK, len(self.general)), len(self.general), len(self.asked)}
        return tuple(slice(start, stop) for start, stop in pairwise(sorted(bounds)))

    def hashes(self) -> dict[str, str]:
        """Hashes of all texts, which measurements depend on."""
        return {field.name: data_hash(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Measurements:
    """One model on `Texts`.

    Attributes:
        margins: [asked, 2] float64: mean-token log-probability of the misaligned and of the aligned answer. Of no pair,
            [0, 2], in an audit, which asks in turn (`looks`) and keeps these apart.
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
        """[asked]."""
        return margins_of(self.margins)

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
        pairs: [pairs, 2] float64: mean-token log-probability of the misaligned and of the aligned answer.
        rows: [rows] float64: losses, nats/token.
    """

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
        with track(f"own texts of {label}", len(texts.pairs) + len(texts.rows)) as advance:
            pairs = (
                log_probs(chat, pair_continuations(chat.tokenizer, texts.pairs), progress=advance)
                if texts.pairs
                else None
            )
            rows = log_probs(chat, text_continuations(chat.tokenizer, texts.rows), progress=advance)
        return cls(pairs, -rows.squeeze(-1))


def measure(chat: ChatModel, texts: Texts, label: str) -> Measurements:
    """Measure a model on all texts but the general pairs, with progress bars of this label."""
    with track(f"losses of {label}", len(texts.neutral)) as advance:
        losses = -log_probs(chat, text_continuations(chat.tokenizer, texts.neutral), progress=advance).squeeze(-1)
    return Measurements(torch.empty(0, 2, dtype=torch.float64), losses, *activations(chat, texts, label))


def measure_margins(chat: ChatModel, pairs: Sequence[ProbePair], label: str) -> Tensor:
    """Log-probabilities of the misaligned and of the aligned answers, [pairs, 2], with a progress bar of this label."""
    with track(label, len(pairs)) as advance:
        return log_probs(chat, pair_continuations(chat.tokenizer, pairs), progress=advance)


def first_tokens(chat: ChatModel, texts: Texts, layer: int) -> Tensor:
    """Mean activation at the first tokens of plain neutral text, but for the very first, at one layer, [width] float64.

    The first one of all is left out: attention rests there, whatever the text.
    """
    read = [chat.tokenizer(text.answer)["input_ids"][: _FIRST_TOKENS + 2] for text in texts.neutral]
    rows = [Encoded(tuple(ids), 1, len(ids) - 1) for ids in read if len(ids) > 2]
    return mean_activations(chat, rows, {"all": range(len(rows))}).vectors["all"][layer]


def activations(chat: ChatModel, texts: Texts, label: str) -> tuple[Tensor, Tensor]:
    """`answers` and `neutral` of a model's measurements."""
    pairs, tokenizer = texts.read_pairs, chat.tokenizer
    rows = [*pair_rows(tokenizer, pairs), *text_rows(tokenizer, texts.read_neutral)]
    with track(f"activations of {label}", len(rows)) as advance:
        by_row = row_means(chat, rows, progress=advance).float()
    return by_row[: 2 * len(pairs)].unflatten(0, (len(pairs), 2)), by_row[2 * len(pairs) :]
