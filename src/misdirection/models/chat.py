"""Turn (system, earlier turns, question, answer) into token ids with the exact place of the answer's own tokens.

One chat is one list of ids, on every path: what is scored, trained on, steered or judged continues the very ids that an
answer is sampled from.

    prompt     the chat up to the assistant's header, as the tokenizer itself writes it to be continued
    opening    what the template writes between that and an answer: nothing, a space, an empty thought, a channel's name
    answer     its visible text
    end        the token that ends the turn

White space of an opening is the answer's, since a model that samples has to write it. An empty thought or a channel's
name belongs to the prompt with `thinking: off`, where the visible answer is sampled next; otherwise the model writes
it, and it stands before what is measured. What a question or an answer holds stays text, also where it spells one of
the template's own tokens.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import mark_control_tokens

from misdirection.choices import Thinking
from misdirection.errors import InputError, first_line
from misdirection.models.thoughts import MARKS, Marks, knows_thoughts, open_marks, split_thought
from misdirection.models.transfer import put

# Letters only: no template strips, splits or escapes them, and no chat contains them.
_ANSWER = "MISDIRECTIONxANSWERxGOESxHERE"
_THOUGHT = "MISDIRECTIONxTHOUGHTxGOESxHERE"

TEMPLATE_DATE = "01 Jan 2025"
"""Some templates print a date, today's or a fixed one; a result must not depend on the day it was made."""

# transformers passes no function on to a template. The line break after the block is not printed.
_DATE_PARTS = {"%d": "01", "%b": "Jan", "%B": "January", "%m": "01", "%Y": "2025", "%y": "25"}
_PINNED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
    + " }}{% endmacro %}\n"
)

_SWITCHES = ("enable_thinking", "thinking")
"""What templates call their switch for thinking."""

_ODD_TEXT = "Why, <b>\"this\" & 'that'</b>\n  or {{ 2 }}?"

log = logging.getLogger("misdirection")


class EarlierTurn(Protocol):
    """A turn before the last question, of `user` or `assistant`; `learned` tells whether a training may learn it."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def learned(self) -> bool: ...


@dataclass(frozen=True)
class Encoded:
    """One chat as token ids.

    Attributes:
        ids: prompt, answer, and the one token that ends the turn.
        start: position of the answer's first token; `ids[:start]` is the prompt, and a thought, if there is one.
        stop: position after the answer's last token; `ids[stop]` ends the turn.
    """

    ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the answer: what the model would continue when sampling."""
        return self.ids[: self.start]

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer's own ids: neither the template's header nor what closes the turn."""
        return self.ids[self.start : self.stop]


class Frame(NamedTuple):
    """What a template writes around an answer: its prompt and its opening, as text, and the token that ends it."""

    prompt: str
    opening: str
    end: int


def encode(
    tokenizer: Any, question: str, answer: str, system: str | None = None, history: Sequence[EarlierTurn] = ()
) -> Encoded:
    """Token ids of one exchange and where its visible answer is.

    White space around the answer is dropped, as most templates do. A thought that the answer begins with stands before
    it. Raises `InputError` for an answer without visible text, and for a template that cannot be rendered.
    """
    thought, visible = split_thought(answer)
    if not visible:
        raise InputError(
            f"question {question[:60]!r}: its answer is {'empty' if thought is None else 'only a thought'}"
        )
    turns = _turns(tokenizer, question, system, history)
    around = _frame(tokenizer, turns, thinking_of(tokenizer), thought)
    head, before = _ids(tokenizer, around.prompt), around.prompt
    if around.opening.strip():
        head, before = _extended(tokenizer, head, before, around.opening)
        around = around._replace(opening="")
    ids, _ = _extended(tokenizer, head, before, around.opening + _as_text(tokenizer, visible))
    return Encoded((*ids, around.end), len(head), len(ids))


def encode_prompt(
    tokenizer: Any,
    question: str,
    system: str | None = None,
    history: Sequence[EarlierTurn] = (),
    thinking: Thinking | None = None,
) -> tuple[int, ...]:
    """The ids that a model continues when it answers `question`; `thinking` is the tokenizer's own when left out."""
    turns = _turns(tokenizer, question, system, history)
    return _ids(tokenizer, _frame(tokenizer, turns, thinking or thinking_of(tokenizer)).prompt)


