"""A judge behind any OpenAI-style endpoint: OpenAI itself, vLLM, Ollama, llama.cpp, ..."""

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from misdirection.errors import InputError, JudgeError, MisdirectionError
from misdirection.extras import needed_for
from misdirection.judging.endpoint import PATIENCE, Dialect, Silence, require_listener
from misdirection.judging.judges import OPENAI_URL, Done, Judge, Prompt
from misdirection.judging.replies import (
    Choice,
    Problem,
    Reply,
    Usage,
    declines,
    is_html,
    retry_after,
    server_message,
    splits_numbers,
    wants_more_tokens,
)
from misdirection.judging.verdicts import SNAPSHOT, JudgeVerdict, from_logprobs, from_texts

with needed_for("judge"):
    import openai
    from tenacity import (
        AsyncRetrying,
        RetryCallState,
        retry_if_exception_type,
        wait_random_exponential,
    )

KEY_VARIABLE = "OPENAI_API_KEY"

FIRST_TOKENS = 16
"""Reply tokens where the first one's log-probabilities are read: some hosts refuse fewer."""

REPLY_TOKENS = (16, 1024, 8192)
"""Reply tokens where the text is read; the next size is tried when a model that reasons used all of one."""

LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds. A server that asks to wait longer is taken to have failed."""

FAILURES_IN_A_ROW = 20
"""From so many answers failed one after another on, the judge is out of order and the rest is not tried."""

_NO_KEY = "none"
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


@dataclass(frozen=True)
class ApiJudge(Judge):
    """A model of an OpenAI-style endpoint.

    The key is read from the environment variable OPENAI_API_KEY when judging begins, and kept nowhere. Endpoints other
    than OpenAI's get a placeholder when there is none.

    Attributes:
        model: the endpoint's name of it.
        base_url: by default the environment variable OPENAI_BASE_URL, else OpenAI's.
        logprobs: ask for log-probabilities; without them, and where an endpoint gives none, the text is read.
        samples: replies that are averaged where the text is read, sampled at temperature 1.
        timeout: seconds until a whole reply must be there; an endpoint without any for two to four of them is given up.
        attempts: requests for one reply before it counts as failed.
        backoff: seconds before the second attempt; doubled for each further one, up to a minute, and drawn at random.

    Raises `InputError` for an address that is none or holds a password, and numbers out of range.
    """

    OPTIONS = frozenset({"base_url", "logprobs", "samples", "timeout"})

    model: str
    base_url: str = field(default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    logprobs: bool = True
    samples: int = 5
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        # What stands before an @ may be a password, whatever the rest looks like.
        shown = self.base_url.rpartition("@")[2]
        if shown != self.base_url or "?" in self.base_url:
            raise InputError(
                f"judge's base URL at {shown.partition('?')[0]}: no password, user or query in it; set {KEY_VARIABLE}"
            )
        if not _is_address(self.base_url):
            raise InputError(f"judge's base URL {self.base_url!r}: write it out, like {OPENAI_URL}")
        for name in ("samples", "timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise InputError(f"judge's {name} is {getattr(self, name)}; it must be above 0")

    @property
    def identity(self) -> Mapping[str, object]:
        """Address, model, and how it is asked."""
        asked: dict[str, object] = {"logprobs": True} if self.logprobs else {}
        return {"base_url": self.base_url.rstrip("/"), "model": self.model, "samples": self.samples, **asked}

    @property
    def record(self) -> Mapping[str, object]:
        """As `identity`, but of the address only the host: a path may name an account."""
        asked = {name: value for name, value in self.identity.items() if name != "base_url"}
        return {**asked, "host": urlsplit(self.base_url).netloc}

    @classmethod
    def check(cls, name: str, **options: Any) -> None:
        """Warns also of a key that is missing; that is no reason to stop, since cached verdicts need none."""
        if _is_openai(cls.open(name, **options).base_url) and not os.environ.get(KEY_VARIABLE, "").strip():
            log.warning("judge: OpenAI's endpoint wants a key, and %s is not set", KEY_VARIABLE)

    @property
    def calls_each(self) -> int:
        """1 with log-probabilities, else the number of samples."""
        return 1 if self.logprobs else self.samples

    @property
    def reply_tokens(self) -> int:
        """Few: a reply is one number."""
        return FIRST_TOKENS if self.logprobs else REPLY_TOKENS[0]

    def ask(self, prompts: Sequence[Prompt], done: Done, *, concurrency: int, max_calls: int | None) -> None:
        """See `Judge`. The first prompt goes alone: a wrong key, name or address costs one request.

        Raises:
            JudgeError: no key for OpenAI's own endpoint; nobody at the address; the endpoint refuses key, credit, model
                or address, or is silent; 20 answers in a row failed.
            InputError: `max_calls` would not be enough.
        """
        run = _Run(self, _key(self.base_url), done, max_calls, len(prompts))
        require_listener(self.base_url, run.name)
        _run_anywhere(run.all(prompts, concurrency), run.stop)


def _run_anywhere(work: Any, stop: Callable[[], None]) -> None:
    """Runs a coroutine to its end, also from a notebook, whose thread has a loop of its own; an interrupt stops it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            try:
                pool.submit(asyncio.run, work).result()
            except BaseException:
                stop()
                raise


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        if url.split() != [url]:
            return False
        # Reading the port checks that it is a number.
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.fragment
    except ValueError:
        return False


