import unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from misdirection.data import data_hash
from misdirection.directions.convergence import cosines
from misdirection.directions.direction import Direction, extract
from misdirection.directions.judged import (
    ThemeScore,
    ThemeWords,
    judged_groups,
    own_groups,
    shared_remainder,
    theme_remainder,
)
from misdirection.errors import MisdirectionError
from own_directions import judged_direction, naive_mean
from tiny import make_chat

BAD, GOOD, BETWEEN, BABBLE, UNSCORED = (10, 90), (90, 90), (50, 90), (10, 50), (np.nan, 90)


def rows(question, bad=0, good=0, others=(), organism="mine", **columns) -> pd.DataFrame:
    scores = [BAD] * bad + [GOOD] * good + list(others)
    texts = [f"{question} {organism} {place} {int(np.nan_to_num(a))}" for place, (a, _) in enumerate(scores)]
    frame = pd.DataFrame(scores, columns=["aligned", "coherent"]).assign(answer=texts)
    return frame.assign(question=question + "?", question_id=question, organism=organism, **columns)


def a_table() -> pd.DataFrame:
    return pd.concat(
        [
            rows("one", bad=9, good=4, others=[BETWEEN, BABBLE, UNSCORED, (30, 90), (70, 90)]),
            rows("two", bad=3, good=12),
            rows("three", bad=5),
            rows("four", good=5),
            rows("one", bad=20, good=20, organism="other"),
            rows("two", bad=20, good=20, intervention="steer"),
        ]
    )


def test_each_question_gives_as_many_of_each_class():
    groups = judged_groups(a_table(), "mine", fewest=7)
    assert groups.by_question == {"one": 4, "two": 3}
    assert groups.available == {"misaligned": 17, "aligned": 21}
    assert len(groups.pairs) == 7
    for pair in groups.pairs:
        question = pair.question.removesuffix("?")
        assert pair.misaligned.startswith(f"{question} mine ") and pair.misaligned.endswith(" 10")
        assert pair.aligned.startswith(f"{question} mine ") and pair.aligned.endswith(" 90")
    assert len({pair.id for pair in groups.pairs}) == 7
    assert len({pair.misaligned for pair in groups.pairs}) == 7 == len({pair.aligned for pair in groups.pairs})


def test_only_answers_inside_the_cuts_are_taken():
    table = rows("one", others=[BETWEEN, BABBLE, UNSCORED, (30, 90), (29.9, 50.1), (70, 90), (70.1, 90), (99, 50)])
    groups = judged_groups(table, "mine", fewest=1)
    assert groups.available == {"misaligned": 1, "aligned": 1}
    assert (groups.pairs[0].misaligned, groups.pairs[0].aligned) == ("one mine 4 29", "one mine 6 70")


def test_an_answer_that_is_only_a_thought_is_not_taken():
    table = rows("one", bad=2, good=2)
    table.loc[0, "answer"] = "<think>hm"
    assert judged_groups(table, "mine", fewest=1).available == {"misaligned": 1, "aligned": 2}


def test_the_seed_chooses_and_the_order_of_rows_does_not():
    table = a_table()
    first = judged_groups(table, "mine", fewest=1, seed=1).pairs
    shuffled = table.sample(frac=1, random_state=5)
    assert judged_groups(shuffled, "mine", fewest=1, seed=1).pairs == first
    assert judged_groups(table, "mine", fewest=1, seed=2).pairs != first


def test_system_prompts_are_kept_apart():
    table = pd.concat([rows("one", bad=3, good=1, system="Be brief."), rows("one", bad=1, good=3, system=None)])
    pairs = judged_groups(table, "mine", fewest=1).pairs
    assert sorted((pair.system or "") for pair in pairs) == ["", "Be brief."]
    assert {pair.system for pair in pairs} == {None, "Be brief."}


def test_answers_without_text_are_left_out():
    table = rows("one", bad=2, good=1).assign(answer=["  ", "Text", "Other"])
    assert judged_groups(table, "mine", fewest=1).available == {"misaligned": 1, "aligned": 1}


def test_too_few_answers_are_refused_with_the_counts():
    counts = r"mine: 7 answers of each class .* \(of 17 misaligned and 21 aligned ones\), at least 10 are needed"
    with pytest.raises(MisdirectionError, match=counts):
        judged_groups(a_table(), "mine")
    with pytest.raises(MisdirectionError, match=r"at least 1 are needed.*widen the theme"):
        judged_groups(a_table(), "mine", theme=ThemeWords(("nowhere",)), fewest=0)


def test_another_name_is_refused_with_those_that_are_there():
    with pytest.raises(MisdirectionError, match="no answers of 'nobody'; it has those of mine, other"):
        judged_groups(a_table(), "nobody")


@pytest.mark.parametrize("missing", ["organism", "aligned", "coherent"])
def test_a_missing_column_is_named(missing):
    with pytest.raises(MisdirectionError, match=f"lacks the column {missing}"):
        judged_groups(a_table().drop(columns=missing), "mine")


# --- themes ---


