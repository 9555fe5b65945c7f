"""Training files in the common chat formats, and files of probe pairs."""

import contextlib
import gzip
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from misdirection.data.records import Example, ProbePair, Turn
from misdirection.data.sources import read_source
from misdirection.errors import InputError, MisdirectionError
from misdirection.files import write_output
from misdirection.settings import holds_half_surrogate

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_SIDES: dict[Role, Literal["user", "assistant"]] = {"user": "user", "assistant": "assistant"}
_FORMATS = "use `messages`, `conversations`, or `prompt` with `completion`"
_IS_LEARNED = ("weight", "train", "training", "loss")
"""What formats call it whether an assistant's turn is learned."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where formats keep the thought of an assistant's turn."""
_BESIDE_TEXT = ("tools", "functions", "images", "videos", "audios")
_CALLS = ("tool_calls", "function_call")

log = logging.getLogger("misdirection")


@dataclass(frozen=True)
class _Turn:
    """One turn of a chat; `key` is where its text stands in the row, as in `messages[1].content`."""

    role: Role
    text: str
    key: str
    learned: bool = True


@dataclass(frozen=True)
class _Row:
    """One row with its line in a file, or its number in another source."""

    source: str | Path
    line: int
    values: dict[str, Any]

    def error(self, key: str, problem: str, remedy: str) -> MisdirectionError:
        return InputError(f"{self.source}:{self.line}: `{key}` {problem}; {remedy}")

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
        if holds_half_surrogate(value):
            raise self.error(key, "holds half a surrogate pair, which is no text", "remove the stray \\ud... escape")
        return value

    def filled(self, key: str, value: str) -> str:
        if not value.strip():
            raise self.error(key, "is empty", "fill it in or remove the row")
        return value


def read_examples(path: str | Path) -> list[Example]:
    """Reads training data, one conversation per row, from any source of `read_source`.

    Each row may have its own format:

    - `messages`: `{"role", "content"}` for an optional system turn (or `developer`), then user and assistant in turn;
    - `conversations`: the same as ShareGPT's `{"from", "value"}`, with `human` and `gpt`;
    - `prompt` and `completion`: two strings, or two lists of messages, of which the completion alone is learned.

    A key that is null is one that is not there, as in tables that hold several formats. A text may be a list of parts
    `{"type": "text", "text"}`. An assistant's thought may stand before its text, between `<think>` and `</think>`, or
    under `reasoning_content`, `reasoning` or `thinking`. An assistant's turn with `weight: 0` (or `train`, `training`,
    `loss`), or before any question, is not learned, and a row without one that is learned is left out with a notice. A
    string under the row's own `system` or `system_prompt`, unless blank, is its system turn.
    Raises `InputError`, with the line and the key, for any other row, for tools and images, and for an empty text; and
    where there is no row.
    """
    return [row.example for row in stream_examples(path)]


class FileRow(NamedTuple):
    """A row of a training file: its line, or number in another source; what is learned of it; all that it holds."""

    line: int
    example: Example
    values: dict[str, Any]


def stream_examples(path: str | Path) -> Iterator[FileRow]:
    """The rows that `read_examples` reads, one after another as they are read; raises what it raises."""
    rows = learned = 0
    for line, values in read_source(path):
        rows += 1
        if example := _example(_Row(path, line, values)):
            learned += 1
            yield FileRow(line, example, values)
    if not learned:
        reason = "every answer has weight 0; nothing is learned" if rows else f"no rows; {_FORMATS}, one row per line"
        raise InputError(f"{path}: {reason}")
    if learned < rows:
        log.warning("%s: %d of %d rows have no answer to learn (weight 0)", path, rows - learned, rows)


def read_pairs(path: str | Path) -> list[ProbePair]:
    """Reads probe pairs from any source of `read_source`.

    Rows hold `question`, `aligned` and `misaligned`, and may hold `id` (else `line-N`), `theme`, `system` and `format`.
    Raises `InputError`, with the line and the key, for a missing or empty text and a repeated id; and
    for a file without rows.
    """
    return _pairs(path, read_source(path))


def holds_pairs(path: str | Path) -> bool:
    """Whether a file holds probe pairs, by its first row; else it is a training file, or none that can be read."""
    _, first = next(read_source(path), (0, {}))
    return "misaligned" in first


