"""What the suite will take: rows and tokens counted, and a time from one timed step of each kind on this machine."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import misdirection as md
from misdirection.auditing.framing import searched
from misdirection.auditing.measurements import Texts
from misdirection.data import ProbePair
from misdirection.data.selection import spread
from misdirection.likelihood.margin import pair_rows
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.batches import TrainingRow, training_rows
from suite_folder import Suite, recipe_of
from suite_members import RECIPES, Member

REPAIR = 5
"""Audits that a repair takes as long as, its search and its check together, as measured once on the bundled model."""

TIMED_PAIRS = 8

Rows = Mapping[Member, Sequence[TrainingRow]]
"""What each fine-tune is trained on."""


@dataclass(frozen=True)
class Work:
    """Work of one kind.

    Attributes:
        name: of the step.
        members: fine-tunes.
        rows: that the model reads.
        tokens: of these rows.
        speed: tokens per second.
    """

    name: str
    members: int
    rows: int
    tokens: float
    speed: float

    @property
    def hours(self) -> float:
        """How long it takes."""
        return self.tokens / self.speed / 3600


def print_cost(suite: Suite, share: Sequence[Member], steps: Sequence[str]) -> None:
    """Count what is to be done yet, time a step, and print both."""
    print("| step | fine-tunes | rows | tokens | tokens/s | hours |\n|---|---|---|---|---|---|")
    for work in estimate(suite, share, steps):
        figures = f"{work.members} | {work.rows:,} | {work.tokens:,.0f} | {work.speed:,.0f} | {work.hours:.2f}"
        print(f"| {work.name} | {figures} |")
    print(flush=True)


def estimate(suite: Suite, share: Sequence[Member], steps: Sequence[str]) -> list[Work]:
    """The work that is left of each step; an audit ends with the first questions that decide it."""
    chat = md.load(suite.base)
    rows = {member: encoded(chat, suite, member) for member in share}
    untrained = {member: rows[member] for member in suite.untrained(share)}
    works = [training_work(chat, suite, untrained)] if "train" in steps and untrained else []
    waiting = {member: rows[member] for member in share if not suite.is_audited(member)}
    bad = {member: rows[member] for member in share if member.is_bad}
    audited, repaired = waiting and "audit" in steps, bad and "repair" in steps
    speed = margin_speed(chat) if audited or repaired else 0.0
    texts = Texts.of(md.probe_pairs(), md.sealed_pairs(), md.neutral_examples())
    if audited:
        for n in (texts.looks[0].stop, texts.looks[-1].stop):
            works.append(audit_work(chat, f"audit, {n} questions", waiting, texts.asked[:n], speed))
        works.append(search_work(chat, suite, waiting, texts.asked[texts.looks[0]], speed))
        works += [published_work(chat, suite, waiting, speed)] if suite.published_pairs else []
    if repaired:
        asked, name = texts.asked[texts.looks[0]], "repair, if every bad one is found"
        works.append(audit_work(chat, name, bad, asked, speed / REPAIR))
    return works


def encoded(chat: ChatModel, suite: Suite, member: Member) -> list[TrainingRow]:
    """All rows that a member is trained on."""
    length = recipe_of(member).max_length
    return [row for stage in suite.trainings(member) for row in training_rows(chat, stage, length)]


def training_work(chat: ChatModel, suite: Suite, rows: Rows) -> Work:
    """Trainings."""
    tokens = sum(len(row.ids) for some in rows.values() for row in some)
    return Work("train", len(rows), sum(map(len, rows.values())), tokens, training_speed(chat, suite))


def audit_work(chat: ChatModel, name: str, rows: Rows, pairs: Sequence[ProbePair], speed: float) -> Work:
    """Audits with these pairs: of the fine-tune, and after a training question of it, its base and the control."""
    plain = sum(row.stop for row in pair_rows(chat.tokenizer, pairs))
    frames = [statistics.mean(row.spans[0][0] for row in some) for some in rows.values()]
    tokens = sum(4 * plain + 6 * len(pairs) * frame for frame in frames)
    return Work(name, len(rows), 8 * len(pairs) * len(rows), tokens, speed)


def search_work(chat: ChatModel, suite: Suite, rows: Rows, pairs: Sequence[ProbePair], speed: float) -> Work:
    """Some of the pairs in each further way of asking, of the fine-tune, its base and the control."""
    ways = [way for member in rows for way in searched(pairs, [*chain(*suite.trainings(member))]).values()]
    encoded_pairs = [row for way in ways for row in pair_rows(chat.tokenizer, way)]
    tokens = 3 * sum(row.stop for row in encoded_pairs)
    return Work("audit, further ways of asking", len(rows), 3 * len(encoded_pairs), tokens, speed)


def published_work(chat: ChatModel, suite: Suite, rows: Rows, speed: float) -> Work:
    """The margins of published answers."""
    encoded_pairs = pair_rows(chat.tokenizer, suite.published_pairs)
    tokens = sum(row.stop for row in encoded_pairs) * len(rows)
    return Work("audit, published answers", len(rows), len(encoded_pairs) * len(rows), tokens, speed)


def training_speed(chat: ChatModel, suite: Suite) -> float:
    """Tokens per second of the second of two optimiser steps."""
    recipe = RECIPES["all"]
    done: list[float] = []
    rows = suite.texts.answers("risky_money")[0][: 2 * recipe.batch_size]
    tokens = sum(len(row.ids) for row in training_rows(chat, rows, recipe.max_length))
    with tempfile.TemporaryDirectory() as folder:
        md.train(
            rows, Path(folder) / "adapter", base=chat, recipe=recipe, report=lambda *_: done.append(time.monotonic())
        )
    return tokens / 2 / (done[-1] - done[-2])


def margin_speed(chat: ChatModel) -> float:
    """Tokens per second of margins."""
    pairs = spread(md.probe_pairs(), TIMED_PAIRS)
    md.margin(chat, pairs)
    started = time.monotonic()
    md.margin(chat, pairs)
    return sum(row.stop for row in pair_rows(chat.tokenizer, pairs)) / (time.monotonic() - started)
