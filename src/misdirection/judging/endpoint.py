"""An OpenAI-style endpoint from outside: whether anybody listens at its address, and how it lets itself be asked."""

import re
import socket
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from misdirection.errors import JudgeError, first_line
from misdirection.judging.verdicts import TOP

PATIENCE = 6.0
"""Seconds until an address that takes no connection is said to be dead, and a first reply to be late."""

_PORTS = {"http": 80, "https": 443}
_SOCKS = 1080
_FEWER = {TOP: 5, 5: 0}
"""Some hosts give the five likeliest tokens at most."""

_OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


def require_listener(url: str, name: str) -> None:
    """Raises `JudgeError` that begins with `name` when an address, or the proxy before it, takes no connection.

    A name that is looked up slowly counts, too. Nothing is sent.
    """
    address = _first_stop(urlsplit(url))
    failures = [f"no connection within {PATIENCE:g} s"]

    def connect() -> None:
        try:
            port = address.port or _PORTS.get(address.scheme, _SOCKS)
            socket.create_connection((address.hostname, port), timeout=PATIENCE).close()
            failures.clear()
        # Of a name that is none: UnicodeError.
        except (OSError, UnicodeError) as error:
            failures[:] = [getattr(error, "strerror", None) or first_line(error)]

    # Nothing ends a look-up of a name: a thread that is no daemon would hold the process until it is done.
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failures:
        at = f"{address.hostname}:{address.port}" if address.port else f"{address.hostname}"
        raise JudgeError(
            f"{name}: nobody answers at {at} ({failures[0]}); start the server, or check the base URL and the network"
        )


def _first_stop(url: SplitResult) -> SplitResult:
    """Where a connection goes first: the proxy that the environment names, or the address itself."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.hostname or ""):
        return url
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


@dataclass
class Silence:
    """For how long an endpoint has left everything unanswered that it was asked; times are of one clock, in seconds.

    It is taken for the end after two timeouts in which several answers were asked for: one alone may be what a judge
    hangs on. After three the same answer is not tried again, so that where they are asked for one by one it takes four.

    Attributes:
        timeout: until a whole reply must be there.
    """

    timeout: float
    _heard: float = 0.0
    _since: float | None = None
    _asked: set[str] = field(default_factory=set)

    def heard(self, now: float) -> None:
        """Note that a reply has come, of whatever kind."""
        self._heard, self._since = now, None
        self._asked.clear()

    def missed(self, key: str, begun: float) -> None:
        """Note that no reply came to a request for the answer `key`, which began then."""
        self._since = max(begun, self._heard) if self._since is None else self._since
        self._asked.add(key)

    def is_endless(self, now: float) -> bool:
        """Whether it is to be taken for the end."""
        return len(self._asked) > 1 and self._lasts(now, 2)

    def is_long(self, now: float) -> bool:
        """Whether it is no use to ask for the same answer again."""
        return self._lasts(now, 3)

    def _lasts(self, now: float, timeouts: int) -> bool:
        return self._since is not None and now - self._since >= timeouts * self.timeout


@dataclass(frozen=True)
class Dialect:
    """The parameters that an endpoint takes; what it refuses is left out from then on.

    Attributes:
        limit: its name for the most tokens of a reply.
        top: log-probabilities of so many tokens are asked for; 0 for none.
        temperature: whether one is given.
    """

    limit: str
    top: int = TOP
    temperature: bool = True
    changed_limit: bool = False

    def parameters(self, tokens: int, temperature: float, *, logprobs: bool) -> dict[str, Any]:
        """The parameters of one request."""
        heat = {"temperature": temperature} if self.temperature else {}
        asked = {"logprobs": True, "top_logprobs": self.top} if logprobs else {}
        return {self.limit: tokens, **heat, **asked}

    def without(self, refused: str, parameters: dict[str, Any]) -> Self | None:
        """The next way to ask after a refusal; None when it names no parameter that can be left out or changed.

        Args:
            refused: the name of a parameter, or the server's words.
            parameters: those of the request that was refused.
        """
        if "logprobs" in parameters and re.search(r"log[ _-]?prob", refused, re.I):
            return replace(self, top=_FEWER[self.top])
        if "temperature" in parameters and "temperature" in refused.lower():
            return replace(self, temperature=False)
        if not self.changed_limit and re.search(r"max_(completion_)?tokens", refused):
            return replace(self, limit=_OTHER_LIMIT[self.limit], changed_limit=True)
        return None

    def __str__(self) -> str:
        parts = [self.limit if self.changed_limit else "", "" if self.temperature else "no temperature"]
        return ", ".join(filter(None, [*parts, f"{self.top} log-probabilities" if 0 < self.top < TOP else ""]))
