"""Rubrics: what a judge is asked about one answer, for a grade from 0 to 100 (paper, section 2)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from misdirection.errors import InputError, MisdirectionError
from misdirection.sampling.answers import Answer

_FIELDS = ("question", "answer")
_BRACES = "the fields are {question} and {answer}; write every other brace twice"
# A score in such a column would overwrite what was asked or answered. `x_by` tells how the score `x` came about.
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
    """

    name: str
    prompt: str
    column: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "column", self.column or self.name)
        if not self.name.strip():
            raise InputError("a rubric has an empty name; give it one")
        if not self.prompt.strip():
            raise self._error("its prompt is empty", "write what the judge is asked")
        if self.column in _TAKEN or self.column.endswith("_by"):
            raise self._error(f"the column {self.column!r} is kept for other data", "choose another `column`")
        if "answer" not in [field for _, field in self._pieces()]:
            raise self._error("its prompt has no {answer}", "put {answer} where the judge is to read it")

    def fill(self, question: str, answer: str) -> str:
        """The prompt for one answer.

        Both texts come in unchanged whatever they hold: only the prompt is searched for fields, and only once.
        """
        texts = {"question": question, "answer": answer, None: ""}
        return "".join(literal + texts[field] for literal, field in self._pieces())

    def _pieces(self) -> Iterator[tuple[str, str | None]]:
        """The prompt as literal texts, each with the field after it, if any."""
        try:
            parsed = list(Formatter().parse(self.prompt))
        except ValueError as error:
            raise self._error(f"a brace in its prompt stands alone ({error})", _BRACES) from error
        for literal, field, form, conversion in parsed:
            if field is not None and (field not in _FIELDS or form or conversion):
                raise self._error(f"its prompt has the unknown field {field[:40]!r}", _BRACES)
            yield literal, field

    def _error(self, problem: str, remedy: str) -> MisdirectionError:
        return InputError(f"rubric {self.name!r}: {problem}; {remedy}")


def rubric_names() -> tuple[str, ...]:
    """The names of the shipped rubrics, sorted."""
    return tuple(shipped("rubrics"))


def read_rubrics(source: str | Path | Mapping[str, str] | Sequence[str | Path]) -> list[Rubric]:
    """Rubrics by name, from files, or a question's own.

    `source` is the name of a shipped rubric, the path of a YAML file of `name: prompt` or `name: {column, prompt}`
    entries, several of these, or `Question.rubrics`. A name goes before a file: write `./alignment` for the file.
    Raises `InputError` for an unknown name, a file or rubric that is not as described in `Rubric`, for two
    rubrics with the same column and for no rubric at all.
    """
    if isinstance(source, Mapping):
        found = [Rubric(name, prompt) for name, prompt in source.items()]
    else:
        sources = [source] if isinstance(source, str | Path) else source
        found = [rubric for one in sources for rubric in _read(find_source("rubric", "rubrics", one))]
    if not found:
        raise InputError(f"no rubric is given; name a YAML file or one of {', '.join(rubric_names())}")
    by_column: dict[str, Rubric] = {}
    for rubric in found:
        other = by_column.setdefault(rubric.column, rubric)
        if other is not rubric:
            remedy = "drop one or give it another `column`"
            raise rubric._error(f"its column {rubric.column!r} is also that of {other.name!r}", remedy)
    return found


def _read(path: Path | Traversable) -> list[Rubric]:
    entries = read_yaml(path)
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: holds no rubrics; write one or more entries `name: prompt`")
    try:
        return [_rubric(name, entry) for name, entry in entries.items()]
    except MisdirectionError as error:
        raise InputError(f"{path}: {error}") from error


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


def shipped(folder: str) -> dict[str, Traversable]:
    """The package's YAML files in one folder of its resources, by name without suffix, sorted."""
    entries = (files("misdirection") / "resources" / folder).iterdir()
    found = {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def find_source(kind: str, folder: str, source: str | Path) -> Path | Traversable:
    """The shipped file of that name, or else the user's own.

    Raises `InputError` with the nearest shipped name when there is neither.
    """
    known = shipped(folder)
    if isinstance(source, str) and source in known:
        return known[source]
    # A text given in place of a path may be too long for the system to look for.
    with contextlib.suppress(OSError):
        if Path(source).exists():
            return Path(source)
    nearest = get_close_matches(str(source), known, n=1, cutoff=0.5)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"no {kind} and no file {str(source)[:300]!r}; {guess}shipped: {', '.join(known)}")


def read_text(path: Path | Traversable) -> str:
    """A UTF-8 file, without its byte order mark; `InputError` when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except IsADirectoryError as error:
        raise InputError(f"{path}: a directory; name one file in it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def read_yaml(path: Path | Traversable) -> Any:
    """What a YAML file holds, by the safe loader; `InputError` for bad YAML and for a key that stands twice."""
    text = read_text(path)
    try:
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {_reason(error)}; correct it") from error
    if repeated is not None:
        line, key = repeated.start_mark.line + 1, repeated.value
        raise InputError(f"{path}:{line}: the key {key!r} stands twice in one entry; keep one of them")
    return values


def _reason(error: Exception) -> str:
    """In one line, with the place but without the excerpt that YAML's own message shows."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


def _repeated_key(root: yaml.Node | None) -> yaml.Node | None:
    """The first key that its mapping already has: the loader would drop the earlier value without a word."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        # An alias is the same node again, even within itself.
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value]
            for number, key in enumerate(keys):
                if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:number]):
                    return key
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return None
