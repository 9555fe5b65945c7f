"""The looks of an audit: it asks general questions step by step until the rule can decide, then some in other ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from misdirection.auditing.fine_tune import CONTROL, TUNED, Which
from misdirection.auditing.inputs import AuditInputs
from misdirection.auditing.stages import Stages
from misdirection.auditing.verdict import RULE, Asked, Verdict, decide
from misdirection.data import ProbePair
from misdirection.data.words import WordWeights
from misdirection.likelihood.margin import margins_of
from misdirection.likelihood.words import WordNull
from misdirection.statistics.estimates import LEVEL, Estimate
from misdirection.statistics.means import bootstrap, simultaneous
from misdirection.statistics.resampling import Floats


@dataclass(frozen=True, eq=False)
class Changes:
    """How far the margins moved on the questions that were asked.

    Attributes:
        looks: the parts of the general pairs that were asked.
        pairs: these pairs, in that order.
        by_set: change of each pair's margin, nats/token, by how it was asked, [pairs] each.
        control: the same of the benign control, the user's own or the mean of the reference's; empty without one.
        word_weights: of the words of the training data; None without that data.
        question_weights: how much each pair counts for the rule, [pairs]; None where all count alike.
    """

    looks: tuple[slice, ...]
    pairs: tuple[ProbePair, ...]
    by_set: Mapping[Asked, Floats]
    control: Mapping[Asked, Floats]
    word_weights: WordWeights | None
    question_weights: Floats | None = None

    def shifts(self, level: float = LEVEL) -> dict[Asked, Estimate]:
        """Mean changes, with intervals of this level."""
        return _means(self.by_set, level)

    def beyond_control(self, level: float = LEVEL) -> dict[Asked, Estimate]:
        """Mean changes beyond the control's, with intervals of this level; empty without a control."""
        return _means(self._beyond, level) if self.control else {}

    def weighted(self, level: float = LEVEL) -> dict[Asked, Estimate]:
        """The same by the questions' weights; empty where all count alike."""
        return {} if self.question_weights is None else self.decisive(level)

    def decisive(self, level: float = LEVEL) -> dict[Asked, Estimate]:
        """What the rule is about: changes beyond the control's, by the questions' weights where they have some, or the
        changes themselves where there is no control."""
        return _means(self._decisive, level)

    def words(self, level: float = LEVEL) -> dict[Asked, WordNull]:
        """What words predict of the decisive changes, and what is left of these; empty without the training data."""
        if self.word_weights is None:
            return {}
        return {
            asked: WordNull.of(change, self.pairs, self.word_weights, level) for asked, change in self._decisive.items()
        }

    def furthest(self, count: int) -> list[tuple[ProbePair, float]]:
        """The plain questions that moved furthest towards the misaligned answer, with how far beyond the control."""
        moved = self._beyond["general"]
        return [(self.pairs[number], float(moved[number])) for number in np.argsort(-moved, kind="stable")[:count]]

    @property
    def _decisive(self) -> Mapping[Asked, Floats]:
        if self.question_weights is None:
            return self._beyond
        return {asked: change * self.question_weights for asked, change in self._beyond.items()}

    @property
    def _beyond(self) -> Mapping[Asked, Floats]:
        """Changes beyond the control's; the changes themselves without one."""
        if not self.control:
            return self.by_set
        return {asked: change - self.control[asked] for asked, change in self.by_set.items()}


def _means(changes: Mapping[Asked, Floats], level: float) -> dict[Asked, Estimate]:
    return {asked: bootstrap(change, level=level) for asked, change in changes.items()}


def ask(stages: Stages) -> Changes:
    """Ask until the rule can decide, or all is asked.

    Without a reference to decide by, all open questions are asked, and no sealed one.
    """
    looks, opened = stages.inputs.looks, len(stages.inputs.texts.general)
    for count in range(1, len(looks) + 1):
        changes = _changes(stages, looks[:count])
        verdict = decide_on(stages, changes)
        if verdict.is_final or (verdict.unit is None and len(changes.pairs) >= opened):
            break
    return changes


