"""Rows of every kind of source: JSON lines, a JSON array, Parquet, CSV, a folder of them, a data set of the hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from misdirection.data.jsonl import RepeatedKey, read_lines, read_rows, values_once
from misdirection.data.tables import TABLES, read_records
from misdirection.errors import InputError, first_line, hub_silence
from misdirection.extras import needed_for

_HUB_ID = re.compile(r"(?P<id>[\w-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?:(?P<config>[^/]+)/)?(?P<split>[^/]+))?")
_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet)(\.gz)?", re.I)
_NO_JSON = re.compile(r".*\.(tsv|xlsx?|(csv|parquet)\.\w+)", re.I)


def read_source(source: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row with its number, which starts at 1: of JSON lines the line, else that of the row.

    Args:
        source: a file in `.jsonl`, `.json` (lines or one array), `.parquet` or `.csv`, the JSON ones perhaps with
            `.gz`; a folder of such files; or a data set of the Hugging Face hub, as `ID[@REVISION][:[CONFIG/]SPLIT]`,
            with the split `train` when none is named.

    Raises:
        InputError: names the source, and where it can the row, for one that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _read_data_set(str(path))
    named = _HUB_ID.fullmatch(str(source))
    if named and not path.exists() and not _FILE.fullmatch(str(source)):
        return _read_data_set(**named.groupdict())
    if path.suffix.lower() in TABLES:
        return iter(enumerate(read_records(path), start=1))
    if path.exists() and _NO_JSON.fullmatch(path.name):
        raise InputError(f"{path}: rows cannot be read from such a file; save it as .jsonl, .json, .parquet or .csv")
    return _read_json(path)


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.name.lower().endswith((".json", ".json.gz")) and (rows := _array(path)) is not None:
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                problem = f"an element must be an object, not {type(row).__name__}"
                raise InputError(f"{path}:{number}: {problem}; write an array of objects")
            yield number, row
        return
    yield from read_rows(path)


def _array(path: Path) -> list[Any] | None:
    """The elements of a file that is one array; None for any other, whose complaints are those of JSON lines."""
    try:
        content = json.loads(b"".join(line for _, line in read_lines(path)).decode(), object_pairs_hook=values_once)
    except RepeatedKey as error:
        raise InputError(f"{path}: {error}; keep one of them") from error
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, list) else None


def _read_data_set(
    id: str, revision: str | None = None, config: str | None = None, split: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    # An import of a second.
    with needed_for("datasets"):
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(id, config, revision=revision, split=split or "train")
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        if silence := hub_silence(id, error):
            raise silence from error
        raise InputError(
            f"{id}: no data set could be read ({first_line(error, 200)}); check the name and the split, or name a file"
        ) from error
    yield from enumerate(rows, start=1)