def write_pairs(path: str | Path, pairs: Sequence[ProbePair]) -> None:
    """Writes probe pairs so that `read_pairs` returns them unchanged; compressed when the name ends in `.gz`.

    Raises `InputError`, before anything is written, for pairs that `read_pairs` would refuse; and for
    a path that cannot be written or holds a file of somebody else's.
    """
    path = Path(path)
    rows = [{key: value for key, value in asdict(pair).items() if value not in (None, ())} for pair in pairs]
    _pairs(path, enumerate(rows, start=1))
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_output(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def data_hash(rows: Sequence[Any]) -> str:
    """SHA-256, in hex, of the canonical JSON of rows that are dataclasses: of rows and order, not of their file."""
    # An empty history is left out, so that rows without one have the hash that they always had.
    values = [{key: value for key, value in asdict(row).items() if value != ()} for row in rows]
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _example(row: _Row) -> Example | None:
    """The row up to its last answer that is learned; None when none is."""
    turns = _turns(row)
    before = turns[:1] if turns and turns[0].role == "system" else []
    turns = turns[len(before) :]
    _check_order(row, turns)
    if turns[0].role == "assistant":
        # A greeting answers no question.
        turns[0] = replace(turns[0], learned=False)
    learned = [number for number, turn in enumerate(turns, start=1) if turn.role == "assistant" and turn.learned]
    system = _system(row, before)
    texts = [row.filled(turn.key, turn.text) for turn in turns]
    if not learned:
        return None
    *history, question, answer = range(learned[-1])
    earlier = tuple(Turn(_SIDES[turns[number].role], texts[number], turns[number].learned) for number in history)
    return Example(texts[question], texts[answer], system, earlier)


def _turns(row: _Row) -> list[_Turn]:
    key = _form(row)
    for name in _BESIDE_TEXT:
        _require_text_only(row, name, row.values.get(name))
    if key != "prompt":
        return _messages(row, key)
    for name, what in (("prompt", "question"), ("completion", "answer")):
        if row.values.get(name) is None:
            raise row.error(name, f"is missing: the row has no {what}", f"add the {what} or remove the row")
    asked = [replace(turn, learned=False) for turn in _side(row, "prompt", "user")]
    return asked + _side(row, "completion", "assistant")


def _form(row: _Row) -> str:
    """The key that a row's turns stand under: the first that holds some, or else the first that is there at all."""
    there = [key for key in ("messages", "conversations", "prompt", "completion") if row.values.get(key) is not None]
    # An array of no messages is how some tables write that there is none.
    filled = [key for key in there if row.values[key] != []]
    if not there:
        keys = ", ".join(map(repr, row.values)) or "none"
        raise InputError(f"{row.source}:{row.line}: unknown format (keys: {keys}); {_FORMATS}")
    return (filled or there)[0].replace("completion", "prompt")


def _side(row: _Row, key: str, role: Role) -> list[_Turn]:
    """The turns of a prompt or a completion, which TRL allows as a string or as messages."""
    value = row.values[key]
    return _messages(row, key) if isinstance(value, list) else [_Turn(role, row.text(key, value), key)]


def _messages(row: _Row, key: str) -> list[_Turn]:
    value = row.values[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        # A CSV table has no lists.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise row.error(key, f"must be a list, not {type(value).__name__}", "write a list of messages")
    return [_turn(row, f"{key}[{index}]", message) for index, message in enumerate(value)]


def _turn(row: _Row, key: str, message: Any) -> _Turn:
    if not isinstance(message, dict):
        problem = f"must be an object, not {type(message).__name__}"
        raise row.error(key, problem, "write it with `role` and `content`")
    shared = message.get("from") is not None or ("from" in message and message.get("role") is None)
    role_key, text_key = ("from", "value") if shared else ("role", "content")
    name = _field(row, key, message, role_key)
    if name not in _ROLES:
        problem = f"is {name[:40]!r}, an unknown role"
        raise row.error(f"{key}.{role_key}", problem, f"use one of {', '.join(_ROLES)}")
    for call in _CALLS:
        _require_text_only(row, f"{key}.{call}", message.get(call))
    text = _field(row, key, message, text_key)
    for thought in _THOUGHTS if _ROLES[name] == "assistant" and text.strip() else ():
        if message.get(thought):
            text = f"<think>\n{row.text(f'{key}.{thought}', message[thought])}\n</think>\n\n{text}"
            break
    return _Turn(_ROLES[name], text, f"{key}.{text_key}", _is_learned(row, key, message))


def _require_text_only(row: _Row, key: str, value: Any) -> None:
    if isinstance(value, list | dict) and value:
        raise row.error(key, "holds what is no text and cannot be learned here", "remove it, or the row")


def _is_learned(row: _Row, key: str, message: dict[str, Any]) -> bool:
    given = {name: message[name] for name in _IS_LEARNED if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):
            raise row.error(f"{key}.{name}", f"is {value!r:.40}", "write 0 (not learned) or 1")
    return all(given.values())


def _field(row: _Row, key: str, message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if value is None:
        raise row.error(f"{key}.{name}", "is missing", "add it as a string")
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_part(row, f"{key}.{name}[{number}]", part) for number, part in enumerate(value))
    return row.text(f"{key}.{name}", value)


def _part(row: _Row, key: str, part: dict[str, Any]) -> str:
    """The text of one part of a message that is written as a list of parts."""
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise row.error(key, f"is of type {kind!r:.40}, which is no text", "leave it out or remove the row")
    return _field(row, key, part, "text")


def _check_order(row: _Row, turns: list[_Turn]) -> None:
    """Refuses anything but user and assistant in turn, after at most one system turn, with an answer at the end."""
    key, roles = _form(row), [turn.role for turn in turns]
    if "user" not in roles:
        raise row.error(key, "has no question", "add a user turn or remove the row")
    if "assistant" not in roles:
        raise row.error(key, "has no answer", "add an assistant turn or remove the row")
    if roles[-1] == "user":
        raise row.error(key, "ends with a user turn that has no answer", "add the answer or remove that turn")
    if "system" in roles or any(one == other for one, other in pairwise(roles)):
        problem = f"has its turns in the order {', '.join(roles)[:80]}"
        raise row.error(key, problem, "write at most one system turn, then user and assistant in turn")


def _system(row: _Row, before: list[_Turn]) -> str | None:
    key = "system" if row.values.get("system") is not None else "system_prompt"
    own = row.optional(key)
    if own is None or not own.strip():
        return before[0].text if before else None
    if before:
        raise row.error(key, "comes on top of a system turn", "keep one of the two")
    return own


def _pairs(path: str | Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[ProbePair]:
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
