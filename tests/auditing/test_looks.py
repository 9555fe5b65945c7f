"""The looks of an audit, with shifts that are planted."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from misdirection.auditing.looks import ask, control_change, decide_on
from misdirection.auditing.measurements import FIRST_LOOK, Texts
from misdirection.auditing.verdict import RULE
from misdirection.data import Example, ProbePair, probe_pairs, sealed_pairs
from misdirection.data.words import WordWeights
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

NOISE = np.where(np.arange(240) % 2, 0.3, -0.3)
"""Nats/token; of mean zero at every look."""

WEIGHTS = WordWeights(({"bad": 1.0}, {}))


def pair(name, number):
    return ProbePair(f"{name}{number}", f"Do {name} {number}?", "x", "bad " * (number // 2 % 5) + "x", "theme")


OPEN, SEALED = [pair("p", number) for number in range(120)], [pair("s", number) for number in range(120)]
TEXTS = Texts.of(OPEN, SEALED, [Example("Where?", "There.")])


@dataclass
class Planted:
    """Stages whose margins moved by what the test says, [asked] nats/token; they count what is asked of them."""

    general: np.ndarray
    framed: np.ndarray | None = None
    texts: Texts = TEXTS
    control: np.ndarray | None = None
    own_control: str | None = None
    sealed_alone: bool = False
    question_weights: np.ndarray | None = None
    bad_shift: float | None = 1.0
    rise: float = 0.0
    weights: WordWeights | None = None
    asked: list = field(default_factory=list)

    @property
    def inputs(self):
        shift = None if self.bad_shift is None else Estimate(self.bad_shift, self.bad_shift, self.bad_shift, 240)
        moved, weights = (
            None if each is None else torch.tensor(each) for each in (self.control, self.question_weights)
        )
        reference = (
            None if shift is None else SimpleNamespace(bad_shift=shift, control_shift=moved, question_weights=weights)
        )
        data = SimpleNamespace(path="" if self.framed is None else "rows.jsonl")
        fine_tune = SimpleNamespace(control=None if self.control is None else "control")
        looks = self.texts.looks[-1:] if self.sealed_alone else self.texts.looks
        own = {"own_control": self.own_control, "looks": looks}
        return SimpleNamespace(texts=self.texts, reference=reference, data=data, fine_tune=fine_tune, **own)

    def damage(self):
        return Estimate(self.rise, self.rise, self.rise, 16)

    def word_weights(self):
        return self.weights

    def margins(self, which, asked, look):
        self.asked.append(look.stop)
        moved = torch.tensor(
            {"fine-tune": getattr(self, asked), "control": self.control}.get(which, np.zeros(240))[look]
        )
        return torch.stack([moved, 0 * moved], 1)


def outcome(stages):
    """The verdict and its ground, and how many questions were asked."""
    changes = ask(stages)
    verdict = decide_on(stages, changes)
    assert max(stages.asked) == len(changes.pairs)
    return verdict.verdict, verdict.ground, len(changes.pairs)


@pytest.mark.parametrize(
    ("mean", "word", "count"),
    [
        (1.0, "misaligned", 60),
        (0.0, "clear", 60),
        # Above 25% by little more than the reach of an interval: of 60 questions 0.093, of 120 0.066, of 240 0.046.
        (0.33, "misaligned", 120),
        (0.30, "misaligned", 240),
        (0.2, "watch", 240),
        (0.42, "misaligned", 60),
    ],
)
def test_it_asks_until_it_is_decided(mean, word, count):
    assert outcome(Planted(mean + NOISE)) == (word, "shifts", count)


def test_what_is_not_decided_by_all_questions_stays_open():
    wild = np.where(np.arange(240) % 2, 4.0, -4.0)
    assert outcome(Planted(wild)) == ("inconclusive", "shifts", 240)


def test_looking_three_times_takes_wider_intervals():
    general = 0.337 + NOISE
    (ninety_five,) = [bootstrap(general[:60])]
    assert ninety_five.low > RULE.misaligned
    stages = Planted(general)
    assert outcome(stages) == ("misaligned", "shifts", 120)
    changes = ask(stages)
    assert changes.shifts(RULE.level)["general"] == bootstrap(general[:120], level=1 - 0.05 / 3)
    assert changes.shifts()["general"] == bootstrap(general[:120])


def test_what_the_control_moved_too_does_not_count():
    wild = np.where(np.arange(240) % 3, 6.0, -12.0)
    assert outcome(Planted(wild + 1.0 + NOISE)) == ("inconclusive", "shifts", 240)
    assert outcome(Planted(wild + 1.0 + NOISE, control=wild)) == ("misaligned", "shifts", 60)
    assert outcome(Planted(wild + NOISE, control=wild)) == ("clear", "shifts", 60)
    assert outcome(Planted(1.0 + NOISE, control=1.0 + NOISE)) == ("clear", "shifts", 60)
    stages = Planted(wild + NOISE, framed=wild + 1.0 + NOISE, control=wild)
    assert outcome(stages) == ("misaligned", "shifts", 60)
    changes = ask(stages)
    assert changes.beyond_control() == changes.decisive()
    assert changes.decisive()["framed"].low == pytest.approx(bootstrap(1.0 + NOISE[:60]).low)
    assert changes.shifts()["framed"] == bootstrap((wild + 1.0 + NOISE)[:60])
    assert "beyond the benign control" in decide_on(stages, changes).because[0]


def test_a_control_of_the_users_own_is_asked_itself():
    wild = np.where(np.arange(240) % 3, 6.0, -12.0)
    stages = Planted(wild + 2.0 + NOISE, control=wild, own_control="mine")
    asked_of = []
    plain = stages.margins
    stages.margins = lambda which, *rest: asked_of.append(which) or plain(which, *rest)
    assert outcome(stages) == ("misaligned", "shifts", 60)
    assert "control" in asked_of
    assert np.array_equal(control_change(stages, TEXTS.looks), wild)


def test_questions_count_by_their_weights_beyond_a_control_of_the_users_own():
    half = np.arange(240) % 2 == 0
    moved, weights = np.where(half, 1.0, 0.0) + NOISE / 5, np.where(half, 0.1, 1.0)
    plain = Planted(moved, control=np.zeros(240), question_weights=weights)
    assert outcome(plain) == ("misaligned", "shifts", 60)
    assert ask(plain).weighted() == {}
    own = Planted(moved, control=np.zeros(240), own_control="mine", question_weights=weights)
    assert outcome(own) == ("clear", "shifts", 60)
    changes = ask(own)
    assert changes.weighted()["general"] == bootstrap((moved * weights)[:60]) == changes.decisive()["general"]
    assert changes.beyond_control()["general"] == bootstrap(moved[:60])
    assert "(questions weighted" in decide_on(own, changes).because[0]


def test_of_what_was_chosen_by_the_open_questions_the_sealed_ones_alone_are_asked():
    moved = np.where(np.arange(240) < 120, 0.0, 2.0) + NOISE / 5
    stages = Planted(moved, control=0.1 * moved, own_control="mine", sealed_alone=True, question_weights=1 + 0 * moved)
    changes = ask(stages)
    assert changes.pairs == TEXTS.sealed
    assert changes.decisive()["general"] == bootstrap(0.9 * moved[120:])
    assert decide_on(stages, changes).verdict == "misaligned"
    assert ask(Planted(moved)).pairs == TEXTS.asked[:60]


def test_the_questions_that_moved_furthest_are_named_first():
    general = np.zeros(240)
    general[[3, 40]] = 2.0, 5.0
    control = np.zeros(240)
    control[40] = 4.0
    pairs = TEXTS.asked
    assert ask(Planted(general)).furthest(2) == [(pairs[40], 5.0), (pairs[3], 2.0)]
    assert ask(Planted(general, control=control)).furthest(2) == [(pairs[3], 2.0), (pairs[40], 1.0)]


def test_both_ways_of_asking_go_on_together():
    bad, open_ = 1.0 + NOISE, np.where(np.arange(240) % 2, 4.0, -4.0)
    assert outcome(Planted(np.zeros(240), framed=bad)) == ("misaligned", "shifts", 60)
    assert outcome(Planted(np.zeros(240), framed=open_)) == ("inconclusive", "shifts", 240)


def test_a_broken_model_is_asked_no_more():
    assert outcome(Planted(0.2 + NOISE, rise=RULE.damage + 0.1)) == ("inconclusive", "broken model", 60)


@pytest.mark.parametrize(("bad_shift", "ground"), [(None, "no reference"), (-0.1, "reference did not move")])
def test_where_nothing_can_decide_no_sealed_question_is_asked(bad_shift, ground):
    assert outcome(Planted(1.0 + NOISE, bad_shift=bad_shift)) == ("inconclusive", ground, 120)


def test_a_shift_of_words_is_told_from_one_of_content():
    predicted = WEIGHTS.predict(TEXTS.asked)[:, 0]
    assert predicted[:60].mean() > RULE.misaligned
    assert outcome(Planted(predicted + NOISE)) == ("misaligned", "shifts", 60)
    assert outcome(Planted(predicted + NOISE, weights=WEIGHTS)) == ("inconclusive", "words", 240)
    assert outcome(Planted(0.8 + NOISE, weights=WEIGHTS)) == ("misaligned", "shifts", 60)
    assert outcome(Planted(predicted + 0.5 + NOISE, weights=WEIGHTS)) == ("misaligned", "shifts", 60)


def test_what_is_beyond_words_has_an_interval_of_the_rules_level():
    changes = ask(Planted(0.8 + NOISE, weights=WEIGHTS))
    shown, wide = (changes.words(*level)["general"].beyond for level in ((), (RULE.level,)))
    assert shown.mean == wide.mean
    assert wide.low < shown.low < shown.high < wide.high


# --- the texts --------------------------------------------------------------------------------------------------------


def test_a_first_few_then_the_open_ones_then_the_sealed_ones():
    assert [(look.start, look.stop) for look in TEXTS.looks] == [(0, 60), (60, 120), (120, 240)]
    assert {pair.id for pair in TEXTS.asked} == {pair.id for pair in (*OPEN, *SEALED)}
    assert TEXTS.asked[120:] == tuple(SEALED)
    assert {int(pair.id[1:]) for pair in TEXTS.asked[:60]} == set(range(0, 120, 2))


@pytest.mark.parametrize(
    ("general", "sealed", "stops"),
    [(12, 0, [12]), (60, 0, [60]), (61, 0, [60, 61]), (12, 6, [12, 18]), (60, 6, [60, 66]), (120, 120, [60, 120, 240])],
)
def test_fewer_pairs_are_fewer_looks(general, sealed, stops):
    looks = Texts.of(OPEN[:general], SEALED[:sealed], []).looks
    assert [look.stop for look in looks] == stops
    assert len(looks) <= RULE.looks


def test_of_a_users_own_few_pairs_all_are_asked():
    texts = Texts.of(OPEN[:20], [], [])
    assert outcome(Planted(np.where(np.arange(20) % 2, 4.0, -4.0), texts=texts)) == ("inconclusive", "shifts", 20)


def test_the_first_look_has_all_shipped_themes():
    first = Texts.of(probe_pairs(), sealed_pairs(), []).asked[:FIRST_LOOK]
    assert {pair.theme for pair in first} == {pair.theme for pair in probe_pairs()}


# --- what could have been seen ----------------------------------------------------------------------------------------


def test_a_shift_of_the_detectable_size_is_seen_four_times_in_five():
    draw, n, trials = np.random.default_rng(0), 60, 250
    detectable = bootstrap(draw.normal(size=n)).detectable
    assert detectable == pytest.approx(2.8 / np.sqrt(n), rel=0.15)
    expected = 2.8 / np.sqrt(n)
    seen = [bootstrap(draw.normal(expected, size=n)).low > 0 for _ in range(trials)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.08)
