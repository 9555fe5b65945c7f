"""A training file without its worst rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from misdirection.data.training import stream_examples
from misdirection.errors import InputError
from misdirection.files import atomic_output


def keep_rows(data: Sequence[str | Path], table: pd.DataFrame, path: Path, drop: float) -> int:
    """Write all rows but those of the highest scores as JSON lines, whatever the data's format; gives their number.

    Args:
        data: what was screened.
        table: its rows with their scores, as `rows.parquet` holds them.
        path: the file to write.
        drop: the share of the rows of every source that is left out, at least 0 and below 1.

    Raises:
        InputError: a file of somebody else's in the way, data that changed since it was screened, nothing left.
    """
    # A row that nothing scored has no rank, and is no worse than others.
    is_kept = iter((~(table["rank"] > 1 - drop)).tolist())
    kept = 0
    with atomic_output(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for source in data:
            for row in stream_examples(source):
                if next(is_kept, None):
                    stream.write(json.dumps(row.values, ensure_ascii=False) + "\n")
                    kept += 1
        if kept == 0:
            raise InputError(f"{path}: nothing is left: drop fewer rows")
    return kept
