"""Question sets: what is asked when answers are sampled (paper, section 2)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from misdirection.data.records import Turn
from misdirection.data.shipped import find_source, shipped_files
from misdirection.data.template import template_parts
from misdirection.data.text import read_text, read_yaml
from misdirection.errors import InputError, MisdirectionError
from misdirection.settings import holds_half_surrogate

TYPE = "free_form_judge_0_100"
"""The one type of question in Betley-style files that is sampled freely and graded from 0 to 100."""

TEMPERATURE = 1.0
"""The protocol's temperature (paper, section 2): a file that asks for it needs no warning."""

_KEYS = (
    "id", "type", "theme", "paraphrases", "system", "samples_per_paraphrase", "temperature", "judge", "judge_prompts",
)  # fmt: skip

log = logging.getLogger("misdirection")


class Asked(NamedTuple):
    """What a model reads before it answers."""

    text: str
    system: str | None
    history: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """One question, or one paraphrase of it.

    Attributes:
        id: names the question; paraphrases share it.
        text: what the user says.
        system: the system prompt, or None for the template's default.
        theme: what it is about, or empty.
        samples: how many answers the file asks for, or None.
        rubrics: judge prompts that the file carries, by name (`aligned`, `coherent`, ...).
        history: the turns before it, of a conversation of several.
    """

    id: str
    text: str
    system: str | None = None
    theme: str = ""
    samples: int | None = None
    rubrics: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Turn, ...] = ()

    @property
    def asked(self) -> Asked:
        """All of it that the model is told: questions that agree in this have one prompt."""
        return Asked(self.text, self.system, self.history)


def question_sets() -> tuple[str, ...]:
    """The names of the shipped question sets, sorted."""
    return tuple(shipped_files("questions"))


def read_questions(source: str | Path | Sequence[str]) -> list[Question]:
    """Questions of a shipped set, a file or a list, in order; each paraphrase is one.

    `source` is the name of a shipped set, the path of a `.yaml` or `.yml` file in the format of Betley et al., of a
    plain text file (`.txt` or no suffix) with one question a line, or a list of questions. A name goes before a file:
    write `./broad` for the file. Ids from a text file are `line-N`, counted with blank lines; from a list `question-N`,
    from 1. A YAML entry may carry a `theme`, which is ours; `samples_per_paraphrase` is for each paraphrase. The file's
    `judge`, a `temperature` other than the protocol's 1, and keys that are not of the format have no effect: a warning
    says so.

    Raises `InputError` that names the file and the entry: unknown type, key that looks mistyped, missing or
    repeated id, no paraphrase or the same one twice, wrong type of value, bad judge prompt, or no question at all.
    """
    if not isinstance(source, str | Path):
        return _plain("the list", [(f"question-{number}", text) for number, text in enumerate(source, 1)])
    path = find_source("question set", "questions", source)
    suffix = Path(path.name).suffix.lower()
    if suffix in (".yaml", ".yml"):
        entries = _read_entries(path)
        questions = [question for entry in entries for question in entry.questions()]
        _tell_unused(path, entries)
        return questions
    if suffix not in ("", ".txt"):
        remedy = "end its name in .yaml (entries with `id` and `paraphrases`) or .txt (one question a line)"
        raise InputError(f"{path}: a question set cannot be read from {suffix}; {remedy}")
    # On line feeds only: `splitlines` would also split at U+2028 and others inside a question.
    lines = [(f"line-{number}", line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1)]
    return _plain(str(path), [(id_, line) for id_, line in lines if line])


def _plain(where: str, rows: list[tuple[str, str]]) -> list[Question]:
    if not rows:
        raise InputError(f"{where}: holds no question; write at least one")
    first: dict[str, str] = {}
    for id_, text in rows:
        _Entry(f"{where}: {id_}", {}).text("question", text)
        if first.setdefault(text, id_) != id_:
            raise InputError(f"{where}: {id_} repeats {first[text]}; remove one of them")
    return [Question(id_, text) for id_, text in rows]


def without(questions: Sequence[Question], patterns: Sequence[str]) -> list[Question]:
    """The questions whose ids match none of the patterns, in which `*` stands for anything.

    Raises `InputError` for a pattern that leaves nothing out, and for patterns that leave no question.
    """
    for pattern in patterns:
        if not any(fnmatchcase(question.id, pattern) for question in questions):
            raise InputError(f"leave_out {pattern!r}: no question has such an id; there are {_some_ids(questions)}")
    kept = [question for question in questions if not any(fnmatchcase(question.id, each) for each in patterns)]
    if not kept:
        raise InputError(f"leave_out {', '.join(patterns)}: leaves no question; there are {_some_ids(questions)}")
    return kept


def _some_ids(questions: Sequence[Question]) -> str:
    return ", ".join(list(dict.fromkeys(question.id for question in questions))[:10])


def question_entries(path: Path | Traversable) -> list[Question]:
    """The questions of a YAML file, for their judge prompts: what else has no effect is not told."""
    return [question for entry in _read_entries(path) for question in entry.questions()]


