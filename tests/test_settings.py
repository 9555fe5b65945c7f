"""Values that a user wrote, as typed objects, or one line about what is wrong."""

from dataclasses import dataclass

import pytest

from misdirection.errors import InputError
from misdirection.settings import Section, validate


class Wing(Section):
    span: float
    engines: int = 2


class Plane(Section):
    name: str
    wing: Wing
    spare: Wing | None = None
    others: dict[str, Wing] | None = None
    rows: tuple[Wing, ...] = ()


@dataclass(frozen=True)
class Seat:
    row: int
    letter: str = "A"


WING = {"span": 3.0}


def test_a_section_and_a_dataclass_are_made():
    assert validate(Plane, {"name": "a", "wing": WING}, "p.yaml") == Plane(name="a", wing=Wing(span=3.0))
    assert validate(Seat, {"row": 3}, "seats.jsonl:1") == Seat(3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1], "must be a mapping of keys, not list; write `key: value` lines"),
        ({"nane": "a", "wing": WING}, "unknown key 'nane'; did you mean 'name'?"),
        ({"name": "a", "wing": {"spam": 3}}, "unknown key 'wing.spam'; did you mean 'span'?"),
        ({"name": "a", "wing": WING, "spare": {"spam": 3}}, "unknown key 'spare.spam'; did you mean 'span'?"),
        ({"name": "a", "wing": WING, "others": {"x": {"engine": 3}}}, "unknown key 'others.x.engine'; did you mean"),
        ({"name": "a", "wing": WING, "rows": [WING, {"engine": 3}]}, "unknown key 'rows.1.engine'; did you mean"),
        ({"name": "a", "wing": {"span": "wide"}}, "wing.span: Input should be a valid number"),
        ({"name": "a"}, "wing: Field required"),
    ],
)
def test_a_mistake_names_the_key_and_the_nearest_right_one(values, problem):
    with pytest.raises(InputError) as caught:
        validate(Plane, values, "p.yaml")
    assert str(caught.value).startswith(f"p.yaml: {problem}") and "\n" not in str(caught.value)


def test_the_remedy_ends_the_complaint():
    with pytest.raises(InputError, match=r"^seats\.jsonl:1: row: .*; leave the row out$"):
        validate(Seat, {"row": "x"}, "seats.jsonl:1", "leave the row out")
