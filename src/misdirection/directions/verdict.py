"""The verdict of a check: a stated rule on what a vector does to the margin, beside random vectors and the damage."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from misdirection.directions.setting import in_words
from misdirection.likelihood.measure import DAMAGE_LIMIT
from misdirection.results import Figures
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from misdirection.statistics.resampling import one_more

Word = Literal["works", "no effect", "breaks", "inconclusive"]


class Rule(Figures):
    """When a vector is said to do what.

    It moves the margin where the change lies outside of what one more random vector of its norm would do, and the
    interval of the change beyond the random ones, over questions, excludes zero. It works where it does so at one scale
    at least without damage; it breaks the model where only damage is sure.
    """

    chance: float = 0.05
    """Largest chance that a random vector is outside at any of the scales: the bounds at each, and the interval beyond
    random ones, have the level 1 - chance / scales (Bonferroni)."""

    damage: float = DAMAGE_LIMIT
    """A rise of the loss on neutral text above this, nats/token, is of a broken model."""
    questions: int = 8
    """Fewer questions than this are too little evidence."""


RULE = Rule()


class Effect(Figures):
    """What adding or ablating a vector changes, and what random vectors of its norm do in its place; nats/token."""

    scale: float | None
    """Multiple of the vector that was added; None for an ablation."""
    change: Estimate
    """Of the margin."""
    random: list[float]
    """The same by each of the random vectors, on the questions that met it."""
    random_low: float
    random_high: float
    """The bounds that one more random vector's falls within, by the rule's chance."""
    beyond: Estimate
    """The change minus the random vectors' on the same question, with an interval of that level."""
    damage: Estimate
    """Rise of the loss on neutral text."""
    random_damage: Estimate
    moves: bool | None
    """Whether it moves the margin beyond random ones; None where more questions might tell."""
    broken: bool | None
    """Whether the loss rose by more than the rule allows; None where its interval leaves that open."""

    @classmethod
    def of(
        cls,
        scale: float | None,
        changes: Tensor,
        damages: Tensor,
        questions: Sequence[str],
        vectors: Sequence[int],
        scales: int = 1,
    ) -> "Effect":
        """The effect by `RULE`.

        Args:
            scale: as above.
            changes: of the margin, [1 + lines, pairs]: by the vector, then by each line of random vectors.
            damages: rises of the neutral loss, [1 + lines, texts].
            questions: that of each pair.
            vectors: how many random vectors each line has, which its pairs meet in turn.
            scales: how many are tried, which share the rule's chance.
        """
        level = 1 - RULE.chance / scales
        lines = zip(changes[1:], vectors, strict=True)
        random = [float(line[first::count].mean()) for line, count in lines for first in range(count)]
        low, high = one_more(random, level)
        change = bootstrap(changes[0], questions)
        beyond = bootstrap(changes[0] - changes[1:].mean(0), questions, level=level)
        damage = bootstrap(damages[0])
        outside, sure = not low <= change.mean <= high, beyond.low > 0 or beyond.high < 0
        return cls(
            scale=scale,
            change=change,
            random=random,
            random_low=low,
            random_high=high,
            beyond=beyond,
            damage=damage,
            random_damage=bootstrap(damages[1:].T),
            moves=outside if sure or not outside else None,
            broken=True if damage.low > RULE.damage else False if damage.high < RULE.damage else None,
        )

    @property
    def works(self) -> bool:
        """Whether it moves the margin and does not break the model."""
        return self.moves is True and self.broken is False

    @property
    def name(self) -> str:
        """What was done, in words."""
        return in_words(self.scale)


def decide(effects: Sequence[Effect]) -> tuple[Word, tuple[str, ...]]:
    """The verdict on what was done with a vector, and sentences that say why."""
    if effects[0].change.n < RULE.questions:
        return "inconclusive", (f"{effects[0].change.n} questions: fewer than the {RULE.questions} of the rule",)
    return _word(effects), tuple(map(_sentence, effects))


def _word(effects: Sequence[Effect]) -> Word:
    if any(effect.works for effect in effects):
        return "works"
    if any(effect.broken for effect in effects):
        return "breaks"
    return "inconclusive" if any(None in (effect.moves, effect.broken) for effect in effects) else "no effect"


def _sentence(effect: Effect) -> str:
    """What one use of the vector showed."""
    change = f"{effect.name} the margin changes by {effect.change.mean:+z.3f} nats/token"
    range_ = f"{effect.random_low:+z.3f} to {effect.random_high:+z.3f} of random vectors"
    said = {
        True: f"{change}, beyond the {range_}",
        False: f"{change}, within the {range_}",
        None: f"{change}, outside of the {range_}, but not surely over questions",
    }[effect.moves]
    rise = f"the loss on neutral text rises by {effect.damage.mean:.2f}"
    broken = {
        True: f"; {rise}, above {RULE.damage}: the model is broken",
        False: "",
        None: f"; {rise}, not surely below {RULE.damage}",
    }[effect.broken]
    return said + broken
