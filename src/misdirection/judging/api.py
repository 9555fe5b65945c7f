"""A judge behind any OpenAI-style endpoint: OpenAI itself, vLLM, Ollama, llama.cpp, ...

How prompts become verdicts, by log-probabilities or by texts; `connection` sends the single requests.
"""

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

from misdirection.errors import InputError, JudgeError, MisdirectionError
from misdirection.judging.connection import KEY_VARIABLE, NO_KEY, Connection, Declined, Lost, Refused
from misdirection.judging.endpoint import Dialect, require_listener
from misdirection.judging.judges import OPENAI_URL, Done, Judge, Prompt
from misdirection.judging.replies import Choice, Reply, Usage, splits_numbers, wants_more_tokens
from misdirection.judging.verdicts import SNAPSHOT, JudgeVerdict, from_logprobs, from_texts

FIRST_TOKENS = 16
"""Reply tokens where the first one's log-probabilities are read: some hosts refuse fewer."""

REPLY_TOKENS = (16, 1024, 8192)
"""Reply tokens where the text is read; the next size is tried when a model that reasons used all of one."""

FAILURES_IN_A_ROW = 20
"""From so many answers failed one after another on, the judge is out of order and the rest is not tried."""

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
        key = _key(self.base_url)
        connection = Connection(self.model, self.base_url, key, self.timeout, self.attempts, self.backoff, max_calls)
        require_listener(self.base_url, connection.name)
        run = _Run(self, connection, done, len(prompts))
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
    return key or NO_KEY


def _is_openai(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    return host.endswith((".openai.com", ".openai.azure.com"))


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
    """All prompts of one `ask`, with what is learned on the way of how the endpoint is best asked."""

    def __init__(self, judge: ApiJudge, connection: Connection, done: Done, waiting: int) -> None:
        self._judge = judge
        self._connection = connection
        self._done = done
        self._waiting = waiting
        self._dialect = Dialect("max_completion_tokens" if _is_openai(judge.base_url) else "max_tokens")
        self._reads_logprobs = judge.logprobs
        self._has_logprobs = False
        self._size = 0
        self._in_a_row = Counter[str]()
        self._told: set[str] = set()

    async def all(self, prompts: Sequence[Prompt], concurrency: int) -> None:
        async with self._connection.client:
            queue = iter(prompts)
            with self._connection.told_when_silent():
                await self._worker(iter([next(queue)]))
            self._check_budget()
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, self._waiting)):
                    group.create_task(self._worker(queue))
        if self._connection.stopped:
            raise self._connection.stopped from None

    def stop(self) -> None:
        """Asks nothing more; what is under way is finished."""
        self._connection.stop(self._connection.error("stopped", "judge again, which goes on from here"))

    async def _worker(self, queue: Iterator[Prompt]) -> None:
        """Judge what is next until there is none. After a stop, what is under way is finished: it is paid for."""
        while not self._connection.stopped and (prompt := next(queue, None)):
            try:
                verdict = await self._verdict(prompt)
                self._waiting -= 1
                self._done(prompt, verdict)
                self._watch(verdict)
            except MisdirectionError as error:
                self._connection.stop(error)

    def _watch(self, verdict: JudgeVerdict) -> None:
        if verdict.by != "failed":
            self._in_a_row.clear()
            return
        self._in_a_row[verdict.reason] += 1
        if self._in_a_row.total() >= FAILURES_IN_A_ROW:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._in_a_row.most_common())
            raise self._connection.error(
                f"{self._in_a_row.total()} answers in a row failed ({counts})",
                "see to it and judge again, which goes on from here",
            )

    def _check_budget(self) -> None:
        """Stops early when the endpoint turns out to take more calls than allowed."""
        connection, allowed = self._connection, self._connection.max_calls
        needed = connection.calls + self._waiting * (1 if self._reads_logprobs else self._judge.samples)
        if not connection.stopped and allowed is not None and needed > allowed:
            raise InputError(
                f"{connection.name}: it turns out to take {needed} calls, more than the {allowed} allowed; "
                "raise max_calls or take fewer samples"
            )

    async def _verdict(self, prompt: Prompt) -> JudgeVerdict:
        spent = _Spent()
        try:
            verdict = await self._by_logprobs(prompt, spent) if self._reads_logprobs else None
            verdict = verdict or await self._by_text(prompt, spent)
        except Lost as lost:
            self._tell(lost)
            by = "declined" if isinstance(lost, Declined) else "failed"
            verdict = JudgeVerdict(None, by, lost.reason)
            spent.said.append({by: lost.reason, "detail": lost.detail})
        made = spent.of(verdict)
        return replace(made, reply=self._connection.without_key(made.reply))

    def _tell(self, lost: Lost) -> None:
        """Shows once what the server says to a kind of failure."""
        if lost.detail and lost.reason not in self._told:
            self._told.add(lost.reason)
            log.warning("judge %s: an answer failed with %s: %s", self._judge.model, lost.reason, lost.detail)

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
        raise Lost(f"no reply within {REPLY_TOKENS[-1]} tokens")

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
                reply = await self._connection.reply(prompt, name, parameters)
            except Refused as refused:
                if wants_more_tokens(refused.detail):
                    return Choice(finish_reason="length")
                other = dialect.without(refused.named, parameters)
                if other is None and refused.remedy and not self._connection.has_replied:
                    raise self._connection.error(f"{refused.reason} ({refused.detail})", refused.remedy) from None
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
