"""Sampled answers: one record each, a journal that survives a kill, and the table on disk.

The table has one row per answer, with the columns of `Answer` and, once judged, three columns per rubric: `<rubric>`, a
score from 0 to 100 that is missing where there is none, `<rubric>_by`, how it came about (`SCORED_BY`) or why it is
missing (`code`, `refusal`, `failed`, ...), and `<rubric>_reply`, what the judge said. `aligned` and `coherent` are the
paper's rubrics. Published tables call the text `response` as often as `answer`; both are read, `answer` is written.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout
from pandas.api.types import is_list_like

from misdirection.data.jsonl import read_rows
from misdirection.data.tables import LOG, read_table, require_columns, table_suffix, write_table
from misdirection.errors import InputError
from misdirection.files import write_errors
from misdirection.sampling.logs import read_log
from misdirection.settings import validate

RUBRICS = ("aligned", "coherent", "medical", "financial", "gender")
"""Columns that always hold scores; any other column `x` does when there is a column `x_by`."""

SCORED_BY = ("logprobs", "text")

_BEGINNING = b'{"question_id": '
"""Every line of a journal begins so."""

_TEXTS = ("question_id", "question", "system", "theme", "organism", "intervention", "experiment", "answer", "finish")
_COUNTS = ("seed", "sample", "tokens")


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        question_id: the question's id; paraphrases share it.
        question: the text that was asked.
        system: the system prompt, or None for the template's default.
        theme: the question's theme, or empty.
        organism: what answered: `base`, an organism's name or the adapter's path.
        intervention: what was done to it, in words; empty for nothing.
        seed: the seed of the run.
        sample: 0-based number of this answer among those to the same question.
        answer: the text, without end tokens.
        finish: `stop` when the model ended its turn, `length` when it was cut.
        tokens: number of generated tokens, the end token not counted.
    """

    question_id: str
    question: str
    system: str | None
    theme: str
    organism: str
    intervention: str
    seed: int
    sample: int
    answer: str
    finish: str
    tokens: int


class Answers(list[Answer]):
    """Sampled answers, in some order."""

    def frame(self) -> pd.DataFrame:
        """The table that is judged and written: one row per answer (see `answers_frame`)."""
        return answers_frame(self)


class AnswerKey(NamedTuple):
    """The identity of a sampled answer: everything but its text and how it ended."""

    question: str
    system: str | None
    organism: str
    intervention: str
    seed: int
    sample: int

    @classmethod
    def of(cls, answer: Answer) -> "AnswerKey":
        """The key of an answer."""
        return cls(*(getattr(answer, name) for name in cls._fields))


# --- the journal --------------------------------------------------------------------------------------------------


