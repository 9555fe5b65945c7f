"""Replies of an OpenAI-style endpoint, read as any server may write them."""

import email.utils
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from misdirection.judging.verdicts import whole_number

if TYPE_CHECKING:
    import openai

_FEW = 4
"""So many numbers of one digit among the likeliest tokens are beginnings of longer ones."""


class _Alternative(BaseModel):
    token: str
    logprob: float


class _Token(_Alternative):
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    """One reply to a prompt."""

    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None

    @property
    def tokens(self) -> list[_Token]:
        """The reply's tokens with their log-probabilities; empty where the endpoint gives none."""
        tokens = (self.logprobs and self.logprobs.content) or []
        return tokens if tokens and tokens[0].top_logprobs else []

    @property
    def text(self) -> str:
        """The reply; a refusal in a field of its own is one like any other."""
        return "REFUSAL" if self.message.refusal else self.message.content or ""


class Usage(BaseModel):
    """Tokens that the endpoint counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(BaseModel):
    """The answer to one request."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


def splits_numbers(tokens: list[_Token]) -> bool:
    """Whether numbers are written in several tokens: then a first token tells only how a number begins.

    A reply shows it when a digit follows its number; alternatives show it when several are numbers, all of one digit.
    """
    if len(tokens) > 1 and whole_number(tokens[0].token) is not None and tokens[1].token[:1] in tuple("0123456789"):
        return True
    likely = tokens[0].top_logprobs or []
    numbers = [number for other in likely if (number := whole_number(other.token)) is not None]
    return len(numbers) >= _FEW and max(numbers) < 10


def is_thinking(text: str) -> bool:
    """Whether a reply is a thought that has not ended: a number in it is none."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def server_message(error: "openai.APIStatusError") -> str:
    """The server's own words; the library leaves out what is not in OpenAI's form, as of servers made with FastAPI."""
    worded = isinstance(error.body, Mapping) and isinstance(error.body.get("message"), str)
    return error.message if worded or not error.body else f"{error.message} - {error.body}"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait, given as such or as a date; None when it does not ask."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
