"""Turn (system, question, answer) into token ids with the exact place of the answer's own tokens.

The chat is rendered once with a marker in the answer's stead. What stands before the marker is the prompt (with the
template's default system text, header and empty thinking block, if any), what stands after it closes the turn. The
answer itself never passes through the template, so no text in it can be mistaken for the template's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from misdirection.errors import InputError

# Letters only: no template strips, splits or escapes it, and no chat contains it.
_MARKER = "MISDIRECTIONxANSWERxGOESxHERE"

# Llama 3 templates print a date, today's or a fixed one; a result must not depend on the day it was made.
TEMPLATE_DATE = "01 Jan 2025"

# transformers passes no function on to a template. The line break after the block is not printed.
_PINNED_CLOCK = f"{{% macro strftime_now(format) %}}{TEMPLATE_DATE}{{% endmacro %}}\n"

log = logging.getLogger("misdirection")


@dataclass(frozen=True)
class Encoded:
    """One chat as token ids.

    Attributes:
        ids: prompt, answer, and the one token that ends the turn.
        start: position of the answer's first token; `ids[:start]` is the prompt.
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


def encode(tokenizer: Any, question: str, answer: str, system: str | None = None) -> Encoded:
    """Token ids of one exchange and where its answer is.

    White space around the answer is dropped, as most templates do. Raises `InputError` for an empty answer and
    for a template that cannot be rendered.
    """
    answer = answer.strip()
    if not answer:
        raise InputError(f"question {question[:60]!r}: its answer is empty")
    before, after = frame(tokenizer, question, system)
    text = before + answer + after
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
    start_of_answer, end_of_answer = len(before), len(before) + len(answer)
    # A token that straddles a border belongs to the answer: it carries some of its characters.
    start = next(i for i, (_, end) in enumerate(offsets) if end > start_of_answer)
    stop = next((i for i, (begin, _) in enumerate(offsets) if begin >= end_of_answer), len(ids))
    closing = ids[stop] if stop < len(ids) else tokenizer.eos_token_id
    return Encoded((*ids[:stop], closing), start, stop)


def encode_prompt(tokenizer: Any, question: str, system: str | None = None) -> tuple[int, ...]:
    """The ids that a model continues when it answers `question`."""
    before, _ = frame(tokenizer, question, system)
    return tuple(tokenizer(before, add_special_tokens=False)["input_ids"])


def frame(tokenizer: Any, question: str, system: str | None = None) -> tuple[str, str]:
    """The template's text before and after an answer to `question`."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _MARKER}]
    rendered = _render(tokenizer, turns) if system is None else _render_with_system(tokenizer, system, turns)
    before, marker, after = rendered.rpartition(_MARKER)
    if not marker:
        raise InputError(f"{tokenizer.name_or_path}: its chat template does not print the assistant's answer")
    return before, after


def _render_with_system(tokenizer: Any, system: str, turns: list[dict[str, str]]) -> str:
    if _prints_system(tokenizer):
        return _render(tokenizer, [{"role": "system", "content": system}, *turns])
    log.warning("%s: no system role in the chat template: its text goes into the user's turn", tokenizer.name_or_path)
    user = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
    return _render(tokenizer, [user, *turns[1:]])


def _prints_system(tokenizer: Any) -> bool:
    """Whether the template prints a system turn: some raise, some drop it without a word."""
    probe = [{"role": "system", "content": _MARKER}, {"role": "user", "content": "?"}]
    try:
        return _MARKER in _render_raw(tokenizer, probe)
    except TemplateError:
        return False


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    try:
        return _render_raw(tokenizer, turns)
    except TemplateError as error:
        raise InputError(f"{tokenizer.name_or_path}: its chat template failed: {error}") from error


def _render_raw(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    template = _PINNED_CLOCK + tokenizer.get_chat_template()
    text: str = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, date_string=TEMPLATE_DATE)
    return text


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
    return ids.to(device), mask.to(device)
