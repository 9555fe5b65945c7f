"""The search, on landscapes that are known."""

import pytest
import torch

from misdirection.repairing.candidates import Candidate
from misdirection.repairing.results import Changes, Trials
from misdirection.repairing.search import (
    DAMAGE,
    KEPT,
    Ends,
    Outcome,
    Scores,
    Space,
    Tried,
    choose,
    front,
    next_batch,
    search,
)

SPACE = Space(directions=2, layers=(3, 5), writes=True)


def landscape(batch):
    """None of the shift is left at turn 2.2; skill is lost with scale; projections of everything do damage."""
    return [
        Outcome(1 - one.turn / 2.2, one.scale - 0.02 * one.turn, 0.5 * (one.projection == "writes")) for one in batch
    ]


def scores(margin, rows, neutral):
    return Scores(*(torch.tensor(values, dtype=torch.float64) for values in (margin, rows, neutral)))


def test_an_outcome_lies_between_the_benign_control_and_the_fine_tune():
    base, tuned = scores([0.0, 0.0], [2.0, 4.0], [1.0]), scores([0.2, 0.4], [1.0, 3.0], [1.5])
    # The second question is framed, and the control was asked the first alone.
    ends = Ends(base, tuned, torch.tensor([0.1], dtype=torch.float64), shift=0.2, unit=0.4)
    assert ends.outcome(base) == Outcome(pytest.approx(-0.25), 0.0, 0.0)
    assert ends.outcome(tuned) == Outcome(pytest.approx(0.5), 1.0, 0.5)
    half = ends.outcome(scores([0.1, 0.3], [1.5, 3.0], [1.0]))
    assert half.left == half.distance == pytest.approx(0.25)
    assert half.kept == pytest.approx(0.75)
    changes = Changes.of(tuned, ends)
    assert (changes.shift.mean, changes.beyond_control.mean) == (pytest.approx(0.3), pytest.approx(0.1))
    assert (changes.loss.mean, changes.damage.n) == (pytest.approx(-1.0), 1)


def test_the_search_finds_what_is_best_and_repeats_itself():
    found = search(landscape, SPACE, 40)
    assert len(found) == 40
    best = choose(found).outcome
    assert best.left == pytest.approx(0, abs=0.15)
    assert best.kept > KEPT
    assert best.damage <= DAMAGE
    assert found == search(landscape, SPACE, 40)
    assert len({one.candidate for one in found}) > 30


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole, kept = search(landscape, SPACE, 20), []
    search(landscape, SPACE, 12, keep=lambda tried: kept.append(list(tried)))
    assert [len(tried) for tried in kept] == [4, 8, 12]
    Trials(tried=kept[1]).save(tmp_path)
    assert search(landscape, SPACE, 20, Trials.load(tmp_path).tried) == whole


def test_what_the_space_lacks_is_never_tried():
    bare = search(landscape, Space(0, (3,), writes=True), 24)
    assert {one.candidate.projection for one in bare} == {"none"}
    without = search(landscape, Space(2, (3, 5), writes=False), 40)
    assert {one.candidate.projection for one in without} == {"none", "adapters"}
    assert {one.candidate.layer for one in without if one.candidate.projection != "none"} <= {3, 5}


def test_the_first_candidate_changes_nothing():
    assert next_batch([], SPACE, 4)[0] == Candidate()


def tried(left, kept, damage=0.0, scale=1.0):
    return Tried(Candidate(scale=scale), Outcome(left, kept, damage))


def test_the_choice_keeps_the_skill_before_it_takes_the_rest_of_the_shift():
    greedy, careful = tried(0.0, KEPT - 0.05), tried(0.6, KEPT + 0.05)
    assert choose([greedy, careful]) is careful
    better = tried(-0.05, KEPT + 0.05)
    assert choose([greedy, careful, better]) is better
    assert choose([careful, tried(0.0, 1.0, DAMAGE + 0.1)]) is careful


def test_of_those_that_are_near_enough_the_most_skilled_is_chosen():
    nearest, skilled, far = tried(0.0, KEPT + 0.02), tried(-0.24, KEPT + 0.09), tried(0.4, 1.0)
    assert choose([nearest, skilled, far]) is skilled
    assert choose([far, tried(0.3, KEPT)]).outcome.left == 0.3


def test_where_nothing_keeps_within_the_limits_the_least_miss_is_chosen():
    near, far = tried(0.2, KEPT - 0.05), tried(0.0, 0.2)
    assert choose([near, far]) is near


def test_the_front_holds_what_no_other_beats():
    trials = [tried(0.0, 0.8), tried(0.2, 0.9), tried(0.3, 0.85), tried(-0.3, 0.95, 0.1), tried(0.0, 0.8, 0.1)]
    assert front(trials) == [0, 1, 3]