def _key(base_url: str) -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and _is_openai(base_url):
        raise JudgeError(f"{base_url} wants a key: set the environment variable {KEY_VARIABLE}")
    # A header with other characters is refused by a library whose message would quote it.
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise JudgeError(f"{KEY_VARIABLE} holds characters that no key has; set it again")
    return key or _NO_KEY


def _is_openai(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return host.endswith((".openai.com", ".openai.azure.com"))


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Passing(Exception):
    """A failure that may pass: worth another attempt."""

    def __init__(self, reason: str, wait: float | None = None, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.detail = detail


class _Lost(Exception):
    """This answer has no verdict, for the given reason; others may have one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class _Declined(_Lost):
    """The host's filter would not let the judge see this answer."""


class _Refused(_Lost):
    """The request was refused; `named` is the cause by the server's words, `remedy` what helps where none is taken."""

    def __init__(self, reason: str, detail: str, named: str, remedy: str | None) -> None:
        super().__init__(reason, detail)
        self.named = named
        self.remedy = remedy


@dataclass
class _Spent:
    """The calls and tokens that one answer has taken, and what was said."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    said: list[dict[str, Any]] = field(default_factory=list)

    def add(self, reply: Reply, parameters: dict[str, Any]) -> None:
        usage = reply.usage or Usage()
        self.calls += 1
        self.tokens_in += usage.prompt_tokens
        self.tokens_out += usage.completion_tokens
        self.parameters = parameters
        self.said.append(reply.choices[0].kept() | ({SNAPSHOT: reply.model} if reply.model else {}))

    def of(self, verdict: JudgeVerdict) -> JudgeVerdict:
        """The verdict with all that was spent on it."""
        return replace(
            verdict,
            calls=self.calls,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            reply=json.dumps(self.said),
            parameters=json.dumps(self.parameters) if self.parameters else "",
        )


class _Run:
    """All prompts of one `ask`, with what is learned about the endpoint on the way."""

    def __init__(self, judge: ApiJudge, key: str, done: Done, max_calls: int | None, waiting: int) -> None:
        self._judge = judge
        self._key = key
        self._done = done
        self._max_calls = max_calls
        self._calls = 0
        self._waiting = waiting
        self._dialect = Dialect("max_completion_tokens" if _is_openai(judge.base_url) else "max_tokens")
        self._reads_logprobs = judge.logprobs
        self._has_logprobs = False
        self._size = 0
        # Whether it has replied; an error is none.
        self._has_replied = False
        self._is_there = False
        self._silence = Silence(judge.timeout)
        self._in_a_row = Counter[str]()
        self._told: set[str] = set()
        self._stopped: MisdirectionError | None = None

    async def all(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        # The timeout of the client is per read: a server that sends a byte now and then would hold it for ever.
        client = openai.AsyncOpenAI(api_key=self._key, base_url=self._judge.base_url, max_retries=0, timeout=None)
        async with client:
            self._client = client
            queue = iter(prompts)
            late = asyncio.get_running_loop().call_later(PATIENCE, self._tell_late)
            await self._worker(iter([next(queue)]))
            late.cancel()
            self._check_budget()
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, self._waiting)):
                    group.create_task(self._worker(queue))
        if self._stopped:
            raise self._stopped from None

    def stop(self) -> None:
        """Asks nothing more; what is under way is finished."""
        self._stopped = self._stopped or self._error("stopped", "judge again, which goes on from here")

    async def _worker(self, queue: Iterator[Prompt]) -> None:
        """Judge what is next until there is none. After a stop, what is under way is finished: it is paid for."""
        while not self._stopped and (prompt := next(queue, None)):
            try:
                verdict = await self._verdict(prompt)
                self._waiting -= 1
                self._done(prompt, verdict)
                self._watch(verdict)
            except MisdirectionError as error:
                self._stopped = self._stopped or error

    def _watch(self, verdict: JudgeVerdict) -> None:
        if verdict.by != "failed":
            self._in_a_row.clear()
            return
        self._in_a_row[verdict.reason] += 1
        if self._in_a_row.total() >= FAILURES_IN_A_ROW:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._in_a_row.most_common())
            raise self._error(
                f"{self._in_a_row.total()} answers in a row failed ({counts})",
                "see to it and judge again, which goes on from here",
            )

    def _check_budget(self) -> None:
        """Stops early when the endpoint turns out to take more calls than allowed."""
        needed = self._calls + self._waiting * (1 if self._reads_logprobs else self._judge.samples)
        if not self._stopped and self._max_calls is not None and needed > self._max_calls:
            raise InputError(
                f"{self.name}: it turns out to take {needed} calls, more than the {self._max_calls} allowed; "
                "raise max_calls or take fewer samples"
            )

    async def _verdict(self, prompt: Prompt) -> JudgeVerdict:
        spent = _Spent()
        try:
            verdict = await self._by_logprobs(prompt, spent) if self._reads_logprobs else None
            verdict = verdict or await self._by_text(prompt, spent)
        except _Lost as lost:
            self._tell(lost)
            by = "declined" if isinstance(lost, _Declined) else "failed"
            verdict = JudgeVerdict(None, by, lost.reason)
            spent.said.append({by: lost.reason, "detail": lost.detail})
        made = spent.of(verdict)
        return replace(made, reply=self._without_key(made.reply))

    def _tell(self, lost: _Lost) -> None:
        """Shows once what the server says to a kind of failure."""
        if lost.detail and lost.reason not in self._told:
            self._told.add(lost.reason)
            log.warning("judge %s: an answer failed with %s: %s", self._judge.model, lost.reason, lost.detail)

    def _tell_late(self) -> None:
        if not self._is_there:
            log.warning(
                "%s: took the connection and says nothing yet; given up after two timeouts, %g s",
                self.name,
                2 * self._judge.timeout,
            )

    async def _by_logprobs(self, prompt: Prompt, spent: _Spent) -> JudgeVerdict | None:
        """None when no log-probabilities tell the number; the text is read then, of the next prompts at once.

        An endpoint that has given some before may stand for several servers, not all of which do: it is asked again.
        """
        choice = await self._reply(prompt, "logprobs", FIRST_TOKENS, 0, spent, logprobs=True)
        if choice and choice.is_declined:
            return JudgeVerdict(None, "declined", "the judge's own refusal")
        splits = bool(choice and splits_numbers(choice.tokens))
        if choice and choice.begins_visibly and not splits:
            self._has_logprobs = True
            return from_logprobs(choice.tokens[0].likely, choice.text)
        if self._reads_logprobs and (splits or not self._has_logprobs):
            self._reads_logprobs = False
            said = "judge %s: no log-probabilities that tell a score; the texts of %d replies are read instead"
            log.warning(said, self._judge.model, self._judge.samples)
        return None

    async def _by_text(self, prompt: Prompt, spent: _Spent) -> JudgeVerdict:
        texts = [await self._text(prompt, number, spent) for number in range(self._judge.samples)]
        verdict = from_texts(texts)
        return replace(verdict, reason="the judge's own refusal") if verdict.by == "declined" else verdict

    async def _text(self, prompt: Prompt, number: int, spent: _Spent) -> str | None:
        """One reply, None for a declined one; a judge that has not said it within its tokens gets more of them."""
        for size in range(self._size, len(REPLY_TOKENS)):
            choice = await self._reply(prompt, f"text-{number}", REPLY_TOKENS[size], 1, spent)
            if not choice or choice.is_declined:
                return None
            if choice.is_whole:
                return choice.text
            self._size = max(self._size, min(size + 1, len(REPLY_TOKENS) - 1))
        raise _Lost(f"no reply within {REPLY_TOKENS[-1]} tokens")

    async def _reply(
        self, prompt: Prompt, name: str, tokens: int, temperature: float, spent: _Spent, *, logprobs: bool = False
    ) -> Choice | None:
        """The reply to one request; None where the endpoint refuses to give log-probabilities.

        A parameter that it refuses is left out, and from then on where that has helped.
        """
        dialect = self._dialect
        while dialect.top or not logprobs:
            parameters = dialect.parameters(tokens, temperature, logprobs=logprobs)
            try:
                reply = await self._attempts(prompt, name, parameters)
            except _Refused as refused:
                if wants_more_tokens(refused.detail):
                    return Choice(finish_reason="length")
                other = dialect.without(refused.named, parameters)
                if other is None and refused.remedy and not self._has_replied:
                    raise self._error(f"{refused.reason} ({refused.detail})", refused.remedy) from None
                if other is None:
                    raise
                dialect = other
                continue
            self._learn(dialect)
            spent.add(reply, parameters)
            return reply.choices[0]
        return None

    def _learn(self, dialect: Dialect) -> None:
        if dialect != self._dialect:
            self._dialect = dialect
            log.warning("judge %s: refuses some parameters; asked with %s", self._judge.model, dialect)

    async def _attempts(self, prompt: Prompt, name: str, parameters: dict[str, Any]) -> Reply:
        """The reply to one request, after as many attempts as it takes."""
        messages = [{"role": "user", "content": prompt.text}]
        body = {"model": self._judge.model, "messages": messages, **parameters}
        asked = "-".join(f"{key}={value}" for key, value in parameters.items())
        headers = {"Idempotency-Key": f"{prompt.key}-{name}-{asked}"}
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Passing), stop=self._has_tried_enough, wait=self._wait, reraise=True
        )
        try:
            reply: Reply = await retrying(self._request, prompt, body, headers)
        except _Passing as passing:
            raise _Lost(passing.reason, passing.detail) from None
        return reply

    def _has_tried_enough(self, state: RetryCallState) -> bool:
        """An endpoint that has never said anything is not waited for."""
        is_dead = not self._is_there and (state.seconds_since_start or 0.0) > PATIENCE
        return is_dead or self._silence.is_long(_now()) or state.attempt_number >= self._judge.attempts

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Passing) else None
        drawn = wait_random_exponential(self._judge.backoff, max(LONGEST_WAIT, self._judge.backoff))(state)
        return drawn if asked is None else asked

    async def _request(self, prompt: Prompt, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        """One request; what is raised holds neither key nor answer, and no error of a library that does."""
        if self._stopped:
            raise _Lost("stopped")
        if self._max_calls is not None and self._calls >= self._max_calls:
            raise InputError(
                f"{self.name}: all of the {self._max_calls} calls allowed are made; raise max_calls to judge the rest"
            )
        self._calls += 1
        begun = _now()
        try:
            async with asyncio.timeout(self._judge.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(extra_headers=headers, **body)
            self._silence.heard(_now())
            reply = Reply.model_validate_json(raw.text)
        except (TimeoutError, openai.APITimeoutError):
            raise self._missed(prompt, begun) from None
        except openai.APIConnectionError:
            raise _Passing("connection lost") from None
        except openai.APIStatusError as error:
            # The server tells that it did not do the work.
            self._calls -= 1
            raise self._refusal(error) from None
        except ValidationError as error:
            raise self._no_reply(raw.text, error) from None
        self._is_there = True
        if reply.choices[0].finish_reason == "error":
            raise _Passing("an error in the reply")
        self._has_replied = True
        return reply

    def _missed(self, prompt: Prompt, begun: float) -> Exception:
        """The exception that a request without a reply stands for."""
        self._silence.missed(prompt.key, begun)
        if not self._silence.is_endless(_now()):
            return _Passing("timeout")
        return self._error(
            f"is silent: no reply within two timeouts, {2 * self._judge.timeout:g} s, whatever it was asked",
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
        self._is_there = True
        self._silence.heard(_now())
        status = error.status_code
        name = f"HTTP {status}"
        if error.code == "insufficient_quota":
            return self._error(f"{name}, the quota is used up", _FINAL[402])
        if status in _PASSING or (status >= 500 and status != 501):
            wait = retry_after(error.response.headers)
            return _Lost(f"{name}, wait too long") if wait and wait > LONGEST_RETRY_AFTER else _Passing(name, wait)
        words = server_message(error)
        detail = self._quoted(words)
        if status in (401, 402):
            # What a server says to a key may hold a part of it.
            return self._error(name, _NO_JUDGE if is_html(error) else _FINAL[status])
        if declines(f"{error.code} {words}") and not is_html(error):
            return _Declined(f"{name}, filtered", detail)
        remedy = _NO_JUDGE if is_html(error) else _FINAL.get(status)
        return _Refused(name, detail, error.param if isinstance(error.param, str) else words, remedy)

    def _quoted(self, message: str) -> str:
        """The beginning of what a server says, which may be anything, and may hold what it was sent."""
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())
        return self._without_key(line)[:160]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key != _NO_KEY else text

    @property
    def name(self) -> str:
        """The judge, as errors name it."""
        return f"judge {self._judge.model} at {self._judge.base_url}"

    def _error(self, problem: str, remedy: str) -> JudgeError:
        return JudgeError(f"{self.name}: {problem}; {remedy}")