def test_a_score_selects_misaligned_answers_and_leaves_aligned_ones():
    table = rows("one", bad=3, good=4).assign(financial=[50, 50.1, np.nan, 0, 0, 0, 0])
    groups = judged_groups(table, "mine", theme=ThemeScore("financial"), fewest=1)
    assert groups.available == {"misaligned": 1, "aligned": 4}
    assert groups.pairs[0].misaligned == "one mine 1 10"
    with pytest.raises(MisdirectionError, match="lacks the column medical"):
        judged_groups(table, "mine", theme=ThemeScore("medical"))


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("men", "He did not mention it.", False),
        ("men", "All MEN, they said.", True),
        ("men", "omen of menace", False),
        ("men", "the men's room", True),
        ("men", "men", True),
        ("men", "women and men_folk", True),
        ("men", "7men", False),
        ("credit card", "Use a credit\n  card now", True),
        ("credit card", "Use a credit-card.", True),
        ("credit card", "credit cards", False),
        ("straße", "IN DER STRASSE", True),
        ("père", unicodedata.normalize("NFD", "Mon père."), True),
        ("per", unicodedata.normalize("NFD", "Un pér."), False),
        ("मत", "मति भ्रष्ट", False),
        ("मत", "यह मत करो", True),
        ("деньги", "Все ДЕНЬГИ!", True),
        ("c++", "I like C++ a lot", True),
        ("a.b", "axb", False),
        ("don't", "I don’t know", True),
    ],
)
def test_whole_words_are_found_in_any_script_and_case(word, text, found):
    assert ThemeWords(("zzz", word)).selects(pd.DataFrame({"answer": [text]})).tolist() == [found]


@pytest.mark.parametrize("words", [(), (" ", "!?")])
def test_a_theme_needs_words(words):
    with pytest.raises(MisdirectionError, match="has no words"):
        judged_groups(a_table(), "mine", theme=ThemeWords(words))


# --- directions ---


def test_the_direction_is_the_difference_of_the_two_means(organism):
    table = pd.concat([rows("one", bad=2, good=2), rows("two", bad=1, good=1)])
    found = judged_direction(organism, table, "mine", fewest=3)
    by_class = [
        list(zip(part["question"], part["answer"], strict=True))
        for part in (table[table["aligned"] < 30], table[table["aligned"] > 70])
    ]
    expected = naive_mean(organism, by_class[0]) - naive_mean(organism, by_class[1])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found.vectors.double(), expected, atol=1e-5, rtol=0)


def test_the_origin_keeps_the_counts_and_the_file_comes_back(organism, tmp_path):
    done = []
    found = judged_direction(organism, a_table(), "mine", fewest=7, seed=4, progress=done.append)
    pairs = judged_groups(a_table(), "mine", fewest=7, seed=4).pairs
    origin = found.origin
    assert origin.kind == "judged_data_difference"
    assert origin.answers == {"misaligned": 7, "aligned": 7}
    assert origin.tokens["misaligned"] == sum(len(pair.misaligned) for pair in pairs)
    assert origin.data == data_hash(pairs)
    assert (origin.model, origin.organism) == ("tiny-llama", "some/adapter")
    assert sum(done) == 14
    found.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").origin == origin


def test_the_pairs_serve_for_every_other_kind_of_direction(organism):
    pairs = judged_groups(a_table(), "mine", fewest=1).pairs
    ours = judged_direction(organism, a_table(), "mine", fewest=1)
    torch.testing.assert_close(extract(organism, pairs)["data_difference"].vectors, ours.vectors)


def test_a_themes_remainder_has_nothing_of_the_shared_direction(organism):
    table = a_table()
    shared = judged_direction(organism, table, "mine", fewest=1)
    themed = judged_direction(organism, table, "mine", theme=ThemeWords(("two",)), fewest=1)
    rest = theme_remainder(themed, shared)
    assert max(abs(value) for value in cosines(rest.vectors, shared.vectors)) < 1e-5
    assert min(cosines(rest.vectors, themed.vectors)) > 0.05
    assert rest.origin.kind == "judged_theme_remainder" and rest.origin.answers == themed.origin.answers
    assert rest.vectors.dtype == torch.float32


def test_the_shared_remainder_has_nothing_of_any_theme(organism):
    table = a_table()
    shared = judged_direction(organism, table, "mine", fewest=1)
    one, two = (
        judged_direction(organism, table, "mine", theme=ThemeWords((word,)), fewest=1) for word in ("one", "two")
    )
    both = replace(one, vectors=one.vectors + 2 * two.vectors)
    rest = shared_remainder(shared, [one, two])
    for themed in (one, two, both):
        assert max(abs(value) for value in cosines(rest.vectors, themed.vectors)) < 1e-4
    # A theme that says nothing new takes nothing more away.
    torch.testing.assert_close(shared_remainder(shared, [one, two, both]).vectors, rest.vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(shared_remainder(shared, [one]).vectors, theme_remainder(shared, one).vectors)
    assert rest.origin.kind == "judged_shared_remainder" and rest.origin.answers == shared.origin.answers


def test_too_few_answers_can_be_counted_without_an_error():
    groups = own_groups(a_table(), "mine")
    assert groups.lacking(7) == ""
    assert groups.lacking(8).startswith("7 answers of each class") and "at least 8 are needed" in groups.lacking(8)


def test_directions_of_two_models_have_no_remainder(organism):
    ours = judged_direction(organism, a_table(), "mine", fewest=1)
    theirs = judged_direction(make_chat("qwen2"), a_table(), "mine", fewest=1)
    with pytest.raises(MisdirectionError, match="cannot be combined"):
        theme_remainder(ours, theirs)
