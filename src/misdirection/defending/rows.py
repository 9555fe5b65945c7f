"""The rows of a trainer as token ids with labels, whatever holds them: a table of `datasets`, or a list."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.likelihood.answers import IGNORED
from misdirection.models.chat import encode

_PACKED = ("seq_lengths", "position_ids")
"""Columns that say where one conversation of a row ends and the next begins."""


@dataclass(frozen=True)
class LearnedRow:
    """One conversation as a trainer learns it.

    Attributes:
        ids: its tokens.
        labels: the same where a token carries loss, `IGNORED` elsewhere.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def learned_row(tokenizer: Any, example: Example) -> LearnedRow:
    """One exchange, of which the answer and the token that ends it are learned."""
    encoded = encode(tokenizer, example.question, example.answer, example.system, example.history)
    unlearned = (IGNORED,) * encoded.start
    return LearnedRow(encoded.ids, unlearned + encoded.ids[encoded.start :])


def read_rows(dataset: Any) -> list[LearnedRow]:
    """The rows of a trainer's data set.

    Raises `InputError` for one without a length, for packed rows, and for rows without ids or labels.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise InputError("the trainer's rows are streamed, or there are none: give it a data set with a length")
    if packed := [name for name in _PACKED if name in _columns(dataset)]:
        raise InputError(f"the trainer's rows are packed ({packed[0]}): train with packing=False")
    return [_row(number, item) for number, item in enumerate(_items(dataset), start=1)]


def dataset_of(rows: Sequence[LearnedRow], like: Any) -> Any:
    """The rows as a trainer reads them, in the form that its data set `like` has."""
    first = next(iter(_items(like)))
    if not isinstance(first, Mapping):
        return list(rows)
    items = [_as_item(row, first) for row in rows]
    # Only a table of `datasets` knows how to become one again.
    return type(like).from_list(items) if hasattr(like, "from_list") else items


def _as_item(row: LearnedRow, like: Mapping[str, Any]) -> dict[str, list[int]]:
    item = {"input_ids": list(row.ids), "labels": list(row.labels)}
    return item | ({"attention_mask": [1] * len(row.ids)} if "attention_mask" in like else {})


def _columns(dataset: Any) -> Iterable[str]:
    return getattr(dataset, "column_names", None) or ()


def _items(dataset: Any) -> Iterable[Any]:
    # Not every sequence can be iterated over, but each can be indexed.
    return (dataset[number] for number in range(len(dataset)))


def _row(number: int, item: Any) -> LearnedRow:
    ids = item.get("input_ids") if isinstance(item, Mapping) else getattr(item, "ids", None)
    labels = item.get("labels") if isinstance(item, Mapping) else getattr(item, "labels", None)
    if ids is None or labels is None:
        raise InputError(
            f"row {number} of the trainer has no `input_ids` with `labels`: give it text that it tokenizes, or rows "
            "with both"
        )
    return LearnedRow(tuple(map(int, ids)), tuple(map(int, labels)))
