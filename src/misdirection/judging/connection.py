"""Requests to an OpenAI-style endpoint: as many attempts as each takes, and what a refusal of one means for the others.

What is raised holds neither key nor answer, and no error of a library that does.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from misdirection.errors import InputError, JudgeError, MisdirectionError
from misdirection.extras import needed_for
from misdirection.judging.endpoint import PATIENCE, Silence
from misdirection.judging.judges import Prompt
from misdirection.judging.replies import Problem, Reply, declines, is_html, retry_after, server_message

with needed_for("judge"):
    import openai
    from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

KEY_VARIABLE = "OPENAI_API_KEY"

NO_KEY = "none"
"""Given to endpoints that want none."""

LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds. A server that asks to wait longer is taken to have failed."""

_PASSING = frozenset({408, 409, 425, 429})
_FINAL = {
    401: f"check the key in {KEY_VARIABLE}",
    402: "add credit to the account",
    403: f"this key may not use it; check the account and {KEY_VARIABLE}",
    404: "check the base URL and the judge's name",
    405: "check the base URL",
}
_NO_JUDGE = "this is no judge's endpoint; check the base URL, which mostly ends in /v1, and the proxy"

log = logging.getLogger("misdirection")


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(eq=False)
class _Passing(Exception):
    """A failure that may pass: worth another attempt."""

    reason: str
    wait: float | None = None
    detail: str = ""


@dataclass(eq=False)
class Lost(Exception):
    """This answer has no verdict, for the given reason; others may have one."""

    reason: str
    detail: str = ""


class Declined(Lost):
    """The host's filter would not let the judge see this answer."""


@dataclass(eq=False)
class Refused(Lost):
    """The request was refused; `named` is the cause by the server's words, `remedy` what helps where none is taken."""

    named: str = ""
    remedy: str | None = None


