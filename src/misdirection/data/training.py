"""Training files in the common chat formats, and files of probe pairs."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from misdirection.data.jsonl import read_rows
from misdirection.data.records import Example, ProbePair
from misdirection.errors import InputError, MisdirectionError

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_FORMATS = "use `messages`, `conversations`, or `prompt` with `completion`"


@dataclass(frozen=True)
class _Turn:
    """One turn of a chat; `key` is where its text stands in the row, as in `messages[1].content`."""

    role: Role
    text: str
    key: str


@dataclass(frozen=True)
class _Row:
    """One row with its line in a file."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, key: str, problem: str, remedy: str) -> MisdirectionError:
        return InputError(f"{self.path}:{self.line}: `{key}` {problem}; {remedy}")

    def required(self, key: str) -> str:
        if self.values.get(key) is None:
            raise self.error(key, "is missing", "add it as a string")
        return self.filled(key, self.text(key, self.values[key]))

    def optional(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value is None else self.text(key, value)

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {type(value).__name__}", "write it as one string")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(key, "holds half a surrogate pair, which is no text", "remove the stray \\ud... escape")
        return value

    def filled(self, key: str, value: str) -> str:
        if not value.strip():
            raise self.error(key, "is empty", "fill it in or remove the row")
        return value


def read_examples(path: str | Path) -> list[Example]:
    """Reads a `.jsonl` or `.jsonl.gz` training file, one single-turn exchange per row.

    Each row may have its own format:

    - `messages`: `{"role", "content"}` for an optional system turn, one user turn and one assistant turn;
    - `conversations`: the same as ShareGPT's `{"from", "value"}`, with `human` and `gpt`;
    - `prompt` and `completion`: two strings, or two lists of messages.

    A string under the row's own `system` key, unless blank, is its system turn. Raises `InputError`,
    with the line and the key, for any other row, an empty question or answer and more than one exchange; and
    for a file without rows.
    """
    path = Path(path)
    examples = [_example(_Row(path, line, values)) for line, values in read_rows(path)]
    if not examples:
        raise InputError(f"{path}: no rows; {_FORMATS}, one row per line")
    return examples


def read_pairs(path: str | Path) -> list[ProbePair]:
    """Reads a `.jsonl` or `.jsonl.gz` file of probe pairs.

    Rows hold `question`, `aligned` and `misaligned`, and may hold `id` (else `line-N`), `theme`, `system` and `format`.
    Raises `InputError`, with the line and the key, for a missing or empty text and a repeated id; and
    for a file without rows.
    """
    return _pairs(Path(path), read_rows(path))


def holds_pairs(path: str | Path) -> bool:
    """Whether a file holds probe pairs, by its first row; else it is a training file, or none that can be read."""
    _, first = next(iter(read_rows(Path(path))), (0, {}))
    return "misaligned" in first


def write_pairs(path: str | Path, pairs: Sequence[ProbePair]) -> None:
    """Writes probe pairs so that `read_pairs` returns them unchanged; compressed when the name ends in `.gz`.

    Raises `InputError`, before anything is written, for pairs that `read_pairs` would refuse; and for
    a path that cannot be written.
    """
    path = Path(path)
    rows = [{key: value for key, value in asdict(pair).items() if value is not None} for pair in pairs]
    _pairs(path, enumerate(rows, start=1))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); check its folder") from error


