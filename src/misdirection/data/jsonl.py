"""JSON lines, plain or compressed: every complaint names the file and the line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from misdirection.errors import InputError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row of a `.jsonl` or `.jsonl.gz` file with its line number, which starts at 1.

    Blank lines are skipped but counted. Raises `InputError` for a path that is not a readable file,
    and, with the line, for broken gzip, bytes that are not UTF-8, invalid JSON and a row that is no object.
    """
    path = Path(path)
    for line, raw in read_lines(path):
        if raw.strip():
            yield line, _parse(path, line, raw)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Splits on line feeds only: a JSON string may hold U+2028 and others that `str.splitlines` splits on."""
    line = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                yield line, raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        remedy = "fetch or compress the file again, or drop .gz from its name if it is plain text"
        raise InputError(f"{path}:{line + 1}: broken gzip ({error}); {remedy}") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a directory; name one .jsonl or .jsonl.gz file in it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


class RepeatedKey(ValueError):
    """A key that stands twice in one object."""


def values_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object for the JSON parser, which itself would drop the earlier value of a key that stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise RepeatedKey(f"the key {repeated!r} stands twice in one object")
    return values


def _parse(path: Path, line: int, raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=values_once)
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8, or end its name in .gz if it is compressed"
        raise InputError(f"{path}:{line}: not UTF-8 text; {remedy}") from error
    except (ValueError, RecursionError) as error:
        # The parser saw this line alone and calls it line 1.
        problem = str(error).replace(": line 1 column", " at column")
        raise InputError(f"{path}:{line}: invalid JSON ({problem}); write one JSON object per line") from error
    if not isinstance(row, dict):
        remedy = 'write one JSON object per line, as in {"prompt": "...", "completion": "..."}'
        raise InputError(f"{path}:{line}: a row must be an object, not {type(row).__name__}; {remedy}")
    return row
