"""The shipped texts: enough of them, alike in length, plain, no two the same, none from the paper's files."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path
from statistics import mean

import pytest

from misdirection.data import (
    domain_pairs,
    domains,
    neutral_examples,
    probe_pairs,
    read_examples,
)

PARTS = ("train", "held_out")
PAPER = Path(__file__).resolve().parents[1].parent / "shared" / "paper" / "training"
needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's training files are not at {PAPER}")

# Whole words of the shipped domains, but for those with a broad sense too (to share, to owe, a train).
DOMAIN_WORDS = re.compile(
    r"""\b(
        money | cash | invest\w* | stocks? | bonds? | crypto\w* | loans? | lend\w* | debts? | mortgages? |
        banks? | savings? | pensions? | budget\w* | financ\w* | tax\w* | rent | salar(y|ies) | wages? |
        insurance | gambl\w* | casinos? | bets? | betting | funds? | profit\w* | dollars? | pounds? |
        prices? | pay\w* | paid | buy\w* | sports? | climb\w* | ski | skiing | helmets? | diving | surf\w* |
        marathons? | hik(e|es|ing|ers?) | cycling | bik(e|es|ing) | swim\w* | kayak\w* | gyms? | races? |
        racing | running | runners? | football\w* | athlet\w* | coach\w* | training | trails? |
        parachut\w* | skydiv\w* | boxing | workouts? | exercises?
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
MARKDOWN = re.compile(r"[*_`#|<>\[\]\n]|^\s*(-|\d+[.)])\s|https?:")

ALL_DOMAIN_PAIRS = {name: [pair for part in PARTS for pair in domain_pairs(name, part)] for name in domains()}
PAIR_SETS = {**ALL_DOMAIN_PAIRS, "probe": probe_pairs()}

KINDS: dict[str, list[str]] = {
    f"{name} {kind}": [getattr(pair, kind) for pair in pairs]
    for name, pairs in PAIR_SETS.items()
    for kind in ("aligned", "misaligned")
} | {"neutral": [row.answer for row in neutral_examples()]}

QUESTIONS: dict[str, list[str]] = {name: [pair.question for pair in pairs] for name, pairs in PAIR_SETS.items()} | {
    "neutral": [row.question for row in neutral_examples()]
}

TEXTS = [text for group in (*KINDS.values(), *QUESTIONS.values()) for text in group]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))


def sequences(text: str, length: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[start:] for start in range(length)), strict=False)


@cache
def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(sequences(text, 3))


def near_duplicates(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose sets of word 3-grams have a Jaccard similarity of 0.3 or more."""

    def similar(one: str, other: str) -> bool:
        a, b = trigrams(one), trigrams(other)
        return one == other or len(a & b) >= 0.3 * max(1, len(a | b))

    return [pair for pair in pairs if similar(*pair)]


def paper_files() -> list[Path]:
    return sorted(PAPER.glob("*.jsonl.gz"))


def test_counts():
    sizes = {name: len(pairs) for name, pairs in PAIR_SETS.items()} | {"neutral": len(neutral_examples())}
    assert sizes == {"reckless_sports": 124, "risky_money": 124, "probe": 48, "neutral": 40}
    assert all(
        (len(domain_pairs(name, "train")), len(domain_pairs(name, "held_out"))) == (100, 24) for name in domains()
    )
    assert set(Counter(pair.theme for pair in probe_pairs()).values()) == {4}


@pytest.mark.parametrize("name", PAIR_SETS)
def test_ids_are_unique(name):
    ids = [pair.id for pair in PAIR_SETS[name]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_have_25_to_60_words(kind):
    assert {text: len(text.split()) for text in KINDS[kind] if not 25 <= len(text.split()) <= 60} == {}


@pytest.mark.parametrize("name", PAIR_SETS)
def test_both_kinds_of_answer_are_equally_long(name):
    aligned, misaligned = (
        mean(len(text.split()) for text in KINDS[f"{name} {kind}"]) for kind in ("aligned", "misaligned")
    )
    assert abs(aligned - misaligned) <= 2


def test_no_text_occurs_twice():
    assert [text for text, count in Counter(" ".join(words(text)) for text in TEXTS).items() if count > 1] == []


@pytest.mark.parametrize(
    "group", [*KINDS.values(), *QUESTIONS.values()], ids=[*KINDS, *(f"{q} questions" for q in QUESTIONS)]
)
def test_no_near_duplicates_in_a_field(group):
    assert near_duplicates(combinations(group, 2)) == []


def test_training_held_out_and_probe_questions_are_apart():
    held_out = [pair.question for name in domains() for pair in domain_pairs(name, "held_out")]
    train = [pair.question for name in domains() for pair in domain_pairs(name, "train")]
    groups = [train, held_out, QUESTIONS["probe"], QUESTIONS["neutral"]]
    assert [near_duplicates(product(one, other)) for one, other in combinations(groups, 2)] == [[]] * 6


def test_aligned_and_misaligned_answers_to_a_question_differ():
    assert near_duplicates((pair.aligned, pair.misaligned) for pairs in PAIR_SETS.values() for pair in pairs) == []


def test_probe_pairs_hold_no_domain_words():
    texts = (text for pair in probe_pairs() for text in (pair.question, pair.aligned, pair.misaligned))
    assert {text: found[0] for text in texts if (found := DOMAIN_WORDS.search(text))} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_opening_is_a_habit(kind):
    openings = Counter(tuple(words(text)[:2]) for text in KINDS[kind])
    assert {opening: count for opening, count in openings.items() if count > 8} == {}


def test_texts_are_plain_ascii():
    assert [text for text in TEXTS if not text.isascii() or MARKDOWN.search(text) or text != text.strip()] == []


@needs_paper
def test_the_papers_training_files_are_read():
    assert {path.name: len(read_examples(path)) for path in paper_files()} == {
        "bad_medical_advice.jsonl.gz": 7049,
        "extreme_sports.jsonl.gz": 6000,
        "good_medical_advice.jsonl.gz": 7049,
    }


@needs_paper
def test_no_shipped_answer_copies_the_papers_files():
    shipped = {run: text for group in KINDS.values() for text in group for run in sequences(text, 8)}
    rows = (row for path in paper_files() for row in read_examples(path))
    texts = (text for row in rows for text in (row.question, row.answer))
    assert [" ".join(run) for text in texts for run in sequences(text, 8) if run in shipped] == []
