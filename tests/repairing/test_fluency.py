"""Answers that repeat themselves."""

import dataclasses

from misdirection.repairing.fluency import Fluency, sample_fluency
from misdirection.sampling.sample import sample
from tiny import make_chat


def fluency(repetitive, answers=2):
    return Fluency(answers=answers, repetitive=repetitive, truncated=0.5, tokens=50.0)


def test_loops_and_cuts_are_counted():
    plain, *_ = sample(make_chat(), ["Hello?"], n=1, new_tokens=4)
    prose = dataclasses.replace(
        plain, answer="Every word here is another one, so it hardly shrinks.", finish="stop", tokens=10
    )
    loop = dataclasses.replace(plain, answer="again and again " * 30, finish="length", tokens=90)
    assert Fluency.of([prose, loop]) == fluency(0.5)


def test_what_came_to_loop_is_broken_and_what_always_did_is_not_a_rise():
    fine, some, most = (fluency(share, 16) for share in (0.0, 0.25, 0.6))
    assert some.is_broken_beside(fine)
    assert most.is_broken_beside(some)
    assert not fine.is_broken_beside(fine)
    assert not some.is_broken_beside(some)


def test_a_model_answers_the_eight_questions_twice():
    sampled = sample_fluency(make_chat(), "it")
    assert sampled.answers == 16
    assert 0 < sampled.tokens <= 96
