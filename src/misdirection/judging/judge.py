"""Judged answers: each rubric put to a judge about each answer, asked once and kept (paper, section 2)."""

import contextlib
import hashlib
import json
import logging
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

import pandas as pd

from misdirection.errors import InputError, JudgeError
from misdirection.judging.cache import VerdictCache
from misdirection.judging.evidence import JUDGES, asked_of, by_column, columns_of, evidence, require_own
from misdirection.judging.judges import Judge, Prompt
from misdirection.judging.rubrics import Rubric, rubric_for
from misdirection.judging.scoring import NO_VERDICT, tell_mixed
from misdirection.judging.verdicts import JudgeVerdict
from misdirection.progress import Advance
from misdirection.sampling.answers import Answer, answers_frame, as_answers

CONCURRENCY = 16
SMALLEST_SHARE = 0.5
"""Share of a rubric's answers that must get a verdict; below it something is wrong with the judge, not the answers."""

PROTOCOL = 2
"""How replies are read. A part of every key: verdicts read in another way are other verdicts."""

_BYTES_PER_TOKEN = 4

# A text without a number may have one the next time, since it is sampled; a filter may let it through.
_ASKED_AGAIN = ("failed", "unparsable", "declined")

_REMEDIES = {
    "failed": "see to the judge and judge again, which asks for these",
    "declined": "take a judge whose host lets it judge such answers",
    "low_mass": "it begins with no number: have its text read (--no-logprobs), or take another judge",
    "unparsable": "it says no number: take another judge",
}

log = logging.getLogger("misdirection")


@dataclass(frozen=True)
class JudgingCost:
    """The cost of judging a table.

    Attributes:
        answers: (answer, rubric) pairs in the table.
        cached: distinct ones that the cache has.
        prompts: distinct ones that are still to be asked.
        calls: paid calls for these, retries and endpoints without log-probabilities not foreseen.
        tokens: their prompts' tokens, estimated at four bytes each.
    """

    answers: int
    cached: int
    prompts: int
    calls: int
    tokens: int

    def __add__(self, other: "JudgingCost") -> "JudgingCost":
        """Of two tables, without what they have in common."""
        return JudgingCost(*map(operator.add, astuple(self), astuple(other)))

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, about {self.tokens} tokens, for {self.prompts} of {self.answers} verdicts "
            f"({self.cached} are in the cache)"
        )


@dataclass(frozen=True)
class Judged:
    """Answers with their scores.

    Attributes:
        table: the answers with three more columns per rubric: `<column>` (float64, NaN for no score), `<column>_by`
            and `<column>_reply` (what the judge said, as JSON). Its metadata tells who judged, and how: see `evidence`.
        by: how often each way of judging occurs, per column.
        failures: why answers failed, with how many.
        calls, tokens_in, tokens_out: paid for in this run, retries included as far as a reply came.
        cached: distinct verdicts that came from the cache.
    """

    table: pd.DataFrame
    by: dict[str, dict[str, int]]
    failures: dict[str, int]
    calls: int
    tokens_in: int
    tokens_out: int
    cached: int

    def frame(self) -> pd.DataFrame:
        """The table: one row per answer."""
        return self.table


class TooFewVerdicts(JudgeError):
    """Too many answers have no verdict; `judged` holds what there is, and real verdicts are in the cache."""

    def __init__(self, message: str, judged: Judged) -> None:
        super().__init__(message)
        self.judged = judged


Rows = pd.DataFrame | Sequence[Answer]


def judging_cost(
    rows: Rows, rubrics: Sequence[Rubric], judge: Judge, *, cache: VerdictCache | None = None
) -> JudgingCost:
    """The cost of `judge` with the same arguments; nothing is sent.

    Raises `InputError` for a table that `as_answers` refuses and for an empty one.
    """
    with _opened(cache) as store:
        return _JudgedTable(_table(rows), rubrics, judge, store).cost()