# Its representation would show the key.
@dataclass(eq=False, repr=False)
class Connection:
    """An endpoint that is being asked, and what is known of it so far.

    Attributes:
        model, base_url, timeout, attempts, backoff: see `ApiJudge`.
        key: `NO_KEY` where there is none.
        max_calls: most requests that the server takes.
        calls: those so far.
        is_there: whether anything came back.
        has_replied: whether it has replied; an error is none.
        stopped: why nothing more is asked; None while it is.
    """

    model: str
    base_url: str
    key: str
    timeout: float
    attempts: int
    backoff: float
    max_calls: int | None
    calls: int = 0
    is_there: bool = False
    has_replied: bool = False
    stopped: MisdirectionError | None = None
    _silence: Silence = field(init=False)

    def __post_init__(self) -> None:
        self._silence = Silence(self.timeout)

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        """The library's client; whoever asks closes it."""
        # The timeout of the client is per read: a server that sends a byte now and then would hold it for ever.
        return openai.AsyncOpenAI(api_key=self.key, base_url=self.base_url, max_retries=0, timeout=None)

    @property
    def name(self) -> str:
        """The judge, as errors name it."""
        return f"judge {self.model} at {self.base_url}"

    def error(self, problem: str, remedy: str) -> JudgeError:
        """The error of a judge that cannot be asked on."""
        return JudgeError(f"{self.name}: {problem}; {remedy}")

    def stop(self, error: MisdirectionError) -> None:
        """Ask nothing more; what is under way is finished, and the first error stands."""
        self.stopped = self.stopped or error

    @contextmanager
    def told_when_silent(self) -> Iterator[None]:
        """Warns once where nothing has come back `PATIENCE` seconds after the context began."""
        late = asyncio.get_running_loop().call_later(PATIENCE, self._tell_late)
        try:
            yield
        finally:
            late.cancel()

    def _tell_late(self) -> None:
        if not self.is_there:
            log.warning(
                "%s: took the connection and says nothing yet; given up after two timeouts, %g s",
                self.name,
                2 * self.timeout,
            )

    async def reply(self, prompt: Prompt, name: str, parameters: dict[str, Any]) -> Reply:
        """The reply to one request, after as many attempts as it takes.

        Args:
            prompt: what is asked.
            name: of this request among those about the prompt.
            parameters: of the request.

        Raises:
            Lost: every attempt failed, or the request was refused or declined.
            JudgeError: the endpoint refuses key, credit or address, or is silent.
            InputError: all calls that are allowed are made.
        """
        messages = [{"role": "user", "content": prompt.text}]
        body = {"model": self.model, "messages": messages, **parameters}
        asked = "-".join(f"{key}={value}" for key, value in parameters.items())
        headers = {"Idempotency-Key": f"{prompt.key}-{name}-{asked}"}
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Passing), stop=self._has_tried_enough, wait=self._wait, reraise=True
        )
        try:
            reply: Reply = await retrying(self._request, prompt, body, headers)
        except _Passing as passing:
            raise Lost(passing.reason, passing.detail) from None
        return reply

    def _has_tried_enough(self, state: RetryCallState) -> bool:
        """An endpoint that has never said anything is not waited for."""
        is_dead = not self.is_there and (state.seconds_since_start or 0.0) > PATIENCE
        return is_dead or self._silence.is_long(_now()) or state.attempt_number >= self.attempts

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Passing) else None
        drawn = wait_random_exponential(self.backoff, max(LONGEST_WAIT, self.backoff))(state)
        return drawn if asked is None else asked

    async def _request(self, prompt: Prompt, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        if self.stopped:
            raise Lost("stopped")
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise InputError(
                f"{self.name}: all of the {self.max_calls} calls allowed are made; raise max_calls to judge the rest"
            )
        self.calls += 1
        begun = _now()
        try:
            async with asyncio.timeout(self.timeout):
                raw = await self.client.chat.completions.with_raw_response.create(extra_headers=headers, **body)
            self._silence.heard(_now())
            reply = Reply.model_validate_json(raw.text)
        except (TimeoutError, openai.APITimeoutError):
            raise self._missed(prompt, begun) from None
        except openai.APIConnectionError:
            raise _Passing("connection lost") from None
        except openai.APIStatusError as error:
            # The server tells that it did not do the work.
            self.calls -= 1
            raise self._refusal(error) from None
        except ValidationError as error:
            raise self._no_reply(raw.text, error) from None
        self.is_there = True
        if reply.choices[0].finish_reason == "error":
            raise _Passing("an error in the reply")
        self.has_replied = True
        return reply

    def _missed(self, prompt: Prompt, begun: float) -> Exception:
        """The exception that a request without a reply stands for."""
        self._silence.missed(prompt.key, begun)
        if not self._silence.is_endless(_now()):
            return _Passing("timeout")
        return self.error(
            f"is silent: no reply within two timeouts, {2 * self.timeout:g} s, whatever it was asked",
            "see to it, or raise the timeout, and judge again, which goes on from here",
        )

    def _no_reply(self, body: str, error: ValidationError) -> Exception:
        if error.errors()[0]["type"] == "json_invalid":
            return _Passing("no JSON")
        # Some hosts send an error with the status of a success.
        try:
            words = Problem.model_validate_json(body).words
        except ValidationError:
            words = ""
        return _Passing("no completion", detail=self._quoted(words))

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """The exception that an error status stands for: try again, give this answer up, or stop."""
        self.is_there = True
        self._silence.heard(_now())
        status = error.status_code
        name = f"HTTP {status}"
        if error.code == "insufficient_quota":
            return self.error(f"{name}, the quota is used up", _FINAL[402])
        if status in _PASSING or (status >= 500 and status != 501):
            wait = retry_after(error.response.headers)
            return Lost(f"{name}, wait too long") if wait and wait > LONGEST_RETRY_AFTER else _Passing(name, wait)
        words = server_message(error)
        detail = self._quoted(words)
        if status in (401, 402):
            # What a server says to a key may hold a part of it.
            return self.error(name, _NO_JUDGE if is_html(error) else _FINAL[status])
        if declines(f"{error.code} {words}") and not is_html(error):
            return Declined(f"{name}, filtered", detail)
        remedy = _NO_JUDGE if is_html(error) else _FINAL.get(status)
        return Refused(name, detail, error.param if isinstance(error.param, str) else words, remedy)

    def _quoted(self, message: str) -> str:
        """The beginning of what a server says, which may be anything, and may hold what it was sent."""
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())
        return self.without_key(line)[:160]

    def without_key(self, text: str) -> str:
        """A text that came back, in which the key may stand."""
        return text.replace(self.key, "[key]") if self.key != NO_KEY else text
