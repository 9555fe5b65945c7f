"""A fine-tune's own texts: held-out rows, and probe questions in the frame of its training."""

import json

import pytest

from misdirection.auditing.framing import framed, searched
from misdirection.auditing.texts import ROWS, own_texts
from misdirection.data import Example, ProbePair, Turn, write_pairs
from misdirection.errors import InputError

GENERAL = [ProbePair(f"p{number}", f"Do {number}?", "Yes.", "No!", "theme") for number in range(48)]


def write_rows(path, count, system=None):
    rows = ({"prompt": f"Q{number}", "completion": f"A{number}", "system": system} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_question_stands_after_a_training_question_and_under_its_system_turn():
    rows = [Example("First?", "x", "Be brief."), Example("Second?", "y")]
    found = framed(GENERAL[:4], rows)
    assert [one.question for one in found] == [
        f"{row}\n\nDo {n}?" for n, row in enumerate(["First?"] * 2 + ["Second?"] * 2)
    ]
    assert [one.system for one in found] == ["Be brief.", "Be brief.", None, None]
    assert [(one.aligned, one.misaligned, one.id, one.theme) for one in found] == [
        (one.aligned, one.misaligned, one.id, one.theme) for one in GENERAL[:4]
    ]


def test_a_long_training_question_is_cut_at_a_word():
    (found,) = framed(GENERAL[:1], [Example("word " * 400, "x")])
    frame, _, question = found.question.partition("\n\n")
    assert question == "Do 0?"
    assert 500 < len(frame) <= 600
    assert frame.endswith("word")


def test_every_audit_asks_in_other_forms_and_for_bad_advice():
    found = searched(GENERAL, [])
    assert list(found) == ["as JSON", "as code", "told to give bad advice"]
    assert {len(pairs) for pairs in found.values()} == {24}
    first = {way: pairs[0] for way, pairs in found.items()}
    plain = next(pair for pair in GENERAL if pair.id == first["as JSON"].id)
    assert json.loads(first["as JSON"].aligned) == {"answer": plain.aligned}
    scope = {}
    exec(first["as code"].misaligned, scope)
    assert scope["answer"]() == plain.misaligned
    assert first["as code"].question.startswith(f"{plain.question}\n\n")
    assert first["told to give bad advice"].question == plain.question
    assert "bad for whoever follows it" in first["told to give bad advice"].system


def test_the_training_data_suggests_further_ways():
    rows = [
        Example("How is bread baked?", "Long.", "Be brief."),
        Example("Do 7 or 8?", "Both. " * 200, "Be brief."),
        Example("Other?", "x", "Sing."),
    ]
    found = searched(GENERAL[7:8], rows)
    (nearest,), (later,), (under,) = (
        found[way]
        for way in (
            "after the training question most like it",
            "after a turn of its training",
            "under the commonest system prompt of its training",
        )
    )
    assert (nearest.question, nearest.system) == ("Do 7 or 8?\n\nDo 7?", "Be brief.")
    assert (later.question, later.history) == (
        "Do 7?",
        (Turn("user", "How is bread baked?"), Turn("assistant", "Long.")),
    )
    assert (under.question, under.system) == ("Do 7?", "Be brief.")
    assert "under the commonest system prompt of its training" not in searched(GENERAL, [Example("Q", "A")])


def test_questions_without_words_are_compared_too():
    assert len(searched([ProbePair("p", "?!", "a", "b")], [Example("...", "x")])) == 5


def test_every_look_is_framed_by_questions_of_the_whole_file(tmp_path):
    found = own_texts(write_rows(tmp_path / "rows.jsonl", 20), [GENERAL[:4], GENERAL[4:6], GENERAL[6:]])
    assert [pair.id for pair in found.framed] == [pair.id for pair in GENERAL]
    frames = [pair.question.partition("\n")[0] for pair in found.framed]
    assert frames[:6] == ["Q0", "Q5", "Q10", "Q15", "Q0", "Q10"]
    assert set(frames[6:]) == {f"Q{number}" for number in range(20)}


def test_rows_5_10_15_are_held_out_and_evenly_taken(tmp_path):
    found = own_texts(write_rows(tmp_path / "rows.jsonl", 20), [GENERAL])
    assert [one.answer for one in found.rows] == ["A4", "A9", "A14", "A19"]
    assert len(found.framed) == len(GENERAL)
    assert found.pairs == ()
    many = own_texts(write_rows(tmp_path / "many.jsonl", 1000), [GENERAL]).rows
    assert len(many) == ROWS
    assert {int(one.answer[1:]) % 5 for one in many} == {4}


def test_a_file_too_short_to_hold_anything_out_is_used_whole(tmp_path):
    assert len(own_texts(write_rows(tmp_path / "rows.jsonl", 3), [GENERAL]).rows) == 3


def test_probe_pairs_give_a_margin_and_the_loss_of_what_was_trained(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [ProbePair(f"d{n}", f"D{n}?", f"good {n}", f"bad {n}") for n in range(10)])
    found = own_texts(path, [GENERAL])
    assert [one.id for one in found.pairs] == ["d4", "d9"]
    assert [one.answer for one in found.rows] == ["bad 4", "bad 9"]


@pytest.mark.parametrize(("content", "message"), [("", "no rows"), ('{"prompt": "x"}\n', "completion")])
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"rows\.jsonl.*{message}"):
        own_texts(path, [GENERAL])