def judge(
    rows: Rows,
    rubrics: Sequence[Rubric],
    judge: Judge,
    *,
    cache: VerdictCache | None = None,
    concurrency: int = CONCURRENCY,
    max_calls: int | None = None,
    progress: Advance | None = None,
) -> Judged:
    """Puts every rubric to the judge about every answer.

    The same rubric, judge, question and answer are asked once, within the table and over all runs that share the cache.
    Each verdict is in the cache as soon as it is there, and failed ones never are, so that a run that was stopped goes
    on where it was.

    Args:
        rows: a table with `question` and `answer` (or `response`), or sampled answers.
        rubrics: each with a column of its own. What the same judge has said by the same rubric is replaced.
        judge: see `judges.open_judge`.
        cache: by default the one in the package's cache folder.
        concurrency: requests under way at a time.
        max_calls: refuse to begin, and stop, rather than make more paid calls.
        progress: told the number of distinct (answer, rubric) just done.

    Raises:
        TooFewVerdicts: less than half of a rubric's answers have a verdict; it counts the reasons.
        JudgeError: a judge that refuses the request itself (key, credit, model) or is out of order; verdicts before
            that are in the cache.
        InputError: a bad table, a column that holds another judge's verdicts, no answer to the questions that a rubric
            is for, or more calls than `max_calls`.
    """
    if concurrency < 1:
        raise InputError(f"concurrency {concurrency}: at least one request must be under way; give 1 or more")
    with _opened(cache) as store:
        judging = _JudgedTable(_table(rows), rubrics, judge, store)
        cost = judging.cost()
        if max_calls is not None and cost.calls > max_calls:
            raise InputError(f"judging takes {cost}, more than the {max_calls} allowed: raise max_calls")
        judging.run(concurrency, max_calls, progress)
    judged = judging.judged()
    _require_verdicts(judged)
    tell_mixed(judged.table)
    return judged


def _opened(cache: VerdictCache | None) -> contextlib.AbstractContextManager[VerdictCache]:
    """The given cache, left open; or the default one, closed in the end."""
    return contextlib.nullcontext(cache) if cache is not None else VerdictCache()


def _table(rows: Rows) -> pd.DataFrame:
    table = as_answers(rows) if isinstance(rows, pd.DataFrame) else answers_frame(rows)
    if table.empty:
        raise InputError("this table has no answers: sample some first")
    return table


def verdict_key(rubric: Rubric, identity: Mapping[str, object], question: str, answer: str) -> str:
    """The key under which a verdict is kept: SHA-256 over rubric text, judge, question and answer, hexadecimal."""
    parts = json.dumps([PROTOCOL, rubric.prompt, identity, question, answer], sort_keys=True)
    return hashlib.sha256(parts.encode("ascii")).hexdigest()


