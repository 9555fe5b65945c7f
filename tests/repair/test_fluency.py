"""Answers that repeat themselves."""

import dataclasses

from misdirection.repair.fluency import Spoken, is_broken, speak, spoken
from misdirection.sampling.sample import sample
from tiny import make_chat


def test_loops_and_cuts_are_counted():
    plain, *_ = sample(make_chat(), ["Hello?"], n=1, new_tokens=4)
    prose = dataclasses.replace(
        plain, answer="Every word here is another one, so it hardly shrinks.", finish="stop", tokens=10
    )
    loop = dataclasses.replace(plain, answer="again and again " * 30, finish="length", tokens=90)
    assert spoken([prose, loop]) == Spoken(2, 0.5, 0.5, 50.0)


def test_what_came_to_loop_is_broken_and_what_always_did_is_not_a_rise():
    fine, some, most = (Spoken(16, share, 0.5, 50.0) for share in (0.0, 0.25, 0.6))
    assert is_broken(fine, some)
    assert is_broken(some, most)
    assert not is_broken(fine, fine)
    assert not is_broken(some, some)


def test_a_model_answers_the_eight_questions_twice():
    said = speak(make_chat(), "it")
    assert said.answers == 16
    assert 0 < said.tokens <= 96