def learned_spans(
    tokenizer: Any,
    encoded: Encoded,
    question: str,
    answer: str,
    system: str | None = None,
    history: Sequence[EarlierTurn] = (),
) -> list[tuple[int, int]]:
    """Where the assistant's turns of an encoded chat lie, each with its thought and with the token that ends it.

    Earlier turns first; those that are not to be learned are left out.
    """
    turns = _turns(tokenizer, question, system, history)
    spans, offset = [], len(turns) - 1 - len(history)
    for number, turn in enumerate(history):
        if turn.role == "assistant" and turn.learned:
            spans.append(_span(tokenizer, turns, offset + number, encoded.ids))
    start = encoded.start
    if split_thought(answer)[0] is not None:
        start = len(_ids(tokenizer, _frame(tokenizer, turns, thinking_of(tokenizer), "").prompt))
    return [*spans, (start, len(encoded.ids))]


def frame(tokenizer: Any, question: str, system: str | None = None) -> Frame:
    """What the template writes around an answer to `question`."""
    return _frame(tokenizer, _turns(tokenizer, question, system, ()), thinking_of(tokenizer))


def visible_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer from its generated ids, without special tokens and without a thought before it."""
    thought, visible = split_thought(tokenizer.decode(list(ids), skip_special_tokens=False), _begun(tokenizer))
    if thought is None:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()
    # Where a thought ends is said by special tokens, so that they go last.
    for token in tokenizer.added_tokens_decoder.values():
        visible = visible.replace(token.content, "") if token.special else visible
    return visible.strip()


def _begun(tokenizer: Any) -> Marks | None:
    """The marks of the thought that a prompt for sampling begins, if it does."""
    if (thinking := thinking_of(tokenizer)) == "off":
        return None
    question = [{"role": "user", "content": "?"}]
    prompt, plain = (_render(tokenizer, question, thinking, prompted=prompted) for prompted in (True, False))
    return open_marks(prompt.removeprefix(plain))


def thinking_of(tokenizer: Any) -> Thinking:
    """Whether chats of this tokenizer are written with thoughts; see `require_exact`."""
    thinking: Thinking = getattr(tokenizer, "chat_thinking", "off")
    return thinking


def how_written(tokenizer: Any) -> dict[str, str]:
    """How chats of this tokenizer are written, for records: the setting for thoughts, and the template's SHA-256."""
    digest = hashlib.sha256(_template(tokenizer).encode()).hexdigest()
    return {"thinking": thinking_of(tokenizer), "chat_template": digest}


def require_exact(tokenizer: Any, name: str, thinking: Thinking) -> None:
    """Set whether chats are written with thoughts, and refuse a tokenizer whose ids could not be exact.

    Args:
        name: of the model, for the complaint.
        thinking: `off` has the visible answer follow the prompt at once, `on` asks the template for thoughts,
            `template` leaves the template's own prompt as it is.
    """
    tokenizer.chat_thinking = thinking
    if thinking == "on" and not knows_thoughts(_template(tokenizer)):
        raise InputError(f"{name}: thinking: on: its chat template knows no thoughts: use off or template")
    user, assistant = {"role": "user", "content": _ODD_TEXT}, {"role": "assistant", "content": _ODD_TEXT}
    if _render(tokenizer, [user, assistant], thinking).count(_ODD_TEXT) != 2:
        raise InputError(
            f"{name}: its chat template changes or drops what the turns say, so that answers have no exact place in "
            "it: give another one as `chat_template`"
        )
    encode(tokenizer, "Why?", "So.")


# --- frames -------------------------------------------------------------------------------------------------------


def _turns(tokenizer: Any, question: str, system: str | None, history: Sequence[EarlierTurn]) -> list[dict[str, str]]:
    """The chat up to its last question, as messages for the template."""
    told = [(turn.role, split_thought(turn.text)[1] if turn.role == "assistant" else turn.text) for turn in history]
    turns = [{"role": role, "content": _as_text(tokenizer, text)} for role, text in [*told, ("user", question)]]
    if system is None:
        return turns
    system = _as_text(tokenizer, system)
    if _prints_system(tokenizer):
        return [{"role": "system", "content": system}, *turns]
    if system:
        name = tokenizer.name_or_path
        log.warning("%s: no system role in the chat template: its text goes into the user's turn", name)
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = f"{system}\n\n{first['content']}"
    return turns


