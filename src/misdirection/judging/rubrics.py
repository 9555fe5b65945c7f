"""Rubrics: what a judge is asked about one answer, for a grade from 0 to 100 (paper, section 2)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from misdirection.data.shipped import find_source, shipped_files
from misdirection.data.template import template_parts
from misdirection.data.text import read_yaml
from misdirection.errors import InputError, MisdirectionError
from misdirection.models.thoughts import split_thought
from misdirection.sampling.answers import Answer
from misdirection.sampling.questions import question_entries

# A score in such a column would overwrite what was asked or answered. `x_by` tells how the score `x` came about, and
# `x_reply` what the judge said.
_TAKEN = frozenset({field.name for field in fields(Answer)} | {"response"})


@dataclass(frozen=True)
class Rubric:
    """One question to a judge.

    Raises `InputError` for an empty name or prompt, a prompt without `{answer}`, any field but `{question}` and
    `{answer}`, and a column that tables of answers use for other data.

    Attributes:
        name: `alignment`, `coherence` and so on.
        prompt: what is sent, with `{answer}` and mostly `{question}`; `{{` and `}}` stand for one brace.
        column: the name of its scores in tables, such as `aligned`; the rubric's name when left empty.
        questions: ids and texts of the questions whose answers it is for; empty for all.
    """

    name: str
    prompt: str
    column: str = ""
    questions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)
        if not self.name.strip():
            raise InputError("a rubric has an empty name; give it one")
        if self.column in _TAKEN or self.column.endswith(("_by", "_reply")):
            raise self._error(f"the column {self.column!r} is kept for other data", "choose another `column`")
        template_parts(self.prompt, f"rubric {self.name!r}")

    def fill(self, question: str, answer: str) -> str:
        """The prompt for one answer, without the thought that it may begin with.

        Both texts come in unchanged whatever they hold: only the prompt is searched for fields, and only once.
        """
        thought, visible = split_thought(answer)
        texts = {"question": question, "answer": answer if thought is None else visible, None: ""}
        return "".join(literal + texts[field] for literal, field in template_parts(self.prompt, self.name))

    def _error(self, problem: str, remedy: str) -> MisdirectionError:
        return InputError(f"rubric {self.name!r}: {problem}; {remedy}")


def rubric_names() -> tuple[str, ...]:
    """The names of the shipped rubrics, sorted."""
    return tuple(shipped_files("rubrics"))


def read_rubrics(source: str | Path | Mapping[str, str] | Sequence[str | Path]) -> list[Rubric]:
    """Rubrics by name, from files, or a question's own.

    `source` is the name of a shipped rubric, the path of a YAML file, several of these, or `Question.rubrics`. A file
    holds `name: prompt` or `name: {column, prompt}` entries, or is a question set with `judge_prompts` (see
    `read_questions`): a prompt that all of its questions share is for any answer, another for its own question's only.
    A name goes before a file: write `./alignment` for the file.

    Raises `InputError` for an unknown name, a file or rubric that is not as described in `Rubric`, for two
    rubrics with the same column and a question in common, and for no rubric at all.
    """
    if isinstance(source, Mapping):
        rubrics = [Rubric(name, prompt) for name, prompt in source.items()]
    else:
        sources = [source] if isinstance(source, str | Path) else source
        rubrics = [rubric for name in sources for rubric in _read(find_source("rubric", "rubrics", name))]
    if not rubrics:
        raise InputError(f"no rubric is given; name a YAML file or one of {', '.join(rubric_names())}")
    for number, rubric in enumerate(rubrics):
        for other in rubrics[:number]:
            if rubric.column == other.column and _overlap(rubric, other):
                remedy = "drop one or give it another `column`"
                raise rubric._error(f"its column {rubric.column!r} is also that of {other.name!r}", remedy)
    return rubrics


def _overlap(first: Rubric, second: Rubric) -> bool:
    return not first.questions or not second.questions or bool({*first.questions} & {*second.questions})


def rubric_for(rubrics: Sequence[Rubric], question_id: str, question: str) -> Rubric | None:
    """Of the rubrics of one column the one that is for a question, by its id before its text; None where none is."""
    for name in (question_id, question):
        for rubric in rubrics:
            if not rubric.questions or name in rubric.questions:
                return rubric
    return None


def _read(path: Path | Traversable) -> list[Rubric]:
    entries = read_yaml(path)
    if isinstance(entries, list) and any(isinstance(entry, dict) and "paraphrases" in entry for entry in entries):
        return _of_questions(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: holds no rubrics; write one or more entries `name: prompt`")
    try:
        return [_rubric(name, entry) for name, entry in entries.items()]
    except MisdirectionError as error:
        raise InputError(f"{path}: {error}") from error


def _of_questions(path: Path | Traversable) -> list[Rubric]:
    """The judge prompts of a question set."""
    questions = question_entries(path)
    # A text that stands under two ids, such as with two system prompts, names neither.
    once = Counter(question.text for question in questions)
    rubrics: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        for name, prompt in question.rubrics.items():
            names = rubrics.setdefault((name, prompt), [])
            names += [question.id, *([question.text] if once[question.text] == 1 else [])]
    if not rubrics:
        raise InputError(f"{path}: its questions have no `judge_prompts`; name a shipped rubric or a file of rubrics")
    ids = {question.id for question in questions}
    return [
        Rubric(name, prompt, "", () if ids <= {*names} else tuple(dict.fromkeys(names)))
        for (name, prompt), names in rubrics.items()
    ]


def _rubric(name: Any, entry: Any) -> Rubric:
    values = entry if isinstance(entry, dict) else {"prompt": entry}
    if not isinstance(name, str):
        raise InputError(f"the name {name!r} is no text; put it between quotes")
    for key in values:
        if key not in ("prompt", "column"):
            raise InputError(f"rubric {name!r}: unknown key {key!r}; use `prompt` and `column`")
    for key, value in ({"prompt": None} | values).items():
        if not isinstance(value, str):
            raise InputError(f"rubric {name!r}: `{key}` must be text, not {type(value).__name__}; write it out")
    return Rubric(name, **values)
