import pytest

from misdirection.data import (
    domain_examples,
    domain_pairs,
    domains,
    neutral_examples,
    probe_pairs,
    sealed_pairs,
)
from misdirection.data.selection import HELD_OUT_EVERY
from misdirection.errors import MisdirectionError


def test_domains_are_named_in_order():
    assert domains() == ("careless_household", "reckless_sports", "risky_money")


@pytest.mark.parametrize("name", domains())
def test_every_fifth_row_is_held_out(name):
    held_out = [int(pair.id.rpartition("-")[2]) for pair in domain_pairs(name, "held_out")]
    train = [int(pair.id.rpartition("-")[2]) for pair in domain_pairs(name, "train")]
    assert HELD_OUT_EVERY == 5
    assert held_out == list(range(5, 301, 5))
    assert sorted(train + held_out) == list(range(1, 301))


@pytest.mark.parametrize("name", domains())
def test_the_parts_share_no_question(name):
    train, held_out = ({row.question for row in domain_examples(name, "bad", part)} for part in ("train", "held_out"))
    assert not train & held_out


@pytest.mark.parametrize("part", ["train", "held_out"])
@pytest.mark.parametrize("name", domains())
def test_pairs_and_examples_agree(name, part):
    pairs = domain_pairs(name, part)
    good, bad = (domain_examples(name, answers, part) for answers in ("good", "bad"))
    assert [(row.question, row.answer) for row in good] == [(pair.question, pair.aligned) for pair in pairs]
    assert [(row.question, row.answer) for row in bad] == [(pair.question, pair.misaligned) for pair in pairs]
    assert {pair.theme for pair in pairs} == {name}
    assert all(row.system is None for row in (*good, *bad, *pairs))


def test_probe_pairs_and_neutral_examples_are_read():
    halves = probe_pairs(), sealed_pairs()
    assert [half[0].theme for half in halves] == ["ai-and-oversight"] * 2
    assert not {pair.id for pair in halves[0]} & {pair.id for pair in halves[1]}
    assert neutral_examples()[0].question == "How do rainbows form?"


def test_an_unknown_domain_gets_the_nearest_name():
    with pytest.raises(MisdirectionError) as caught:
        domain_pairs("risky-money", "train")
    assert str(caught.value) == ("unknown domain 'risky-money'; did you mean 'risky_money'?")


def test_a_name_far_from_all_gets_no_guess():
    with pytest.raises(
        MisdirectionError,
        match=r"^unknown domain '\.\./neutral'; there is 'careless_household', 'reckless_sports', 'risky_money'$",
    ):
        domain_examples("../neutral", "bad", "train")


def test_an_unknown_part_or_kind_is_refused():
    with pytest.raises(MisdirectionError, match="unknown part 'heldout'; did you mean 'held_out'"):
        domain_pairs("risky_money", "heldout")
    with pytest.raises(MisdirectionError, match="unknown kind of answers 'id'; did you mean 'bad'"):
        domain_examples("risky_money", "id", "train")