class _JudgedTable:
    """One table to be judged: its distinct prompts, and their verdicts as they come."""

    def __init__(self, table: pd.DataFrame, rubrics: Sequence[Rubric], judge: Judge, cache: VerdictCache) -> None:
        require_own(table, judge, rubrics)
        self._table = table
        self._judge = judge
        self._cache = cache
        self._rubrics = by_column(rubrics)
        self._keys: dict[str, list[str | None]] = {}
        self._asked: dict[str, str] = {}
        prompts: dict[str, Prompt] = {}
        for column, own in self._rubrics.items():
            filled = list(self._filled(own))
            self._keys[column] = [prompt and prompt.key for prompt in filled]
            prompts |= {prompt.key: prompt for prompt in filled if prompt}
            self._require_questions(column)
        self._verdicts = cache.get(prompts)
        self._cached = len(self._verdicts)
        self._left = [prompt for key, prompt in prompts.items() if key not in self._verdicts]

    def _filled(self, rubrics: Sequence[Rubric]) -> Iterator[Prompt | None]:
        """The prompt for each row; None where no rubric is for its question."""
        identity = self._judge.identity
        asked = {rubric: json.dumps(asked_of(self._judge, [rubric])) for rubric in rubrics}
        texts = (self._table[name] for name in ("question_id", "question", "answer"))
        for question_id, question, answer in zip(*texts, strict=True):
            if (rubric := rubric_for(rubrics, question_id, question)) is None:
                yield None
                continue
            key = verdict_key(rubric, identity, question, answer)
            self._asked[key] = asked[rubric]
            yield Prompt(key, rubric.fill(question, answer), rubric.name, question, answer)

    def _require_questions(self, column: str) -> None:
        if self._keys[column].count(None) == len(self._table):
            raise InputError(
                f"{column}: its rubrics are for other questions than this table's; give the file that was asked"
            )

    def cost(self) -> JudgingCost:
        size = sum(len(prompt.text.encode("utf-8", "replace")) for prompt in self._left)
        each = self._judge.calls_each
        return JudgingCost(
            answers=sum(len(keys) - keys.count(None) for keys in self._keys.values()),
            cached=self._cached,
            prompts=len(self._left),
            calls=each * len(self._left),
            tokens=max(1, each) * -(-size // _BYTES_PER_TOKEN),
        )

    def run(self, concurrency: int, max_calls: int | None, progress: Advance | None) -> None:
        """Asks what is not in the cache."""
        for column, keys in self._keys.items():
            if unasked := keys.count(None):
                log.warning("%s: %d answers are to questions that no rubric is for: they get no score", column, unasked)
        if progress and self._cached:
            progress(self._cached)

        def done(prompt: Prompt, verdict: JudgeVerdict) -> None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._verdicts[prompt.key] = verdict = replace(verdict, made=now, version=version("misdirection"))
            if verdict.by not in _ASKED_AGAIN:
                self._cache.put(prompt.key, verdict, self._asked[prompt.key])
            if progress:
                progress(1)

        if self._left:
            self._judge.ask(self._left, done, concurrency=concurrency, max_calls=max_calls)

    def judged(self) -> Judged:
        """The table with its scores, and the counts."""
        fresh = [self._verdicts[prompt.key] for prompt in self._left]
        # Columns that are there come anew at the end, so that judging again gives the same table.
        old = [name for rubrics in self._rubrics.values() for name in columns_of(rubrics[0])]
        table = self._table.drop(columns=old, errors="ignore")
        by, records = {}, {}
        for column, rubrics in self._rubrics.items():
            verdicts = [self._verdicts[key] if key else None for key in self._keys[column]]
            score, way, reply = columns_of(rubrics[0])
            table[score] = pd.Series([verdict and verdict.score for verdict in verdicts], table.index, dtype="float64")
            table[way] = pd.Series([verdict and verdict.by for verdict in verdicts], table.index, dtype="str")
            table[reply] = pd.Series([verdict and verdict.reply for verdict in verdicts], table.index, dtype="str")
            given = [verdict for verdict in verdicts if verdict]
            by[column] = dict(Counter(verdict.by for verdict in given))
            records[column] = evidence(self._judge, rubrics, given)
        table.attrs[JUDGES] = table.attrs.get(JUDGES, {}) | records
        return Judged(
            table=table,
            by=by,
            failures=dict(Counter(verdict.reason for verdict in fresh if verdict.by == "failed").most_common()),
            calls=sum(verdict.calls for verdict in fresh),
            tokens_in=sum(verdict.tokens_in for verdict in fresh),
            tokens_out=sum(verdict.tokens_out for verdict in fresh),
            cached=self._cached,
        )


def _require_verdicts(judged: Judged) -> None:
    for column, by in judged.by.items():
        total = sum(by.values())
        lost = {name: by[name] for name in NO_VERDICT if name in by}
        if total - sum(lost.values()) < SMALLEST_SHARE * total:
            counts = ", ".join(f"{name} {count}" for name, count in (lost | judged.failures).items())
            raise TooFewVerdicts(
                f"{column}: only {total - sum(lost.values())} of {total} answers have a verdict ({counts}): "
                f"{_REMEDIES[max(lost, key=lost.__getitem__)]}",
                judged,
            )
