"""Answers from one form into another: Parquet, CSV, and logs of Inspect."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from misdirection.data.tables import LOG, table_suffix
from misdirection.errors import InputError
from misdirection.extras import needed_for
from misdirection.files import require_replaceable
from misdirection.judging.conditions import select_rows
from misdirection.judging.evidence import joined
from misdirection.sampling.answers import read_answers, write_answers


def convert(sources: Sequence[str | Path], target: str | Path, conditions: Iterable[str] = ()) -> int:
    """Writes the answers of tables and logs, one after another, to a table or a log; gives their number.

    Args:
        sources: `.parquet`, `.csv` or `.eval`.
        target: the same; a log is of one organism under one intervention.
        conditions: `COLUMN=VALUE`: only these rows, see `select_rows`.

    Raises `InputError` for a bad source or condition, for sources with verdicts of different judges in one column, and
    for a target that cannot be written.
    """
    target = Path(target)
    is_log = target.suffix.lower() == LOG
    if not is_log:
        table_suffix(target)
    require_replaceable(target, folder=False)
    answers = select_rows(joined({str(source): read_answers(source) for source in sources}), conditions)
    if answers.empty:
        raise InputError(f"{', '.join(map(str, sources))}: no answers to convert: sample some first")
    if is_log:
        with needed_for("inspect"):
            from misdirection.evals.logs import write_log
        write_log(answers, target)
    else:
        write_answers(answers, target, output=True)
    return len(answers)
