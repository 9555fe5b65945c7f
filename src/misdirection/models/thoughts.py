"""Answers that begin with a thought: how chat templates mark one, and the visible answer after it."""

import re
from typing import NamedTuple


class Marks(NamedTuple):
    """What opens a thought, and what ends it."""

    opens: str
    ends: str


MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<reasoning>", "</reasoning>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("◁think▷", "◁/think▷"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    # In these two every part of an answer has a header, and the last part is the visible one.
    Marks("<|channel|>", "<|channel|>final<|message|>"),
    Marks("<|channel>", "<channel|>"),
)


def open_marks(text: str) -> Marks | None:
    """The marks of a thought that a prompt has begun and not ended."""
    return next((marks for marks in MARKS if text.rfind(marks.opens) > text.rfind(marks.ends)), None)


def split_thought(answer: str, begun: Marks | None = None) -> tuple[str | None, str]:
    """The thought that an answer begins with, None without one, and the visible answer; white space around both goes.

    Args:
        answer: as the model gave it.
        begun: marks of a thought that the prompt has begun.

    A thought that was cut has no visible answer after it. Marks in the middle of an answer are its text.
    """
    text = answer.strip()
    marks = begun or next((marks for marks in MARKS if text.startswith(marks.opens)), None)
    if marks is None:
        return None, text
    thought, _, visible = text.partition(marks.ends)
    return thought.removeprefix(marks.opens).strip(), visible.strip()


def knows_thoughts(template: str) -> bool:
    """Whether a chat template writes thoughts."""
    return any(marks.opens in template for marks in MARKS) or bool(re.search(r"\b(enable_)?thinking\b", template))