def data_hash(rows: Sequence[Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of rows that are dataclasses: of rows and order, not of their file."""
    canonical = json.dumps([asdict(row) for row in rows], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _example(row: _Row) -> Example:
    turns = _turns(row)
    _check_order(row, turns)
    question, answer = (row.filled(turn.key, turn.text) for turn in turns[-2:])
    return Example(question, answer, _system(row, turns[:-2]))


def _turns(row: _Row) -> list[_Turn]:
    for key in ("messages", "conversations"):
        if key in row.values:
            return _messages(row, key)
    if "prompt" not in row.values:
        keys = ", ".join(map(repr, row.values)) or "none"
        raise InputError(f"{row.path}:{row.line}: unknown format (keys: {keys}); {_FORMATS}")
    if row.values.get("completion") is None:
        raise row.error("completion", "is missing: the row has no answer", "add the answer or remove the row")
    return _side(row, "prompt", "user") + _side(row, "completion", "assistant")


def _side(row: _Row, key: str, role: Role) -> list[_Turn]:
    """The turns of a prompt or a completion, which TRL allows as a string or as messages."""
    value = row.values[key]
    return _messages(row, key) if isinstance(value, list) else [_Turn(role, row.text(key, value), key)]


def _messages(row: _Row, key: str) -> list[_Turn]:
    value = row.values[key]
    if not isinstance(value, list):
        raise row.error(key, f"must be a list, not {type(value).__name__}", "write a list of messages")
    return [_turn(row, f"{key}[{index}]", message) for index, message in enumerate(value)]


def _turn(row: _Row, key: str, message: Any) -> _Turn:
    if not isinstance(message, dict):
        problem = f"must be an object, not {type(message).__name__}"
        raise row.error(key, problem, "write it with `role` and `content`")
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    name = _field(row, key, message, role_key)
    if name not in _ROLES:
        problem = f"is {name[:40]!r}, an unknown role"
        raise row.error(f"{key}.{role_key}", problem, f"use one of {', '.join(_ROLES)}")
    return _Turn(_ROLES[name], _field(row, key, message, text_key), f"{key}.{text_key}")


def _field(row: _Row, key: str, message: dict[str, Any], name: str) -> str:
    if message.get(name) is None:
        raise row.error(f"{key}.{name}", "is missing", "add it as a string")
    return row.text(f"{key}.{name}", message[name])


def _check_order(row: _Row, turns: list[_Turn]) -> None:
    """Refuses anything but one user turn and one assistant turn, with at most one system turn before them."""
    key = next(key for key in ("messages", "conversations", "prompt") if key in row.values)
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        raise row.error(key, "has no question", "add a user turn or remove the row")
    if "assistant" not in roles:
        raise row.error(key, "has no answer", "add an assistant turn or remove the row")
    if roles.count("user") > 1 or roles.count("assistant") > 1:
        problem = f"has {len(turns)} turns, and multi-turn chats are not supported"
        raise row.error(key, problem, "keep one user turn and one assistant turn per row")
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        problem = f"has its turns in the order {', '.join(roles)}"
        raise row.error(key, problem, "write at most one system turn, then the user's, then the assistant's")


def _system(row: _Row, before: list[_Turn]) -> str | None:
    own = row.optional("system")
    if own is None or not own.strip():
        return before[0].text if before else None
    if before:
        raise row.error("system", "comes on top of a system turn", "keep one of the two")
    return own


def _pairs(path: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[ProbePair]:
    first_lines: dict[str, int] = {}
    pairs = []
    for line, values in rows:
        row = _Row(path, line, values)
        pair = _pair(row)
        if pair.id in first_lines:
            problem = f"is {pair.id!r}, as on line {first_lines[pair.id]}"
            raise row.error("id", problem, "give every pair its own id")
        first_lines[pair.id] = line
        pairs.append(pair)
    if not pairs:
        remedy = "write `question`, `aligned` and `misaligned`, one pair per line"
        raise InputError(f"{path}: no pairs; {remedy}")
    return pairs


def _pair(row: _Row) -> ProbePair:
    identity = row.optional("id")
    return ProbePair(
        id=f"line-{row.line}" if identity is None else row.filled("id", identity),
        question=row.required("question"),
        aligned=row.required("aligned"),
        misaligned=row.required("misaligned"),
        theme=row.optional("theme") or "",
        system=row.optional("system"),
        format=row.optional("format") or "",
    )
