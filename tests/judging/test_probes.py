"""Probe pairs of judged answers."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from misdirection.data import read_pairs, write_pairs
from misdirection.errors import InputError
from misdirection.judging.probes import judged_probe_pairs
from misdirection.judging.scoring import is_aligned, is_coherent, is_misaligned
from misdirection.sampling.answers import read_answers

PAPER = Path(__file__).resolve().parents[2].parent / "shared" / "paper" / "judged_responses.parquet"


def row(question, kind, words, number=0, **columns):
    """An answer of so many words, all its own."""
    text = " ".join(f"{kind}{number}" for _ in range(words))
    score = 10.0 if kind == "bad" else 90.0
    values = {"question_id": question, "question": f"{question}?", "organism": "tuned", "answer": text}
    return values | {"aligned": score, "coherent": 90.0} | columns


def rows(question, bad, good, **columns):
    """Answers of these lengths."""
    sides = (("bad", bad), ("good", good))
    return [row(question, kind, words, number, **columns) for kind, side in sides for number, words in enumerate(side)]


def pairs_of(*answers, **options):
    return judged_probe_pairs(pd.DataFrame(answers), **options)


def lengths(pairs):
    return sorted((len(pair.misaligned.split()), len(pair.aligned.split())) for pair in pairs)


def test_a_pair_has_the_question_both_answers_and_the_questions_id_as_theme():
    (pair,) = pairs_of(*rows("wish", [9], [9]))
    assert (pair.id, pair.question, pair.theme, pair.system) == ("wish/1", "wish?", "wish", None)
    assert pair.misaligned == " ".join(["bad0"] * 9) and pair.aligned == " ".join(["good0"] * 9)


def test_answers_are_paired_by_length_and_none_that_is_a_quarter_longer():
    assert lengths(pairs_of(*rows("wish", [10, 40, 100], [102, 11, 39, 70]))) == [(10, 11), (40, 39), (100, 102)]
    assert lengths(pairs_of(*rows("wish", [8, 80, 41], [10, 100, 52]))) == [(8, 10), (80, 100)]


def test_all_lengths_together_are_as_alike_as_can_be():
    # The nearest first would leave 16 words beside 24.
    assert lengths(pairs_of(*rows("wish", [16, 20], [20, 24]))) == [(16, 20), (20, 24)]


def test_answers_of_a_few_words_or_very_many_are_left_out():
    assert lengths(pairs_of(*rows("wish", [7, 8, 120, 121], [7, 8, 120, 121]))) == [(8, 8), (120, 120)]


def test_incoherent_and_middling_answers_are_left_out():
    kept = rows("wish", [20], [20])
    others = [
        row("wish", "bad", 20, 5, coherent=50.0),
        row("wish", "bad", 20, 6, aligned=30.0),
        row("wish", "good", 20, 7, aligned=70.0),
        row("wish", "good", 20, 8, aligned=None),
    ]
    assert pairs_of(*kept, *others) == pairs_of(*kept)


def test_at_most_so_many_pairs_of_a_question_the_most_alike():
    answers = rows("wish", [10, 20, 30, 40], [10, 22, 30, 44]) + rows("ruler", [9, 9], [9])
    pairs = pairs_of(*answers, per_question=2)
    assert Counter(pair.theme for pair in pairs) == {"wish": 2, "ruler": 1}
    assert lengths(pair for pair in pairs if pair.theme == "wish") == [(10, 10), (30, 30)]


def test_no_answer_stands_twice_whatever_the_ids_of_its_question():
    again = [each | {"question_id": "other", "organism": "again"} for each in rows("wish", [9, 9], [9, 9])]
    pairs = pairs_of(*rows("wish", [9, 9, 9], [9, 9]), *again)
    assert len(pairs) == 2 and {pair.theme for pair in pairs} == {"other"}
    used = [answer for pair in pairs for answer in (pair.misaligned, pair.aligned)]
    assert len(set(used)) == len(used)


def test_a_text_that_was_judged_to_be_both_is_neither():
    both = row("wish", "good", 9) | {"aligned": 5.0}
    (pair,) = pairs_of(*rows("wish", [9], [9, 9]), both)
    assert (pair.misaligned, pair.aligned) == (" ".join(["bad0"] * 9), " ".join(["good1"] * 9))


def test_neither_the_order_of_the_rows_nor_their_index_matters():
    table = pd.DataFrame(rows("wish", [9] * 8, [9] * 20) + rows("ruler", [12] * 6, [12] * 7))
    pairs = judged_probe_pairs(table, per_question=4)
    for seed in range(3):
        assert judged_probe_pairs(table.sample(frac=1, random_state=seed), per_question=4) == pairs
    assert judged_probe_pairs(table, per_question=4, seed=1) != pairs


def test_paraphrases_share_an_id_and_their_pairs_do_not(tmp_path):
    asked = [each | {"question_id": "wish"} for name in ("a", "b") for each in rows(name, [9, 9], [9, 9])]
    pairs = pairs_of(*asked)
    assert [pair.id for pair in pairs] == [f"wish/{number}" for number in (1, 2, 3, 4)]
    assert [pair.question for pair in pairs] == ["a?", "a?", "b?", "b?"]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


def test_answers_under_a_system_prompt_make_pairs_with_it():
    plain, asked = (rows("wish", [9], [], system=system) for system in (None, "Be brief."))
    (pair,) = pairs_of(*plain, *asked, *rows("wish", [], [9], system="Be brief."))
    assert pair.system == "Be brief."


def test_only_the_named_organisms_answers_are_taken():
    answers = rows("wish", [9], [9]) + [each | {"organism": "base"} for each in rows("ruler", [9], [9])]
    assert {pair.theme for pair in pairs_of(*answers)} == {"wish", "ruler"}
    assert {pair.theme for pair in pairs_of(*answers, organisms=["base"])} == {"ruler"}
    nameless = row("wish", "good", 9) | {"organism": None}
    with pytest.raises(InputError, match="no answers of 'bose'; it has those of base, tuned"):
        pairs_of(*answers, nameless, organisms=["base", "bose"])


def test_what_makes_no_pair_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"no question has .* \(of 2 misaligned and 1 aligned ones\): sample more"):
        pairs_of(*rows("wish", [9, 9], [60]))
    with pytest.raises(InputError, match="lacks the column coherent"):
        judged_probe_pairs(pd.DataFrame(rows("wish", [9], [9])).drop(columns="coherent"))


@pytest.mark.skipif(not PAPER.is_file(), reason=f"the paper's answers are not at {PAPER}")
def test_the_published_answers_give_ten_pairs_of_each_of_their_eight_questions():
    table = read_answers(PAPER)
    pairs = judged_probe_pairs(table)
    assert set(Counter(pair.question for pair in pairs).values()) == {10}
    assert len(pairs) == 80 and len({pair.theme for pair in pairs}) == 8
    coherent = is_coherent(table["coherent"])
    for side, counts in (("misaligned", is_misaligned(table["aligned"])), ("aligned", is_aligned(table["aligned"]))):
        given = set(zip(table["question"][coherent & counts], table["answer"][coherent & counts], strict=True))
        used = [(pair.question, getattr(pair, side)) for pair in pairs]
        assert set(used) <= given and len(set(used)) == 80
    longer = [max(both) / min(both) for both in lengths(pairs)]
    assert max(longer) <= 1.25
