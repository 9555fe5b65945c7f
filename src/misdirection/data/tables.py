"""Parquet and CSV tables: every complaint names the file, and where it can the column or the row.

A table's metadata (`DataFrame.attrs`) is kept: Parquet has a place for it, CSV the file NAME.csv.misdirection.json.
"""

import contextlib
import csv
import io
import json
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from misdirection.errors import InputError, first_line
from misdirection.files import MADE, atomic_output, atomic_path, sha256_file, write_json

LOG = ".eval"
"""The suffix of Inspect's logs, which only tables of answers are read from (`sampling.logs`)."""

_OF = "sha256"
"""The key in a CSV file's metadata that holds the hash of the file."""


def table_suffix(path: Path) -> str:
    """`.parquet` or `.csv`; `InputError` for another one, to be called before the work that fills the table."""
    suffix = path.suffix.lower()
    if suffix == LOG:
        raise InputError(f"{path}: is a log of Inspect: make a table of it (misdirection convert {path} --out TABLE)")
    if suffix not in _READERS:
        raise InputError(f"{path}: a table ends in {' or '.join(_READERS)}; change the name")
    return suffix


def read_table(path: str | Path, columns: Iterable[str] = (), *, texts: Collection[str] = ()) -> pd.DataFrame:
    """Reads a `.parquet` or `.csv` table, its rows numbered from 0.

    Args:
        columns: those that must be there.
        texts: columns that hold texts whatever they look like. Other columns of a CSV file are numbers when all of
            their values are some.

    Raises:
        InputError: another suffix; a file that is missing or damaged; a missing column, or two of one name.
    """
    path = Path(path)
    with _read_errors(path) as suffix:
        table = _READERS[suffix](path, texts)
    require_columns(table, columns, str(path))
    return table


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a `.parquet` or `.csv` table, with None for a missing value; all of a CSV file's are texts.

    Raises `InputError` as `read_table` does.
    """
    path = Path(path)
    with _read_errors(path) as suffix:
        table = _csv_texts(path) if suffix == ".csv" else _parquet(path)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[str]:
    """Gives the table's suffix, and turns errors of reading it into an `InputError`."""
    suffix = table_suffix(path)
    try:
        yield suffix
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the path") from error
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: damaged, or not a {suffix} table ({first_line(error)}); make it again") from error


def write_table(table: pd.DataFrame, path: str | Path, *, output: bool = False) -> None:
    """Writes a `.parquet` or `.csv` table, without its index; whole or not at all.

    In CSV every text is quoted and otherwise left as it is: a NUL is written as the byte 0, which `read_table`, pandas
    and pyarrow read back. An unquoted empty field is a missing value, a quoted one an empty text. Metadata goes along.
    Of an `output`, a file that a user names for a new table, one that is there is replaced only when we wrote it.
    Raises `InputError` for another suffix, for a file in the way, and for values that the format cannot hold.
    """
    path = Path(path)
    suffix = table_suffix(path)
    with (atomic_output if output else atomic_path)(path) as temporary:
        try:
            content = pa.Table.from_pandas(table, preserve_index=False)
            if suffix == ".parquet":
                pyarrow.parquet.write_table(content, temporary, compression="zstd")
            else:
                pyarrow.csv.write_csv(content, temporary)
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise InputError(f"{path}: this table cannot be written as {suffix} ({first_line(error)})") from error
    if suffix == ".csv" and table.attrs:
        write_json(_metadata_file(path), {_OF: sha256_file(path), **table.attrs})


def _metadata_file(path: Path) -> Path:
    return path.with_name(path.name + MADE)


def _metadata(path: Path) -> Mapping[Hashable | None, Any]:
    """What stands beside a CSV file; nothing when it belongs to another state of the file."""
    beside = _metadata_file(path)
    try:
        known = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    is_its_own = isinstance(known, dict) and known.pop(_OF, None) == sha256_file(path)
    return known if is_its_own else {}


def require_columns(table: pd.DataFrame, columns: Iterable[str], name: str = "this table", remedy: str = "") -> None:
    """Raises `InputError` that names the missing columns, if any, those that are there, and the remedy."""
    if missing := [column for column in columns if column not in table]:
        there = ", ".join(map(str, table.columns))
        raise InputError(f"{name}: lacks the column {', '.join(missing)}; it has {there}{remedy and f': {remedy}'}")


def _read_parquet(path: Path, _texts: Collection[str]) -> pd.DataFrame:
    table: pd.DataFrame = _parquet(path).to_pandas()
    return table.reset_index(drop=True)


def _parquet(path: Path) -> pa.Table:
    with path.open("rb") as file:
        return pyarrow.parquet.read_table(file)


def _read_csv(path: Path, texts: Collection[str]) -> pd.DataFrame:
    """All columns as text first: what is a number is decided by column, never by the look of one value."""
    frame: pd.DataFrame = _csv_texts(path).to_pandas()
    for name in set(frame) - set(texts):
        frame[name] = _numbers_or_text(frame[name])
    frame.attrs = _metadata(path)
    return frame


def _csv_texts(path: Path) -> pa.Table:
    data = path.read_bytes()
    header = next(csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")), [])
    if repeated := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{path}: two columns are called {min(repeated)!r}; rename one")
    return pyarrow.csv.read_csv(
        io.BytesIO(data),
        # No text may straddle a block, so that the file is one block.
        pyarrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in header},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _numbers_or_text(column: pd.Series) -> pd.Series:
    """A column of a CSV file as numbers when all of its values are some, and none an identifier like 007."""
    numbers = pd.to_numeric(column, errors="coerce")
    given = column.dropna()
    if numbers.isna().equals(column.isna()) and not given.str.match(r"-?0\d").any():
        return numbers
    return column


_READERS = {".parquet": _read_parquet, ".csv": _read_csv}
TABLES = tuple(_READERS)
"""The suffixes of tables."""
