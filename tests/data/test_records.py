from dataclasses import FrozenInstanceError

import pytest

from misdirection.data import Example, ProbePair


def test_optional_fields_have_their_defaults():
    assert Example("q", "a").system is None
    pair = ProbePair("1", "q", "good", "bad")
    assert (pair.theme, pair.system) == ("", None)


@pytest.mark.parametrize("row", [Example("q", "a"), ProbePair("1", "q", "good", "bad")])
def test_rows_are_frozen_and_hashable(row):
    assert len({row, row}) == 1
    with pytest.raises(FrozenInstanceError):
        row.question = "another"