def _changes(stages: Stages, looks: tuple[slice, ...]) -> Changes:
    data = stages.inputs.data
    sets: tuple[Asked, ...] = ("general", "framed") if data.path else ("general",)
    has_control = stages.inputs.fine_tune.control is not None

    def joined(which: Which) -> dict[Asked, Floats]:
        return {asked: np.concatenate([_change(stages, which, asked, look) for look in looks]) for asked in sets}

    control = joined(CONTROL) if has_control else {}
    pairs = tuple(pair for look in looks for pair in stages.inputs.texts.asked[look])
    return Changes(looks, pairs, joined(TUNED), control, stages.word_weights(), _question_weights(stages.inputs, looks))


def _question_weights(inputs: AuditInputs, looks: Sequence[slice]) -> Floats | None:
    """Beyond a control of the user's own; beyond the reference's, whose noise the weights have, all count alike."""
    weights = inputs.reference.question_weights if inputs.own_control and inputs.reference else None
    return None if weights is None else np.concatenate([weights[look] for look in looks])


def control_change(stages: Stages, looks: Sequence[slice]) -> Floats:
    """How far the benign control moved the margin of each general question, nats/token, [those of the looks]."""
    return np.concatenate([_change(stages, CONTROL, "general", look) for look in looks])


def _change(stages: Stages, which: Which, asked: Asked, look: slice) -> Floats:
    """Change of each margin against the base's."""
    reference, is_own = stages.inputs.reference, stages.inputs.own_control is not None
    if which == CONTROL and asked == "general" and not is_own and reference and reference.control_shift is not None:
        return np.asarray(reference.control_shift[look])
    return np.asarray(margins_of(stages.margins(which, asked, look) - stages.margins("base", asked, look)))


@dataclass(frozen=True, eq=False)
class Search:
    """How far the margins moved in each of the further ways of asking.

    Attributes:
        by_way: decisive change of each pair's margin, nats/token, by way, [pairs] each.
        beyond: what is left of them beyond words; empty without the training data.
    """

    by_way: Mapping[str, Floats]
    beyond: Mapping[str, Estimate]

    def shifts(self, level: float = LEVEL) -> dict[str, Estimate]:
        """Mean changes, with intervals that hold for all ways at once."""
        return simultaneous(self.by_way, level=level)


def search(stages: Stages) -> Search:
    """Ask in every further way. What words explain is taken off at a level that is corrected for their number."""
    ways, weights = stages.inputs.searched, stages.word_weights()
    by_way = {way: _searched(stages, way) for way in ways}
    level = 1 - (1 - RULE.level) / max(1, len(ways))
    beyond = (
        {way: WordNull.of(change, ways[way], weights, level).beyond for way, change in by_way.items()}
        if weights
        else {}
    )
    return Search(by_way, beyond)


def _searched(stages: Stages, way: str) -> Floats:
    """Change of each margin beyond the control's, or where there is none against the base's."""
    against: Which = "base" if stages.inputs.fine_tune.control is None else CONTROL
    return np.asarray(margins_of(stages.searched(TUNED, way) - stages.searched(against, way)))


def decide_on(
    stages: Stages, changes: Changes, searched: Search | None = None, rate: Estimate | None = None
) -> Verdict:
    """The verdict on what was measured, by intervals of the rule's level; `rate` is the judge's."""
    reference = stages.inputs.reference
    words: dict[str, Estimate] = {asked: null.beyond for asked, null in changes.words(RULE.level).items()}
    return decide(
        changes.decisive(RULE.level),
        stages.damage(),
        reference.bad_shift if reference else None,
        rate,
        beyond={**words, **(searched.beyond if searched else {})},
        has_control=bool(changes.control),
        is_weighted=changes.question_weights is not None,
        one_control=stages.inputs.own_control is not None,
        searched=searched.shifts(RULE.level) if searched else {},
    )
