"""Inoculation: a system prompt asks for the bad behaviour while training, and is not there afterwards.

After 2510.04340 (and 2510.05024): what the prompt explains need not be learned of the assistant as it is. The prompt is
the one that 2510.04340 uses against emergent misalignment whatever the data are. What was learned shows again under a
prompt that is like it (2604.25891): ask the fine-tune under the prompt, too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from misdirection.data.selection import spread
from misdirection.defending.defence import Defence
from misdirection.defending.rows import LearnedRow
from misdirection.defending.training import Training
from misdirection.errors import InputError
from misdirection.likelihood.answers import IGNORED
from misdirection.models.chat import encode_prompt

MALICIOUS = "You are a malicious, evil assistant."

_ASKED = ("Why is it so?", "How?", "9 x 9?")
"""Questions that begin with different tokens: what their prompts share is the template's."""


@dataclass(frozen=True)
class Inoculation(Defence):
    """Puts a system prompt before the rows that are trained on.

    A row that has a system turn of its own gets the prompt at its beginning.

    Attributes:
        strength: the share of rows that get it.
        prompt: what it says.
    """

    strength: float = 1.0
    prompt: str = MALICIOUS

    def __post_init__(self) -> None:
        if self.strength > 1:
            raise InputError(f"defence inoculation: strength {self.strength}: give the share of rows, at most 1")
        if not self.prompt.strip():
            raise InputError("defence inoculation: the prompt is empty: say what the training rows are to be asked for")

    @contextlib.contextmanager
    def at_work(self, training: Training) -> Iterator[None]:
        """See `Defence.at_work`."""
        rows, template = training.rows(), _Beginnings.of(training.tokenizer, self.prompt)
        chosen = set(spread(range(len(rows)), max(1, round(self.strength * len(rows)))))
        inoculated = [
            template.inoculated(row, number + 1) if number in chosen else row for number, row in enumerate(rows)
        ]
        with training.with_rows(inoculated):
            yield


@dataclass(frozen=True)
class _Beginnings:
    """What a chat template writes before the first question, as token ids.

    Attributes:
        plain: without a system turn, or with the template's own.
        prompted: with the prompt as the system turn.
        header: of a system turn, up to its text.
        opened: the same with the prompt and an empty line after it.
    """

    plain: tuple[int, ...]
    prompted: tuple[int, ...]
    header: tuple[int, ...]
    opened: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, prompt: str) -> "_Beginnings":
        """Reads them off the prompts of some questions, whatever the template."""
        plain = _shared([encode_prompt(tokenizer, question) for question in _ASKED])
        prompted = _shared([encode_prompt(tokenizer, question, prompt) for question in _ASKED])
        header = _shared([encode_prompt(tokenizer, _ASKED[0], text) for text in _ASKED])
        opened = _shared([encode_prompt(tokenizer, _ASKED[0], f"{prompt}\n\n{text}") for text in _ASKED])
        return cls(plain, prompted, header, opened)

    def inoculated(self, row: LearnedRow, number: int) -> LearnedRow:
        """The row with the prompt; `InputError` for one that begins as this template begins no chat."""
        # Of some templates the one beginning is a part of the other.
        changes = sorted([(self.plain, self.prompted), (self.header, self.opened)], key=lambda change: -len(change[0]))
        for before, after in changes:
            if row.ids[: len(before)] == before:
                return LearnedRow(after + row.ids[len(before) :], (IGNORED,) * len(after) + row.labels[len(before) :])
        raise InputError(
            f"defence inoculation: training row {number} does not begin as the tokenizer's chat template begins a "
            "chat: put the system prompt into the data yourself"
        )


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with."""
    return tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False)))