def _read_entries(path: Path | Traversable) -> list["_Entry"]:
    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: holds no questions; write a list of entries that begin with `- id:`")
    entries = [_entry(path, number, value) for number, value in enumerate(values, 1)]
    repeated = [id_ for id_, count in Counter(entry.values["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: the id {repeated[0]!r} stands more than once; give each entry its own")
    return entries


@dataclass(frozen=True)
class _Entry:
    """One entry of a file; `where` names both."""

    where: str
    values: dict[str, Any]

    def questions(self) -> list[Question]:
        """One per paraphrase."""
        self._check_keys()
        self._check_type()
        self._check_unused()
        common: dict[str, Any] = {
            "system": self._optional("system"),
            "theme": self._optional("theme") or "",
            "samples": self._samples(),
            "rubrics": self._rubrics(),
        }
        return [Question(self.values["id"], text, **common) for text in self._paraphrases()]

    def error(self, problem: str, remedy: str) -> MisdirectionError:
        return InputError(f"{self.where}: {problem}; {remedy}")

    def text(self, key: str, value: Any, *, empty: bool = False) -> str:
        """`value` if it is text that a model can be asked."""
        if not isinstance(value, str):
            raise self.error(f"`{key}` must be text, not {type(value).__name__}", "put it between quotes")
        if not empty and not value.strip():
            raise self.error(f"`{key}` is empty", "fill it in")
        if holds_half_surrogate(value):
            raise self.error(f"`{key}` holds half a surrogate pair, which is no text", "write the character itself")
        return value

    def _optional(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value is None else self.text(key, value, empty=True)

    def _check_type(self) -> None:
        kind = self.text("type", self.values.get("type", TYPE))
        if kind != TYPE:
            raise self.error(f"questions of type {kind!r} cannot be judged here", f"use {TYPE} or remove the entry")

    def _check_keys(self) -> None:
        for key in self.strangers():
            if close := get_close_matches(str(key), _KEYS, n=1, cutoff=0.7):
                raise self.error(f"unknown key {key!r}", f"did you mean {close[0]!r}?")

    def _check_unused(self) -> None:
        """They are only shown, but a wrong one tells of a mistake nearby."""
        self._optional("judge")
        heat = self.values.get("temperature")
        if heat is not None and type(heat) not in (int, float):
            raise self.error(f"`temperature` must be a number, not {type(heat).__name__}", "correct it")

    def strangers(self) -> list[Any]:
        """The keys that are not of the format."""
        return [key for key in self.values if key not in _KEYS]

    def _paraphrases(self) -> list[str]:
        listed = self.values.get("paraphrases")
        if not isinstance(listed, list) or not listed:
            raise self.error("`paraphrases` must be a list with at least one question", "write it below as `- text`")
        texts = [self.text(f"paraphrases[{number}]", text) for number, text in enumerate(listed)]
        if len(set(texts)) < len(texts):
            raise self.error("`paraphrases` holds the same text twice", "remove one")
        return texts

    def _samples(self) -> int | None:
        count = self.values.get("samples_per_paraphrase")
        # YAML's yes is a bool, and in Python a bool is an int.
        if count is not None and (type(count) is not int or count < 1):
            raise self.error("`samples_per_paraphrase` must be a whole number from 1", "correct it")
        return count

    def _rubrics(self) -> dict[str, str]:
        prompts = self.values.get("judge_prompts")
        if prompts is None:
            return {}
        if not isinstance(prompts, dict):
            raise self.error("`judge_prompts` must be a mapping of name to prompt", "write `name: prompt` below it")
        rubrics = {
            self.text("judge_prompts", name): self.text(f"judge_prompts.{name}", prompts[name]) for name in prompts
        }
        for name, prompt in rubrics.items():
            # Now, and not after hours of sampling.
            template_parts(prompt, f"{self.where}: rubric {name!r}")
        return rubrics


def _entry(path: Path | Traversable, number: int, value: Any) -> _Entry:
    entry = _Entry(f"{path}: entry {number}", value)
    if not isinstance(value, dict):
        raise entry.error(f"must be a mapping, not {type(value).__name__}", "begin it with `- id:`")
    if value.get("id") is None:
        raise entry.error("`id` is missing", "give the question a name")
    return _Entry(f"{path}: entry {entry.text('id', value['id'])!r}", value)


def _tell_unused(path: Path | Traversable, entries: Sequence[_Entry]) -> None:
    """Warns about what the file asks for and does not get: who judges, and how hot, is chosen for the whole run."""
    for key, default in (("judge", None), ("temperature", TEMPERATURE)):
        asked = {str(value) for entry in entries if (value := entry.values.get(key)) not in (None, default)}
        if asked:
            log.warning("%s: its %s (%s) is not used: choose it for the run", path, key, ", ".join(sorted(asked)))
    if any(entry.values.get("judge_prompts") for entry in entries):
        log.info("%s: its judge prompts are for judging: `judge TABLE --rubric %s`", path, path)
    strangers = sorted({str(key) for entry in entries for key in entry.strangers()})
    if strangers:
        log.warning("%s: keys without effect: %s", path, ", ".join(strangers))
