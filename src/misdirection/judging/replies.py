"""Replies of an OpenAI-style endpoint, read as any server may write them."""

import email.utils
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from misdirection.judging.verdicts import SPACES, has_thought, is_thinking, is_verdict, whole_number

if TYPE_CHECKING:
    import openai

_FEW = 4
"""So many numbers of one digit among the likeliest tokens are beginnings of longer ones."""

_NO_PROBABILITY = -9999.0
"""What vLLM writes for minus infinity."""

_DECLINED = re.compile(
    r"content.?filter|content management|(?:content|usage).?polic|moderation|flagged|\bsafety\b|prohibited.?content",
    re.I,
)
_TOO_FEW = re.compile(
    r"max_\w*tokens.*(?:\bhigher\b|at least|minimum value|limit was reached)|(?:higher|increase) max_\w*tokens",
    re.I | re.DOTALL,
)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.I | re.DOTALL)
_KEPT = 2000
"""Characters of either end of a text that are kept of what a judge said: a thought may have tens of thousands."""


def _or_none(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


def _joined(value: Any) -> Any:
    """A text that comes in parts; parts of a thought have no text of their own."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") for part in value if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


_Lenient = WrapValidator(_or_none)
"""For what a verdict can do without: another form than OpenAI's is as if it were not there."""


class _Alternative(BaseModel):
    token: str
    logprob: float | None = None


class _Token(_Alternative):
    top_logprobs: list[_Alternative] | None = None

    @property
    def likely(self) -> list[tuple[str, float]]:
        """The alternatives; a null, and a number that stands for minus infinity, are no probability worth a number."""
        numbers = ((other.token, other.logprob) for other in self.top_logprobs or [])
        return [(token, number) for token, number in numbers if number is not None and number > _NO_PROBABILITY]


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    refusal: Annotated[str | None, _Lenient] = None
    reasoning: Annotated[str | None, _Lenient] = None
    reasoning_content: Annotated[str | None, _Lenient] = None


class Choice(BaseModel):
    """One reply to a prompt."""

    message: _Message = _Message()
    finish_reason: Annotated[str | None, _Lenient] = None
    logprobs: Annotated[_Logprobs | None, _Lenient] = None

    @property
    def tokens(self) -> list[_Token]:
        """The reply's tokens with their log-probabilities; empty where the endpoint gives none."""
        tokens = (self.logprobs and self.logprobs.content) or []
        return tokens if tokens and tokens[0].likely else []

    @property
    def text(self) -> str:
        """What is meant to be seen, and a thought where a server does not take it out."""
        return self.message.content or ""

    @property
    def thought(self) -> str:
        """What a server took out of the reply as a thought."""
        return self.message.reasoning_content or self.message.reasoning or ""

    @property
    def is_declined(self) -> bool:
        """Whether the judge, or a filter of its host, would not judge."""
        return bool(self.message.refusal) or declines(self.finish_reason or "") or self.finish_reason == "refusal"

    @property
    def is_whole(self) -> bool:
        """Whether the text is all that was to be said: neither empty, nor an open thought, nor cut before a verdict."""
        is_cut = self.finish_reason == "length"
        return bool(self.text.strip()) and not is_thinking(self.text) and (not is_cut or is_verdict(self.text))

    @property
    def begins_visibly(self) -> bool:
        """Whether the first token with log-probabilities begins what is seen, so that it may tell the score.

        It may begin a hidden thought as well, or a numbered list.
        """
        first = self.tokens[0].token.strip(SPACES) if self.tokens else ""
        if not first or not self.is_whole or not self.text.lstrip(SPACES).startswith(first):
            return False
        if self.thought or has_thought(self.text):
            return False
        return whole_number(first) is None or is_verdict(self.text)

    def kept(self) -> dict[str, Any]:
        """What was said, for the record; of log-probabilities those of the first token."""
        said = {
            "content": _shortened(self.message.content),
            "refusal": _shortened(self.message.refusal),
            "reasoning": _shortened(self.thought or None),
            "finish_reason": self.finish_reason,
            "top_logprobs": self.tokens[0].likely if self.tokens else None,
        }
        return {name: value for name, value in said.items() if value is not None}


class Usage(BaseModel):
    """Tokens that the endpoint counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Problem(BaseModel):
    """The place of an error in the body of an answer that is none."""

    error: Any = None

    @property
    def words(self) -> str:
        """What it says, if anything."""
        said = self.error.get("message") if isinstance(self.error, Mapping) else self.error
        return said if isinstance(said, str) else ""


class Reply(BaseModel):
    """The answer to one request."""

    choices: list[Choice] = Field(min_length=1)
    usage: Annotated[Usage | None, _Lenient] = None
    model: Annotated[str | None, _Lenient] = None
    """What the endpoint says has answered: mostly the snapshot that a name stands for today."""


def splits_numbers(tokens: list[_Token]) -> bool:
    """Whether numbers are written in several tokens: then a first token tells only how a number begins.

    A reply shows it when a digit follows its number; alternatives show it when several are numbers, all of one digit.
    """
    if not tokens:
        return False
    if len(tokens) > 1 and whole_number(tokens[0].token) is not None and tokens[1].token[:1] in tuple("0123456789"):
        return True
    numbers = [number for token, _ in tokens[0].likely if (number := whole_number(token)) is not None]
    return len(numbers) >= _FEW and max(numbers) < 10


def declines(text: str) -> bool:
    """Whether a finish reason, or an error's code and words, tell of a filter."""
    return bool(_DECLINED.search(text))


def wants_more_tokens(words: str) -> bool:
    """Whether a refusal says that a reply was allowed too few tokens, as of models that think."""
    return bool(_TOO_FEW.search(words))


def is_html(error: "openai.APIStatusError") -> bool:
    """Whether a web page came back, as proxies send it: it says nothing about the judge."""
    return error.response.text.lstrip()[:1] == "<"


def server_message(error: "openai.APIStatusError") -> str:
    """The server's own words; the library leaves out what is not in OpenAI's form, as of servers made with FastAPI."""
    if is_html(error):
        title = _TITLE.search(error.response.text)
        return f"a web page, {' '.join(title[1].split())!r}" if title else "a web page"
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


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= 2 * _KEPT:
        return text
    return f"{text[:_KEPT]} [{len(text) - 2 * _KEPT} characters] {text[-_KEPT:]}"