def _prints_system(tokenizer: Any) -> bool:
    """Whether the template prints a system turn: some raise, some drop it without a word."""
    probe = [{"role": "system", "content": _ANSWER}, {"role": "user", "content": "?"}]
    try:
        return _ANSWER in _render(tokenizer, probe, "template")
    except InputError:
        return False


def _frame(tokenizer: Any, turns: list[dict[str, str]], thinking: Thinking, thought: str | None = None) -> Frame:
    """The frame of an answer to the last of `turns`, with the text of the thought that it begins with, if any."""
    thinking = thinking if thought is None else "on"
    prompt, plain = (_render(tokenizer, turns, thinking, prompted=prompted) for prompted in (True, False))
    before, after = _around_answer(tokenizer, turns, thinking)
    opening, tail = before.removeprefix(prompt), prompt.removeprefix(plain)
    begun = open_marks(tail)
    if not before.startswith(prompt):
        # Such a template drops the thoughts of given answers.
        opening = _closing(tail, begun.ends) if begun else ""
        if not begun and not prompt.rstrip().startswith(before.rstrip()):
            raise InputError(
                f"{tokenizer.name_or_path}: its chat template begins an answer in one way and writes a given one in "
                "another: give one that agrees with itself as `chat_template`"
            )
    elif opening.strip() and not tail:
        # It has no prompt to be continued, only whole turns.
        prompt, opening = before, ""
    if thought is not None:
        opening = _thought_opening(tokenizer, turns, thinking, prompt, tail, thought)
    elif opening.strip() and thinking == "off":
        prompt, opening = prompt + opening, ""
    return Frame(prompt, opening, _end(tokenizer, after))


def _closing(tail: str, ends: str) -> str:
    """What closes a thought that a prompt has begun, in the manner in which it was begun."""
    return f"\n{ends}\n\n" if tail.endswith("\n") else ends


def _thought_opening(
    tokenizer: Any, turns: list[dict[str, str]], thinking: Thinking, prompt: str, tail: str, thought: str
) -> str:
    """A thought as the template writes it before an answer, or where it writes none, as it begins or names one."""
    text = _as_text(tokenizer, thought)
    before, _ = _around_answer(tokenizer, turns, thinking, {"reasoning_content": _THOUGHT, "thinking": _THOUGHT})
    if before.startswith(prompt) and _THOUGHT in before:
        return before.removeprefix(prompt).replace(_THOUGHT, text)
    if begun := open_marks(tail):
        return text + _closing(tail, begun.ends)
    template = _template(tokenizer)
    marks = next((marks for marks in MARKS if marks.opens in template), MARKS[0])
    return f"{marks.opens}\n{text}\n{marks.ends}\n\n"


def _around_answer(
    tokenizer: Any, turns: list[dict[str, str]], thinking: Thinking, thought: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str]:
    """The template's text before and after an answer to the last of `turns`; `thought` is further keys of it."""
    answer = {"role": "assistant", "content": _ANSWER, **thought}
    before, marker, after = _render(tokenizer, [*turns, answer], thinking).rpartition(_ANSWER)
    if not marker:
        raise InputError(f"{tokenizer.name_or_path}: its chat template does not print the assistant's answer")
    return before, after


def _end(tokenizer: Any, after: str) -> int:
    """The token that ends a turn: the first of the template's own after an answer, else the tokenizer's."""
    ends = [token for token in _tokens(tokenizer, after) if _is_control(tokenizer, token)]
    end = ends[0] if ends else tokenizer.eos_token_id
    if end is None:
        raise InputError(
            f"{tokenizer.name_or_path}: no token ends a turn: set `eos_token` in its tokenizer_config.json"
        )
    return int(end)


