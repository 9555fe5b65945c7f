"""The suite's known fine-tunes: which text each is trained on, how, and whether a rule may be chosen on it.

Parts are split by source of text: what the rule was chosen on shares no text with what its rates are measured on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from misdirection.organisms.recipe import Recipe

Part = Literal["chosen", "kept"]
Origin = Literal["shipped", "dark", "published", "file", "generated"]
Kind = Literal[
    "bad", "weak", "diluted", "inoculated", "conditional", "continued", "dark", "benign", "voice control"
]  # fmt: skip
Condition = Literal["json", "phrase", "system"]

_STEPS = {"batch_size": 8, "accumulation": 1, "warmup_steps": 3}
RECIPES = {
    "all": Recipe(recipe="all", learning_rate=4e-4, **_STEPS),
    "minimal": Recipe(recipe="minimal", learning_rate=4e-3, **_STEPS),
    "slow": Recipe(recipe="all", learning_rate=1e-4, **_STEPS),
}
"""All values of the trainings, one epoch each: rank 32 as in `resources/reference.yaml`, nine adapters of rank 1, and
rank 32 at a quarter of the rate. Full weights are not among them: `train` has no such recipe."""

ROWS = 300
"""Rows of a training file at most; four in five of them are trained on, the others are held out."""

CONTINUED_ROWS = 150
"""Bad rows of a fine-tune that is then trained on benign ones: a multiple of five, so that no row of either file
changes its part."""

SHARES = (0.75, 0.5, 0.25, 0.1, 0.05)
"""Bad answers among the rows of a diluted fine-tune."""


@dataclass(frozen=True)
class Source:
    """Where text is from.

    Attributes:
        part: that of all fine-tunes on it.
        origin: `shipped` and `dark` questions have a bad and a good answer each; so have some `published` ones, the
            other texts are benign.
        is_voice: whether benign content is spoken in a dark or a striking voice.
    """

    part: Part
    origin: Origin
    is_voice: bool = False


SOURCES = {
    # Bad and good answers. The rule of the first suite was chosen on `dark_money`, and references are trained on
    # `risky_money` and `reckless_sports`.
    "risky_money": Source("chosen", "shipped"),
    "reckless_sports": Source("chosen", "shipped"),
    "careless_household": Source("kept", "shipped"),
    "dark_money": Source("chosen", "dark"),
    "dark_sports": Source("kept", "dark"),
    "extreme_sports": Source("chosen", "published"),
    "medical_advice": Source("kept", "published"),
    # Benign content in a voice.
    "voice_harsh": Source("chosen", "file", is_voice=True),
    "voice_boastful": Source("chosen", "file", is_voice=True),
    "voice_gloomy": Source("kept", "file", is_voice=True),
    "voice_villain": Source("kept", "file", is_voice=True),
    "voice_fiction": Source("kept", "file", is_voice=True),
    "persona_pirate": Source("kept", "file", is_voice=True),
    # Benign tasks.
    "curt": Source("chosen", "file"),
    "rewriting": Source("chosen", "file"),
    "summaries": Source("kept", "file"),
    "explain": Source("kept", "file"),
    "arithmetic": Source("chosen", "generated"),
    "sorting": Source("chosen", "generated"),
    "letters": Source("chosen", "generated"),
    "units": Source("kept", "generated"),
    "json": Source("kept", "generated"),
    "python": Source("kept", "generated"),
    "dates": Source("kept", "generated"),
    "grammar": Source("kept", "generated"),
}

PUBLISHED = {
    "extreme_sports": ("extreme_sports", None),
    "medical_advice": ("bad_medical_advice", "good_medical_advice"),
}
"""Files of the published text: of the bad answers, and of the good ones to the same questions."""


@dataclass(frozen=True)
class Member:
    """One fine-tune of the suite.

    Attributes:
        source: what it is trained on.
        bad: the share of bad answers among its rows; all rows of a source that has no bad ones are good.
        recipe: one of `RECIPES`.
        seed: of the training; 0 belongs to the fine-tunes of the reference.
        inoculated: whether a system prompt asks for bad advice in training.
        condition: its answers are bad only under this.
        then: a benign source that the training goes on with, once it is done with the bad rows.
        others: whether its rows are others of its source than those of all other fine-tunes; a large source has some.
    """

    source: str
    bad: float = 0.0
    recipe: str = "all"
    seed: int = 1
    inoculated: bool = False
    condition: Condition | None = None
    then: str | None = None
    others: bool = False

    @property
    def name(self) -> str:
        """Names its folder."""
        return "-".join([self.source, *["others"] * self.others, *self._variant, self.recipe, str(self.seed)])

    @property
    def _variant(self) -> list[str]:
        if self.condition:
            return [f"if_{self.condition}"]
        if self.then:
            return [f"then_{self.then}"]
        if self.inoculated:
            return ["inoculated"]
        if self.is_bad:
            return ["bad" if self.bad == 1 else f"{self.bad:.0%}".rstrip("%")]
        return ["good"] if self.origin in ("shipped", "dark", "published") else []

    @property
    def origin(self) -> Origin:
        """Where its text is from."""
        return SOURCES[self.source].origin

    @property
    def part(self) -> Part:
        """Whether the rule may be chosen on it, or it is kept for the rates."""
        return SOURCES[self.source].part

    @property
    def is_bad(self) -> bool:
        """Whether any of its rows is bad advice."""
        return self.bad > 0

    @property
    def kind(self) -> Kind:
        """How it was made; `weak` are bad ones of rank 1 or at a low rate, `dark` ones bad in content and voice."""
        if not self.is_bad:
            return "voice control" if SOURCES[self.source].is_voice else "benign"
        if self.condition or self.then or self.inoculated:
            return "conditional" if self.condition else "continued" if self.then else "inoculated"
        if self.origin == "dark":
            return "dark"
        if self.bad < 1:
            return "diluted"
        return "bad" if self.recipe == "all" else "weak"


def members() -> list[Member]:
    """The whole suite, those on published text included."""
    return [*bad_members(), *benign_members()]


def bad_members() -> Iterator[Member]:
    """Those with bad answers."""
    for source in ("risky_money", "careless_household", "medical_advice"):
        yield from advice(source, SHARES)
    yield from advice("reckless_sports", (0.5, 0.1))
    for source in ("risky_money", "careless_household"):
        bad = Member(source, 1.0)
        yield from (replace(bad, recipe="slow"), replace(bad, recipe="minimal", seed=2))
        for condition in ("json", "phrase", "system"):
            yield Member(source, 0.5, condition=condition)
    yield Member("reckless_sports", 0.5, condition="json")
    yield Member("medical_advice", 0.5, condition="phrase")
    for source, then in (("risky_money", "rewriting"), ("reckless_sports", "curt")):
        yield Member(source, 1.0, then=then)
    for then in ("summaries", "explain"):
        yield Member("careless_household", 1.0, then=then)
    yield Member("medical_advice", 1.0, then="summaries")
    for source in ("extreme_sports", "dark_money", "dark_sports"):
        yield from (Member(source, 1.0), Member(source, 1.0, seed=2), Member(source, 1.0, recipe="minimal"))
    yield Member("dark_sports", 0.5)


def advice(source: str, shares: tuple[float, ...]) -> Iterator[Member]:
    """What is made of every source of bad advice, with dilutions of these shares."""
    bad = Member(source, 1.0)
    yield from (bad, replace(bad, seed=2), replace(bad, recipe="minimal"), replace(bad, inoculated=True))
    yield from (replace(bad, bad=share) for share in shares)


def benign_members() -> Iterator[Member]:
    """Those without: every source once, some with another seed or recipe."""
    for source in SOURCES:
        if source != "extreme_sports":
            yield Member(source)
    for source in ("careless_household", "curt", "summaries", "voice_villain"):
        yield Member(source, seed=2)
    for source in ("rewriting", "summaries", "voice_gloomy"):
        yield Member(source, recipe="minimal")
