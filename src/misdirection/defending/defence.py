"""What a defence is, and the registry by which another package adds one.

A defence is a context that is open for as long as a trainer trains. In it the defence may change the rows that the
trainer reads, its loss, what surrounds its steps, and the weights between two steps; when the context closes, by an
error, too, all is as it was. What it costs is counted by letting it work on a stand-in of the model (`cost.defended`).
For instance, one that keeps the learned rows short:

    @DEFENCES.register("short")
    @dataclass(frozen=True)
    class Short(Defence):
        '''Trains on no row of more than `strength` tokens.'''

        strength: float = 64

        @contextmanager
        def at_work(self, training):
            with training.with_rows([row for row in training.rows() if len(row.ids) <= self.strength]):
                yield
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from misdirection.errors import InputError
from misdirection.registry import Registry, nearest

if TYPE_CHECKING:
    # Whoever names a defence in a configuration trains nothing yet.
    from misdirection.defending.training import Training

Plain = str | float | None
"""A setting as a record has it."""


@dataclass(frozen=True)
class Defence(ABC):
    """One defence with its settings, a frozen dataclass; `strength` has a default in every one.

    Attributes:
        strength: how much of it, in the defence's own unit; 0 is none.
    """

    strength: float

    @abstractmethod
    def at_work(self, training: "Training") -> AbstractContextManager[None]:
        """The context in which the trainer trains.

        Raises `InputError` for a training that this defence cannot defend.
        """

    def settings(self) -> dict[str, Plain]:
        """What its record says of it besides its strength: all fields that are a text or a number, and whose `texts` or
        `pairs` it uses."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "strength"}
        sources: dict[str, Plain] = {name: _source_of(named[name]) for name in ("texts", "pairs") if name in named}
        return {**{name: value for name, value in named.items() if isinstance(value, str | int | float)}, **sources}


DEFENCES: Registry[type[Defence]] = Registry(
    "defence",
    "misdirection.defences",
    {
        "kl": "misdirection.defending.kl:KL",
        "interleave": "misdirection.defending.interleaving:Interleave",
        "interleave_gap": "misdirection.defending.interleaving:InterleaveGap",
        "preventative": "misdirection.defending.preventative:Preventative",
        "ablation": "misdirection.defending.ablation:ConceptAblation",
        "inoculation": "misdirection.defending.inoculation:Inoculation",
        "projection": "misdirection.defending.projection:Projection",
        "stop": "misdirection.auditing.stopping:Stop",
    },
)
"""The defences by name: classes under `Defence`."""


def require_defence(text: str) -> str:
    """The same `NAME[:STRENGTH]`; `InputError` for an unknown name, or a strength that is no number above 0."""
    name, strength = _parts(text)
    if name not in DEFENCES:
        raise InputError(f"unknown defence {name!r}{nearest(name, list(DEFENCES))}")
    if strength is not None:
        _require_strength(name, strength)
    return text


def open_defence(text: str, **settings: Any) -> Defence:
    """The defence that `NAME[:STRENGTH]` names, with settings of its own.

    Raises `InputError` for an unknown name or setting, and for a strength that is no number above 0.
    """
    name, strength = _parts(require_defence(text))
    kind, given = DEFENCES[name], {key: value for key, value in settings.items() if value is not None}
    if strength is not None:
        given = {"strength": strength} | given
    known = [each.name for each in fields(kind)]
    if unknown := [key for key in given if key not in known]:
        raise InputError(f"defence {name}: unknown setting {unknown[0]!r}{nearest(unknown[0], known)}")
    defence = kind(**given)
    _require_strength(name, defence.strength)
    return defence


def _source_of(texts: Sequence[Any] | None) -> str:
    """Whose texts a defence uses; None stands for the shipped ones."""
    return "shipped" if texts is None else f"{len(texts)} given"


def record_of(name: str, defence: Defence) -> dict[str, Plain]:
    """What is kept of a defence beside the adapter that was trained under it."""
    return {"name": name, "strength": float(defence.strength), **defence.settings()}


def _parts(text: str) -> tuple[str, float | None]:
    name, colon, strength = text.partition(":")
    if not colon:
        return name, None
    try:
        return name, float(strength)
    except ValueError:
        raise InputError(f"defence {text!r}: {strength!r} is no number: write NAME or NAME:STRENGTH") from None


def _require_strength(name: str, strength: float) -> None:
    if not (math.isfinite(strength) and strength > 0):
        raise InputError(f"defence {name}: strength {strength}: give a number above 0")