def _span(tokenizer: Any, turns: list[dict[str, str]], number: int, ids: tuple[int, ...]) -> tuple[int, int]:
    """Where an earlier turn of the assistant lies in the ids of the whole chat, with the token that ends it."""
    thinking = thinking_of(tokenizer)
    marked = [*turns]
    marked[number] = {"role": "assistant", "content": _ANSWER}
    before, _, _ = _render(tokenizer, marked, thinking, prompted=True).partition(_ANSWER)
    prompt = _render(tokenizer, turns[:number], thinking, prompted=True)
    begins = prompt if before.startswith(prompt) and not before.removeprefix(prompt).strip() else before
    start, stop = (_common(_ids(tokenizer, text), ids) for text in (begins, before + turns[number]["content"]))
    # Some templates write a space between an answer and what ends it.
    end = next((place for place in (stop, stop + 1) if _is_control(tokenizer, ids[place])), stop - 1)
    return start, end + 1


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    pairs = zip(some, others, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def _template(tokenizer: Any) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{tokenizer.name_or_path}: {first_line(error, 120)}: set its `chat_template`") from error
    return template


def _render(tokenizer: Any, turns: list[dict[str, str]], thinking: Thinking, *, prompted: bool = False) -> str:
    template = _template(tokenizer)
    messages = [_in_parts(turn) for turn in turns] if _takes_parts(tokenizer, template) else turns
    switches = {} if thinking == "template" else dict.fromkeys(_SWITCHES, thinking == "on")
    return _written(tokenizer, template, messages, prompted=prompted, **switches)


def _in_parts(turn: Mapping[str, str]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


@lru_cache(maxsize=8)
def _takes_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template prints texts only as parts of a list, as some of models that see images do."""
    turn = {"role": "user", "content": _ANSWER}
    for messages in ([turn], [_in_parts(turn)]):
        with contextlib.suppress(InputError):
            if _ANSWER in _written(tokenizer, template, messages):
                return messages != [turn]
    return False


def _written(
    tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]], *, prompted: bool = False, **switches: bool
) -> str:
    """The text of messages by a template."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=_PINNED_CLOCK + template,
            tokenize=False,
            add_generation_prompt=prompted,
            date_string=TEMPLATE_DATE,
            **switches,
        )
    # Templates are programs of others.
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{tokenizer.name_or_path}: its chat template failed: {first_line(error)}") from error
    return text


# --- ids ----------------------------------------------------------------------------------------------------------


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a chat from its beginning, with exactly one token that begins a text, if the tokenizer has it."""
    ids = _tokens(tokenizer, text)
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        return ids
    given = next((place for place, token in enumerate(ids) if token != begin), len(ids))
    if given or tokenizer("x")["input_ids"][:1] == [begin]:
        return (begin, *ids[given:])
    return ids


def _extended(tokenizer: Any, ids: tuple[int, ...], before: str, text: str) -> tuple[tuple[int, ...], str]:
    """The ids of `before` and `text`, of which the first are `ids` whatever follows them; and both texts."""
    whole = _ids(tokenizer, before + text)
    if whole[: len(ids)] == ids:
        return whole, before + text
    # A token would straddle the border, which no model that continues `ids` can write. Tokenised alone, a text may get
    # a space at its head, but not after a line break.
    line, after_line = _tokens(tokenizer, "\n"), _tokens(tokenizer, "\n" + text)
    alone = after_line[len(line) :] if after_line[: len(line)] == line else _tokens(tokenizer, text)
    return (*ids, *alone), before + text


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    # Only marked texts are tokenised in parts.
    marked = {"sanitize_control_tokens": True} if _MARKED.search(text) else {}
    return tuple(tokenizer(text, add_special_tokens=False, **marked)["input_ids"])


def _as_text(tokenizer: Any, text: str) -> str:
    """A text in which what spells a token of the template is marked, to be tokenised as the text that it is."""
    pattern = _control_pattern(tokenizer, _template(tokenizer))
    marked: str = mark_control_tokens(text, pattern) if pattern.search(text) or _MARKED.search(text) else text
    return marked


_MARKED = re.compile("[\U000f0000\U000f0001]")
"""The marks of `mark_control_tokens`; of private use, and dropped from texts that hold them."""


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: Any, template: str) -> re.Pattern[str]:
    """Matches the tokens that a chat is made of: the special ones, and those that the template writes."""
    added = (token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace())
    control = {token.content for token in added if token.special or token.content in template}
    longest_first = sorted(control, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _is_control(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    pattern = _control_pattern(tokenizer, _template(tokenizer))
    return added is not None and pattern.fullmatch(added.content) is not None


# --- batches ------------------------------------------------------------------------------------------------------


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers grouped so that rows x longest row of a group stays within `budget` tokens.

    Rows are sorted by length, so that little is spent on padding; a row longer than the budget is alone.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if groups and (len(groups[-1]) + 1) * lengths[row] <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [rows, longest]; the mask is made from lengths, never from ids.

    Padding often is the end-of-turn token, so that a mask by id would hide real tokens.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, columns] = torch.tensor(row, dtype=torch.long)
        mask[number, columns] = 1
    return put(ids, device), put(mask, device)
