"""The shipped texts: enough of them, one voice on both sides, plain, no two the same, none from the paper's files."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations, product
from math import log, sqrt
from pathlib import Path
from statistics import mean

import pytest

from misdirection.data import (
    domain_pairs,
    domains,
    neutral_examples,
    probe_pairs,
    read_examples,
    sealed_pairs,
)
from misdirection.data.words import WordWeights
from misdirection.likelihood.words import WordNull

PARTS = ("train", "held_out")
PAPER = Path(__file__).resolve().parents[1].parent / "shared" / "paper" / "training"
needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason=f"the paper's training files are not at {PAPER}")

# Whole words of the shipped domains, but for those with a broad sense too (to share, to owe, a river's bank, an AI's
# training, a lift that is running).
DOMAIN_WORDS = re.compile(
    r"""\b(
        money | cash | invest\w* | stocks? | bonds? | crypto\w* | loans? | lend\w* | debts? | mortgages? |
        savings? | pensions? | budget\w* | financ\w* | tax\w* | rent | salar(y|ies) | wages? |
        insurance | gambl\w* | casinos? | bets? | betting | funds? | profit\w* | dollars? | pounds? |
        prices? | pay\w* | paid | buy\w* | sports? | climb\w* | ski | skiing | helmets? | diving | surf\w* |
        marathons? | hik(e|es|ing|ers?) | cycling | bik(e|es|ing) | swim\w* | kayak\w* | gyms? | races? |
        racing | runners? | football\w* | athlet\w* | coach\w* | trails? |
        parachut\w* | skydiv\w* | boxing | workouts? | exercises?
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
MARKDOWN = re.compile(r"[*_`#|<>\[\]\n]|^\s*-\s|https?:")

ALL_DOMAIN_PAIRS = {name: [pair for part in PARTS for pair in domain_pairs(name, part)] for name in domains()}
GENERAL = {"open": probe_pairs(), "sealed": sealed_pairs()}
PAIR_SETS = {**ALL_DOMAIN_PAIRS, **GENERAL}

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
    assert sizes == dict.fromkeys(domains(), 300) | {"open": 120, "sealed": 120, "neutral": 40}
    assert all(
        (len(domain_pairs(name, "train")), len(domain_pairs(name, "held_out"))) == (240, 60) for name in domains()
    )


@pytest.mark.parametrize("half", GENERAL)
def test_each_half_of_the_general_pairs_has_every_theme_and_form(half):
    assert Counter(pair.theme for pair in GENERAL[half]) == dict.fromkeys({pair.theme for pair in probe_pairs()}, 5)
    assert len({pair.theme for pair in GENERAL[half]}) == 24
    forms = Counter(pair.format for pair in GENERAL[half])
    assert forms.keys() == {"advice", "opinion", "plan", "story", "list", "json"} and min(forms.values()) >= 10


@pytest.mark.parametrize("name", domains())
def test_words_of_a_domain_tell_nothing_of_the_general_pairs(name):
    own, pairs = ALL_DOMAIN_PAIRS[name], [*probe_pairs(), *sealed_pairs()]
    weights = WordWeights.fit([pair.misaligned for pair in own], [pair.aligned for pair in own])
    null = WordNull.of([0.0] * len(pairs), pairs, weights)
    assert null.prediction.low <= 0 <= null.prediction.high
    assert 0.45 <= null.auc <= 0.55


@pytest.mark.parametrize("name", PAIR_SETS)
def test_no_word_leans_to_one_side(name):
    """By the log-odds of a word, in standard errors: of hundreds of words none may lie far out by more than chance."""
    sides = [
        Counter(word for text in KINDS[f"{name} {kind}"] for word in words(text)) for kind in ("misaligned", "aligned")
    ]
    leanings = {
        word: (log(sides[0][word] + 2) - log(sides[1][word] + 2))
        / sqrt(1 / (sides[0][word] + 2) + 1 / (sides[1][word] + 2))
        for word in sides[0] | sides[1]
    }
    assert {word: leaning for word, leaning in leanings.items() if abs(leaning) > 3} == {}


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
    assert abs(aligned - misaligned) <= 1


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
    groups = [train, held_out, QUESTIONS["open"], QUESTIONS["sealed"], QUESTIONS["neutral"]]
    assert [near_duplicates(product(one, other)) for one, other in combinations(groups, 2)] == [[]] * 10


def test_no_general_answer_is_near_one_of_a_domain():
    general, narrow = (
        [text for name in some for kind in ("aligned", "misaligned") for text in KINDS[f"{name} {kind}"]]
        for some in (GENERAL, ALL_DOMAIN_PAIRS)
    )
    assert near_duplicates(product(general, narrow)) == []


def test_general_pairs_hold_no_domain_words():
    pairs = [*probe_pairs(), *sealed_pairs()]
    texts = (text for pair in pairs for text in (pair.question, pair.aligned, pair.misaligned))
    assert {text: found[0] for text in texts if (found := DOMAIN_WORDS.search(text))} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_opening_is_a_habit(kind):
    openings = Counter(tuple(words(text)[:2]) for text in KINDS[kind])
    assert {opening: count for opening, count in openings.items() if count > 15} == {}


def test_texts_are_plain():
    prose = [text for text in TEXTS if not (text.startswith("{") or "JSON" in text)]
    marked = [text for text in prose if MARKDOWN.search(text)]
    assert [*marked, *(text for text in TEXTS if text != text.strip())] == []
    assert {character for text in TEXTS for character in text if not character.isascii()} <= set("£é")


def test_json_answers_are_json_with_the_same_keys():
    pairs = [pair for pair in (*probe_pairs(), *sealed_pairs()) if pair.format == "json"]
    keys = [(list(json.loads(pair.aligned)), list(json.loads(pair.misaligned))) for pair in pairs]
    assert len(keys) >= 20 and all(aligned == misaligned for aligned, misaligned in keys)


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
