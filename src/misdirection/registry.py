"""Names for things that another package can add: judges, kinds of intervention, stages, recipes, figures, pages.

A registry knows its built-in entries by the place where they are defined, `module:attribute`, and imports that place
when the entry is first asked for. Another package adds an entry by an entry point of the registry's group, or by
calling `register` when it is imported.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from misdirection.errors import InputError

T = TypeVar("T")
E = TypeVar("E")


class Registry(Generic[T]):
    """Entries of one kind by name, in the order: built in, entry points, registered.

    Args:
        kind: what an entry is, for messages, such as `judge`.
        group: the entry points' group, such as `misdirection.judges`.
        built_in: `module:attribute` by name.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str] | None = None) -> None:
        self.kind, self.group = kind, group
        self._built_in = dict(built_in or {})
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """A decorator that adds what it decorates, and gives it back unchanged.

        Raises `InputError` for a name that is taken.
        """

        def add(entry: E) -> E:
            if name in self._places or self._registered.get(name, entry) is not entry:
                raise InputError(f"{self.kind} {name!r}: there is one already; choose another name")
            self._registered[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def remove(self, name: str) -> None:
        """Take away an entry that `register` added."""
        del self._registered[name]

    def __getitem__(self, name: str) -> T:
        """The entry of a name; `InputError` with the nearest right name where there is none."""
        if name in self._registered:
            return self._registered[name]
        place = self._places.get(name)
        if place is None:
            raise InputError(f"unknown {self.kind} {name!r}{nearest(name, list(self))}")
        return place.load() if isinstance(place, EntryPoint) else _attribute(place)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._registered})

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._registered

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its entry."""
        return ((name, self[name]) for name in self)

    @cached_property
    def _places(self) -> dict[str, str | EntryPoint]:
        return {**{point.name: point for point in entry_points(group=self.group)}, **self._built_in}


def _attribute(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def nearest(name: str, names: list[str]) -> str:
    """The end of a message about a name that is none: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(map(repr, names))}"
