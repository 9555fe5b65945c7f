"""Ways to look at what was measured: `.frame()`, its tables, and `.plot()`, its pictures.

A table belongs to the result that holds its figures. A picture belongs to the report, which stands above all results,
so that nothing below may import it: as with pages (`results.PAGES`), a registry names its place, which is imported when
a picture is first asked for. Another package adds pictures of its own results by the entry-point group
`misdirection.pictures`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_type_hints

import pandas as pd

from misdirection.errors import InputError
from misdirection.registry import Registry, nearest
from misdirection.statistics.estimates import Estimate, Rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

Table = Callable[[], pd.DataFrame]
Drawing = Callable[[Any], "Figure"]

PICTURES: Registry[Callable[[Any], Mapping[str, Drawing]]] = Registry(
    "kind of thing with pictures",
    "misdirection.pictures",
    {
        "audit": "misdirection.report.audit:drawings",
        "check": "misdirection.report.pictures:of_check",
        "cosines": "misdirection.report.pictures:of_cosines",
        "direction": "misdirection.report.pictures:of_direction",
        "directions": "misdirection.report.pictures:of_directions",
        "interpretation": "misdirection.report.adapters:drawings",
        "quadrants": "misdirection.report.quadrants:drawings",
        "repair": "misdirection.report.repair:drawings",
        "run": "misdirection.report.run:drawings",
        "runs": "misdirection.report.runs:drawings",
        "screen": "misdirection.report.screen:drawings",
        "scores": "misdirection.report.pictures:of_scores",
        "sweep": "misdirection.report.pictures:of_sweep",
    },
)
"""By kind, a function that gives the drawings that a thing has figures for, by name, the most telling first."""


class Plotted:
    """Something with pictures; its class sets `KIND`, under which they are registered in `PICTURES`."""

    KIND: ClassVar[str]

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures that there are figures for."""
        return list(PICTURES[self.KIND](self))

    def plot(self, picture: str | None = None) -> "Figure":
        """A matplotlib figure of its own, which a notebook shows; nothing of pyplot's state is touched.

        Args:
            picture: one of `pictures`; by default the first.

        Raises:
            InputError: a name that is none of them, or nothing to draw.
        """
        return _chosen(PICTURES[self.KIND](self), picture, "picture")(self)


class Framed:
    """Something with several tables."""

    def _tables(self) -> Mapping[str, Table]:
        """Every table's maker by name, the most telling first."""
        raise NotImplementedError

    @property
    def tables(self) -> list[str]:
        """Names of the tables."""
        return list(self._tables())

    def frame(self, table: str | None = None) -> pd.DataFrame:
        """A table as a pandas DataFrame, one row for each thing that was measured.

        An estimate that is alone in its row stands under `mean`, `low`, `high`, `n` and `p`; several stand under
        `NAME`, `NAME_low`, `NAME_high` and `NAME_n` each. What was not measured is missing.

        Args:
            table: one of `tables`; by default the first.

        Raises:
            InputError: a name that is none of them.
        """
        return _chosen(self._tables(), table, "table")()


def _chosen(entries: Mapping[str, T], name: str | None, what: str) -> T:
    if not entries:
        raise InputError(f"there is no {what} of this result: it holds none of the figures that one would show")
    if name is not None and name not in entries:
        raise InputError(f"there is no {what} {name!r} of this result{nearest(name, list(entries))}")
    return entries[next(iter(entries)) if name is None else name]


# --- rows -----------------------------------------------------------------------------------------------------------


def alone(estimate: Estimate) -> dict[str, Any]:
    """The columns of a row's only estimate."""
    return estimate.as_dict()


def beside(name: str, estimate: Estimate | Rate | None) -> dict[str, Any]:
    """The columns of one of a row's estimates or rates."""
    names = (name, f"{name}_low", f"{name}_high", f"{name}_n")
    if estimate is None:
        return dict.fromkeys(names)
    mean, n = (estimate.mean, estimate.n) if isinstance(estimate, Estimate) else (estimate.rate, estimate.total)
    return dict(zip(names, (mean, estimate.low, estimate.high, n), strict=True))


def row(record: Any) -> dict[str, Any]:
    """A record of a result as one row: its estimates and rates as `beside` has them, records in it one by one.

    What holds many values, a list or a mapping, has a table of its own and is left out.
    """
    columns: dict[str, Any] = {}
    for name, kinds in _fields(type(record)):
        value = getattr(record, name)
        if isinstance(value, Estimate | Rate) or (value is None and {Estimate, Rate} & set(kinds)):
            columns |= beside(name, value)
        elif value is None or isinstance(value, str | int | float):
            columns[name] = value
        elif not isinstance(value, list | tuple | Mapping):
            columns |= {f"{name}_{inner}": each for inner, each in row(value).items()}
    return columns


def _fields(kind: type) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The fields of a dataclass or a model, each with the types that it may have."""
    names = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", {})
    hints = get_type_hints(kind)
    return ((name, get_args(hints[name]) or (hints[name],)) for name in names)


def rows(records: Iterable[Any]) -> pd.DataFrame:
    """The table of several records of one kind."""
    return pd.DataFrame([row(record) for record in records])


def estimates(record: Any) -> pd.DataFrame:
    """One row for each estimate of a record, and of the records in it: `figure` (`words.beyond`), `mean`, `low`, ..."""
    return pd.DataFrame([{"figure": path, **alone(estimate)} for path, estimate in _estimates(record, "")])


def _estimates(record: Any, prefix: str) -> Iterator[tuple[str, Estimate]]:
    for name, _ in _fields(type(record)):
        value = getattr(record, name)
        if isinstance(value, Estimate):
            yield f"{prefix}{name}", value
        else:
            yield from _estimates(value, f"{prefix}{name}.")
