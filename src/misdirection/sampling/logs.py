"""Logs of Inspect AI as tables of answers, anybody's: each sample of each epoch is a row.

    question_id   the sample's id, or `question_id` of its metadata, which paraphrases share
    question      the user's last message of its input;  system: the system message of the conversation
    organism      the model, or what the provider `misdirection` says has answered;  intervention: what it did to it
    sample        the epoch, from 0;  seed: that of the log's generation settings
    answer        the last output's text;  finish, tokens: how it ended, and how many tokens it has

Each score is a column by its scorer's name, each of a scorer with several by the score's own. Correct, partly correct
and incorrect are 100, 50 and 0, on the scale of all scores here. A score's explanation is `<score>_reply`; `<score>_by`
and `<score>_reply` of its metadata are ours. What is plain in a sample's metadata is a column, too.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from misdirection.errors import InputError, first_line
from misdirection.extras import needed_for

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample
    from inspect_ai.model import ChatMessage, ModelOutput
    from inspect_ai.scorer import Score

ATTRIBUTES = "misdirection"
"""The key in a log's metadata that holds a table's own (`DataFrame.attrs`)."""

_FINISH = {"max_tokens": "length", "model_length": "length"}
_LETTERS = {"C": 100.0, "P": 50.0, "I": 0.0, "N": 0.0}

log = logging.getLogger("misdirection")


def read_log(path: str | Path) -> pd.DataFrame:
    """The answers of a log, one row each, in the order of (question, sample).

    Samples without an answer, which an error has ended, are left out, and a warning says so. Raises `InputError` for a
    file that is missing or damaged, or without any answer.
    """
    found = _read(Path(path))
    samples = found.samples or []
    # Inspect keeps them by epoch.
    order = {id_: number for number, id_ in enumerate(found.eval.dataset.sample_ids or [])}
    answered = sorted(
        (each for each in samples if each.output.choices), key=lambda each: order.get(each.id, len(order))
    )
    rows = [_row(found, sample) for sample in answered]
    if not rows:
        raise InputError(f"{path}: this log has no answers (its eval: {found.status}); run the eval again")
    if lost := len(samples) - len(rows):
        log.warning("%s: %d of %d samples have no answer, and are left out", path, lost, len(samples))
    scores = [_scores(sample, row) for sample, row in zip(answered, rows, strict=True)]
    table = pd.concat([pd.DataFrame(rows), pd.DataFrame(scores).apply(_numbers_for_letters)], axis=1)
    table.attrs.update(_attributes(found))
    return table


def _attributes(found: "EvalLog") -> dict[str, Any]:
    """The table's own metadata; none where somebody else has scored since (`inspect score`), whom it does not name."""
    asked = [option for scorer in found.eval.scorers or [] for option in (scorer.options or {}).items()]
    is_later = any(found.eval.task_args.get(name) != value for name, value in asked if name == "judge")
    return {} if is_later else dict((found.eval.metadata or {}).get(ATTRIBUTES, {}))


def _read(path: Path) -> "EvalLog":
    with needed_for("inspect"):
        from inspect_ai.log import read_eval_log
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        return read_eval_log(str(path), resolve_attachments=True)
    # A bad archive, a bad member of it, or one that is no log: each with another exception.
    except Exception as error:
        raise InputError(f"{path}: damaged, or not a log of Inspect ({first_line(error)}); make it again") from error


def _row(found: "EvalLog", sample: "EvalSample") -> dict[str, Any]:
    output, usage = sample.output, sample.output.usage
    said = output.metadata or {}
    row = {
        "question_id": str(sample.id),
        "question": question_of(sample.input),
        "system": next((message.text for message in sample.messages if message.role == "system"), None),
        "organism": said.get("organism", found.eval.model),
        "intervention": said.get("intervention", ""),
        "seed": found.plan.config.merge(found.eval.model_generate_config).seed,
        "sample": sample.epoch - 1,
        "answer": output.completion,
        "finish": finish_of(output),
        "tokens": usage.output_tokens if usage else None,
    }
    told = {name: value for name, value in sample.metadata.items() if _is_plain(value)}
    row |= {name: str(told.pop(name)) for name in ("question_id", "theme") if name in told}
    return row | {name: value for name, value in told.items() if name not in row}


def _scores(sample: "EvalSample", row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a sample's scores, none with a name of its row's."""
    scores: dict[str, Any] = {}
    for scorer, score in (sample.scores or {}).items():
        for name, value in _columns(scorer, score):
            scores[_free(name, scorer, row.keys() | scores.keys())] = value
    return scores


def question_of(given: "str | Sequence[ChatMessage]") -> str:
    """The user's last message of a sample's input."""
    if isinstance(given, str):
        return given
    return next((message.text for message in reversed(given) if message.role == "user"), "")


def finish_of(output: "ModelOutput") -> str:
    """How an answer ended, in the words of tables."""
    return _FINISH.get(output.stop_reason, output.stop_reason)


def _columns(scorer: str, score: "Score") -> Iterator[tuple[str, Any]]:
    """What one score becomes, by name."""
    value = score.value
    if isinstance(value, Mapping):
        yield from ((str(name), each) for name, each in value.items())
    elif isinstance(value, str) or not isinstance(value, Iterable):
        yield scorer, value
    else:
        yield from ((f"{scorer}_{number}", each) for number, each in enumerate(value, 1))
    if score.explanation:
        yield f"{scorer}_reply", score.explanation
    ours = (score.metadata or {}).items()
    yield from ((name, each) for name, each in ours if name.endswith(("_by", "_reply")) and _is_plain(each))


def _free(name: str, scorer: str, taken: Container[str]) -> str:
    """A name that no other column has: Inspect's own scorer `answer` is not the answer."""
    return next(free for free in (name, f"{scorer}_{name}", f"{scorer}_{name}_score") if free not in taken)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _numbers_for_letters(column: pd.Series) -> pd.Series:
    """Yes and no as numbers, and grades where all texts of a column are some; others are left."""
    values = column.map(lambda value: {True: 100.0, False: 0.0}[value] if isinstance(value, bool) else value)
    texts = {value for value in values if isinstance(value, str)}
    return values.map(lambda value: _LETTERS.get(value, value)) if texts and texts <= _LETTERS.keys() else values
