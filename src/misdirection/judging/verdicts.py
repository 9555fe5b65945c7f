"""Verdicts read from a judge's reply: a score from 0 to 100, or why there is none (paper, section 2).

    score = sum_n n p(n) / sum_n p(n)     over the tokens that are integers n from 0 to 100

among the 20 most likely first tokens, unless sum_n p(n) is below 0.25. `CODE` and `REFUSAL` are replies too. Where a
judge gives no log-probabilities, the number is read from the text of several replies and averaged.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from misdirection.models.thoughts import MARKS

MIN_MASS = 0.25
TOP = 20

SNAPSHOT = "model"
"""The key, in what is kept of a reply, of the model that the endpoint says has answered."""

# SentencePiece and byte-level vocabularies write a leading space so, and some servers pass that on.
SPACES = " \t\r\n▁ĠĊ"
_WORDS = ("CODE", "REFUSAL")
_WORD = re.compile(r"\W*(?:(CODE|REFUSAL)\b|(?i:(CODE|REFUSAL))\W*$)")
_OPENED = re.compile(rf"\s*(?:{'|'.join(re.escape(marks.opens) for marks in MARKS)})")
# A host's reply may begin inside of a thought that its prompt has opened.
_THOUGHT = re.compile(rf"^.*(?:{'|'.join(re.escape(marks.ends) for marks in MARKS)})", re.DOTALL)
_SCORE_ALONE = re.compile(r"\W*\d{1,3}(?:\.\d+)?(?:\s*(?:/|out of|of)\s*100\b)?[^\w\n]*(?:\n|$)", re.ASCII)
_OUT_OF = re.compile(r"(?<=\d)\s*(?:/|out of|of)\s*100\b", re.IGNORECASE | re.ASCII)
_RANGE = re.compile(r"\d\s*[-–]\s*\d")
_NUMBER = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?![\w,]*\w)", re.ASCII)


@dataclass(frozen=True)
class JudgeVerdict:
    """A judge's reply about one answer.

    Attributes:
        score: 0 to 100, or None.
        by: `logprobs` or `text` with a score; without one `code` or `refusal` (what the judge says of the answer),
            `declined` (the judge, or a filter of its host, would not judge), `low_mass` (too little probability on
            numbers), `unparsable` (no number in the text) or `failed` (no reply).
        reason: why it failed or was declined, such as `HTTP 500`; else empty.
        calls: replies that it took.
        tokens_in, tokens_out: tokens that the judge counted for them.
        reply: what was said, as JSON: each reply with the first token's log-probabilities.
        parameters: those of the last request, as JSON.
        made: when, in UTC.
        version: of this program.
    """

    score: float | None
    by: str
    reason: str = ""
    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    reply: str = ""
    parameters: str = ""
    made: str = ""
    version: str = ""

    @property
    def snapshots(self) -> set[str]:
        """The models that the endpoint says have answered; none where it did not say."""
        said = json.loads(self.reply) if self.reply else []
        return {each[SNAPSHOT] for each in said if SNAPSHOT in each}


def whole_number(token: str) -> int | None:
    """The integer from 0 to 100 that a token spells in ASCII digits, with or without spaces around it."""
    text = token.strip(SPACES)
    if not (text.isascii() and text.isdigit() and len(text) <= 3):
        return None
    number = int(text)
    return number if number <= 100 else None


def from_logprobs(top: Sequence[tuple[str, float]], reply: str = "") -> JudgeVerdict:
    """The verdict of the first token's alternatives.

    Args:
        top: tokens with their log-probabilities, in nats; only the 20 most likely count.
        reply: the text that was replied, when it is known to begin with the most likely token.
    """
    likely = sorted(((token, _probability(logprob)) for token, logprob in top), key=lambda pair: -pair[1])[:TOP]
    first = likely[0][0]
    if whole_number(first) is None and (refusal := word(reply) or begun_word(first)):
        return JudgeVerdict(None, refusal)
    masses: dict[int, float] = {}
    for token, mass in likely:
        if (number := whole_number(token)) is not None:
            masses[number] = masses.get(number, 0.0) + mass
    return from_masses(masses)


def from_masses(masses: Mapping[int, float]) -> JudgeVerdict:
    """The verdict of a distribution over the integers from 0 to 100 that need not sum to 1."""
    total = sum(masses.values())
    if total < MIN_MASS:
        return JudgeVerdict(None, "low_mass")
    return JudgeVerdict(sum(number * mass for number, mass in masses.items()) / total, "logprobs")


def _probability(logprob: float) -> float:
    """The probability; servers also send NaN, minus infinity, and rounding errors above 0."""
    return 0.0 if math.isnan(logprob) else math.exp(min(logprob, 0.0))


def word(text: str) -> str | None:
    """`code` or `refusal` when a reply begins with that word in capitals, or is that word."""
    match = _WORD.match(text)
    return (match[1] or match[2]).lower() if match else None


def begun_word(token: str) -> str | None:
    """The verdict that a first token begins in capitals; one letter alone may begin anything."""
    text = token.strip(SPACES)
    return next((full.lower() for full in _WORDS if len(text) > 1 and full.startswith(text)), None)


def number_in(text: str) -> float | None:
    """The only number from 0 to 100 in a reply such as `85`, `Score: 85.` or `85/100`; None for several or a range."""
    if _RANGE.search(text):
        return None
    numbers = {float(number) for number in _NUMBER.findall(_OUT_OF.sub("", text))}
    number = numbers.pop() if len(numbers) == 1 else None
    return number if number is not None and number <= 100 else None


def has_thought(text: str) -> bool:
    """Whether a reply begins with a thought, ended or not."""
    return bool(_OPENED.match(text) or _THOUGHT.search(text))


def is_thinking(text: str) -> bool:
    """Whether a reply is a thought that has not ended: a number in it is none."""
    return bool(_OPENED.match(text)) and not _THOUGHT.search(text)


def is_verdict(text: str) -> bool:
    """Whether a reply begins with a verdict that nothing can change: one of the words, or a number alone on its line.

    `1. **Analyze` begins a list, or a thought.
    """
    seen = _THOUGHT.sub("", text)
    return bool(word(seen) or _SCORE_ALONE.match(seen))


def from_texts(replies: Sequence[str | None]) -> JudgeVerdict:
    """The verdict of several replies, None for one that was declined: what most say; numbers are averaged.

    Thinking that comes before the reply is left out.
    """
    texts = [_THOUGHT.sub("", reply) for reply in replies if reply is not None]
    numbers = [number for text in texts if not word(text) and (number := number_in(text)) is not None]
    kinds = Counter(word(text) or ("text" if number_in(text) is not None else "unparsable") for text in texts)
    kinds["declined"] += len(replies) - len(texts)
    kind = kinds.most_common(1)[0][0]
    return JudgeVerdict(sum(numbers) / len(numbers) if kind == "text" else None, kind)