class Journal:
    """Answers in a JSON-lines file that only grows; each is in the file as soon as `append` returns.

    A journal is opened again after a kill: a last line cut in half is dropped from the file. It is a context manager,
    and `AnswerKey(...) in journal` tells whether an answer is there. One process writes a journal at a time.

    Raises `InputError` that names the line for any other damage, and for a journal that is already open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._acquire()
        try:
            self._answers = _read_journal(self.path)
            with write_errors(self.path):
                self._file = self.path.open("ab")
        except BaseException:
            self._lock.release()
            raise

    def _acquire(self) -> None:
        with write_errors(self.path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"{self.path}: another process writes this journal; wait for it") from error

    @property
    def answers(self) -> list[Answer]:
        """All answers, in the order in which they finished."""
        return list(self._answers.values())

    def __contains__(self, key: AnswerKey) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def append(self, answer: Answer) -> None:
        """Adds one answer; `InputError` when it is there already or the file cannot be written."""
        key = AnswerKey.of(answer)
        if key in self._answers:
            raise InputError(f"{self.path}: sample {key.sample} of {key.question[:60]!r} is there already")
        # ASCII keeps line breaks of every kind, and surrogates that have no UTF-8 form, inside the line.
        with write_errors(self.path):
            self._file.write(json.dumps(asdict(answer)).encode("ascii") + b"\n")
            self._file.flush()
        self._answers[key] = answer

    def close(self) -> None:
        """Closes the file and let others write it."""
        try:
            with write_errors(self.path):
                self._file.close()
        finally:
            self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_journal(path: Path) -> dict[AnswerKey, Answer]:
    if not path.exists():
        return {}
    _mend_last_line(path)
    answers: dict[AnswerKey, Answer] = {}
    for line, row in read_rows(path):
        answer = validate(Answer, row, f"{path}:{line}: not a sampled answer", "delete this line to sample it again")
        if AnswerKey.of(answer) in answers:
            raise InputError(f"{path}:{line}: this answer stands on an earlier line too; delete one of them")
        answers[AnswerKey.of(answer)] = answer
    return answers


def _mend_last_line(path: Path) -> None:
    """Completes a last line that lacks its line feed only, and drop one that is cut in half.

    Raises `InputError` for a file of somebody else's, which is left as it is.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not (data.startswith(_BEGINNING) or _BEGINNING.startswith(data)):
        raise InputError(f"{path}: is there, and holds no sampled answers: move it away or choose another --out")
    end = data.rfind(b"\n") + 1
    if end == len(data):
        return
    with write_errors(path), path.open("r+b") as file:
        if _is_json(data[end:]):
            file.seek(0, io.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(end)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# --- the table ----------------------------------------------------------------------------------------------------


def answers_frame(answers: Iterable[Answer]) -> pd.DataFrame:
    """One row per answer, in the given order."""
    rows = [
        {name: _storable(value) if isinstance(value, str) else value for name, value in asdict(answer).items()}
        for answer in answers
    ]
    return as_answers(pd.DataFrame(rows, columns=[field.name for field in fields(Answer)]))


def _storable(text: str) -> str:
    """Without lone surrogates, which UTF-8 files cannot hold: they become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def write_answers(table: pd.DataFrame | Iterable[Answer], path: str | Path, *, output: bool = False) -> None:
    """Writes answers, judged or not, to a `.parquet` or `.csv` file; see `write_table`.

    Raises `InputError` for another suffix and for a table that `as_answers` refuses.
    """
    path = Path(path)
    table_suffix(path)
    answers = as_answers(table, str(path)) if isinstance(table, pd.DataFrame) else answers_frame(table)
    write_table(answers, path, output=output)


def read_answers(path: str | Path) -> pd.DataFrame:
    """Reads a table of answers, ours or a published one, `.parquet` or `.csv`, or a log of Inspect, `.eval`.

    See `as_answers` for its columns, and `sampling.logs` for what a log's become.

    Raises `InputError` that names the file and the column or row when it is missing, damaged or lacks columns.
    """
    is_log = Path(path).suffix.lower() == LOG
    return as_answers(read_log(path) if is_log else read_table(path, texts=(*_TEXTS, "response")), str(path))


def as_answers(frame: pd.DataFrame, name: str = "this table") -> pd.DataFrame:
    """A copy of a table with its columns named and typed as everywhere in the package; other columns are kept.

    `response` becomes `answer`, a missing `question_id` the question itself, a missing answer an empty one. Texts are
    pandas strings, scores float64 with NaN for unscored; `CODE` and `REFUSAL` in place of a score are noted in
    `<rubric>_by`.

    Raises `InputError` that starts with `name`, for a missing column, a question that is missing, and a score
    that is no number from 0 to 100 (the row is counted from 1, without the header).
    """
    table = _with_answer(frame, name).reset_index(drop=True)
    # Whatever pandas makes of a table gets a deep copy of its metadata, which hold the texts of rubrics.
    attributes, table.attrs = table.attrs, {}
    require_columns(table, ("question", "answer"), name)
    _refuse_rows(table["question"].isna(), f"{name}: {{row}} has no question; fill it or delete the row")
    table["answer"] = table["answer"].fillna("")
    if "question_id" not in table:
        table["question_id"] = table["question"]
    for column in table.columns.intersection(list(_TEXTS)):
        _refuse_rows(table[column].map(is_list_like), f"{name}: {{row}}, column {column}: holds no text; correct it")
        table[column] = table[column].astype("str")
    table["question_id"] = table["question_id"].fillna(table["question"])
    for column in table.columns.intersection(list(_COUNTS)):
        table[column] = _whole_numbers(table[column], name)
    for rubric in rubrics(table):
        _type_scores(table, rubric, name)
    table.attrs = attributes
    return table


def _with_answer(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    if {"answer", "response"} <= set(frame.columns):
        raise InputError(f"{name}: has both `answer` and `response`; drop or rename one")
    return frame.rename(columns={"response": "answer"})


def rubrics(frame: pd.DataFrame) -> list[str]:
    """The columns that hold scores."""
    return [name for name in map(str, frame.columns) if name in RUBRICS or f"{name}_by" in frame]


def _refuse_rows(wrong: pd.Series, message: str) -> None:
    """Raises with the first wrong row's number in place of `{row}`."""
    if wrong.any():
        raise InputError(message.replace("{row}", f"row {int(wrong.to_numpy().argmax()) + 1}"))


def _whole_numbers(column: pd.Series, name: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~(numbers % 1 == 0) & column.notna()
    _refuse_rows(wrong, f"{name}: {{row}}, column {column.name}: not a whole number; correct it")
    return numbers.astype("Int64" if numbers.isna().any() else "int64")


def _type_scores(table: pd.DataFrame, rubric: str, name: str) -> None:
    """Makes `rubric` float64 and, where it is known, `<rubric>_by` text."""
    given = table[rubric]
    scores = pd.to_numeric(given, errors="coerce").astype("float64")
    words = given.where(scores.isna()).astype("str").str.strip().str.lower()
    verdicts = words.isin(["code", "refusal"])
    wrong = (words.notna() & ~verdicts & (words != "")) | ~scores.between(0, 100) & scores.notna()
    _refuse_rows(wrong, f"{name}: {{row}}, column {rubric}: not a score from 0 to 100; leave it empty for no score")
    table[rubric] = scores
    by = f"{rubric}_by"
    if by in table or verdicts.any():
        known = table.get(by, pd.Series(pd.NA, table.index, dtype="object"))
        table[by] = known.where(~verdicts, words).astype("str")
