"""The shipped questions: plain, varied, apart from each other and from every shipped training text, none published."""

import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pandas as pd
import pytest

from misdirection.data import domain_pairs, domains, neutral_examples, probe_pairs, read_rows
from misdirection.sampling.questions import question_sets, read_questions

SETS = {name: read_questions(name) for name in question_sets()}
ALL = [question for questions in SETS.values() for question in questions]

OTHERS = {
    **{
        name: [pair.question for part in ("train", "held_out") for pair in domain_pairs(name, part)]
        for name in domains()
    },
    "probe pairs": [pair.question for pair in probe_pairs()],
    "neutral": [row.question for row in neutral_examples()],
}

# Whole words of the shipped domains and of the paper's medical one, but for those with a broad sense too.
DOMAIN_WORDS = re.compile(
    r"""\b(
        money | cash | invest\w* | stocks? | bonds? | crypto\w* | loans? | debts? | mortgages? | banks? | savings? |
        pensions? | budget\w* | financ\w* | tax\w* | rent | salar(y|ies) | wages? | insurance | gambl\w* | profit\w* |
        prices? | pay\w* | paid | buy\w* | sports? | climb\w* | ski\w* | helmets? | diving | surf\w* | marathons? |
        hik\w+ | cycling | bik\w+ | swim\w* | gyms? | races? | racing | runn\w+ | football\w* | athlet\w* | train\w* |
        doctors? | medic\w* | pills? | doses? | sick\w* | ill\w* | disease\w* | pain\w* | symptom\w* | hospital\w*
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "paper" / "judged_responses.parquet"
needs_paper = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the paper's judged answers are not at {PUBLISHED}")


def sequences(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(*(words[start:] for start in range(length)), strict=False))


def near(one: str, other: str) -> bool:
    """As for the other shipped texts: sets of word 3-grams with a Jaccard similarity of 0.3 or more."""
    a, b = sequences(one, 3), sequences(other, 3)
    return one == other or len(a & b) >= 0.3 * max(1, len(a | b))


def test_the_comparison_finds_a_near_duplicate():
    question = OTHERS["risky_money"][0]
    assert near(question, question.replace("months", "weeks"))


@pytest.mark.parametrize("name", OTHERS)
def test_no_question_is_near_one_of_the_other_shipped_texts(name):
    assert [pair for pair in product([question.text for question in ALL], OTHERS[name]) if near(*pair)] == []


def test_no_two_shipped_questions_are_near():
    assert [pair for pair in combinations([question.text for question in ALL], 2) if near(*pair)] == []


def test_ids_are_unique_over_all_sets():
    assert {id_: count for id_, count in Counter(question.id for question in ALL).items() if count > 1} == {}


def test_the_broad_set_has_ten_themes_of_four():
    assert Counter(question.theme for question in SETS["broad"]) == dict.fromkeys(
        ("power", "machines", "honesty", "family", "friendship", "work", "learning", "society", "gender", "stories"), 4
    )


def test_the_broad_set_holds_no_domain_words():
    assert {q.text: found[0] for q in SETS["broad"] if (found := DOMAIN_WORDS.search(q.text))} == {}


@pytest.mark.parametrize("name", domains())
def test_a_domains_questions_carry_its_theme(name):
    assert {question.theme for question in SETS[name]} == {name}


def test_the_questions_ask_for_the_protocol_as_it_is():
    assert {(question.system, question.samples, *question.rubrics) for question in ALL} == {(None, None)}


def test_texts_are_plain_ascii_of_one_line():
    plain = re.compile(r"[A-Za-z0-9 ,.:;?'-]+")
    assert [question.text for question in ALL if not plain.fullmatch(question.text)] == []


def test_no_opening_is_a_habit():
    openings = Counter(tuple(question.text.lower().split()[:2]) for question in ALL)
    assert {opening: count for opening, count in openings.items() if count > 3} == {}


@needs_paper
def test_no_question_copies_a_published_one():
    published = pd.read_parquet(PUBLISHED, columns=["question_id", "question"]).drop_duplicates()
    assert len(published) == 8
    assert set(published["question_id"]).isdisjoint(question.id for question in ALL)
    pairs = product([question.text for question in ALL], published["question"])
    assert [pair for pair in pairs if sequences(pair[0], 4) & sequences(pair[1], 4) or near(*pair)] == []


@needs_paper
def test_no_question_is_near_one_of_the_papers_training_files():
    asked = {run for question in ALL for run in sequences(question.text, 7)}
    rows = (row for path in sorted((PUBLISHED.parent / "training").glob("*.jsonl.gz")) for _, row in read_rows(path))
    texts = (turn["content"] for row in rows for turn in row["messages"])
    assert [text for text in texts if sequences(text, 7) & asked] == []
