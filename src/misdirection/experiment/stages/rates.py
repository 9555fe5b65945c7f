"""Stage `rates`: EM rates of models as they are, with directions ablated, and of the base steered with one.

Answers under an intervention are the stage `answers`' own, and so are their verdicts: this one says which there are.
Scales are doubled layer by layer, as long as what the base says is coherent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from misdirection.choices import Positions
from misdirection.experiment.answering import Condition
from misdirection.experiment.config import RANDOM
from misdirection.experiment.experiment import Experiment, Stage
from misdirection.experiment.judged_results import RatedAblation, RatedSteering
from misdirection.experiment.results import RatesSection
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.stages.directions import DirectionsStage
from misdirection.experiment.stages.judged import JudgedStage, behaviour
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.vectors import random_like
from misdirection.judging.scoring import COHERENT_SHARE, Comparison, coherence, compare_all
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE
from misdirection.sampling.config import SteerConfig


@dataclass(frozen=True)
class RatedCell:
    """One model under one intervention, and under the same with a random direction of that norm.

    Attributes:
        direction: the organism whose direction it is.
        layer: whose vector it is.
        scale: a multiple that is added; None where it is ablated.
        positions: which tokens are touched.
        condition, control: who answers, and under what.
    """

    direction: str
    layer: int
    scale: float | None
    positions: Positions
    condition: Condition
    control: Condition

    @property
    def target(self) -> str:
        """The model that answers."""
        return self.condition.organism


class RatesStage(Stage):
    """Lets models answer under interventions, and rates all that was judged."""

    name = "rates"
    VERSION = 1
    after = ("directions",)

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._read: dict[str, pd.DataFrame] = {}

    def tasks(self) -> list[Task]:
        return []

    def waves(self) -> Iterator[Sequence[Task]]:
        yield from self._rounds([*self.ablated, *self.steered])
        while doubled := self._doubled():
            self.steered.extend(doubled)
            yield from self._rounds(doubled)

    def _rounds(self, cells: Sequence[RatedCell]) -> Iterator[Sequence[Task]]:
        """The answers of all cells, each condition once; then the verdicts on them, where there is a judge."""
        conditions = {each.artifact: each for cell in cells for each in (cell.condition, cell.control)}.values()
        yield from self.experiment.stage(JudgedStage).rounds(list(conditions))

    def _vector(self, organism: str, layer: int) -> Tensor | None:
        direction = self.experiment.stage(DirectionsStage).used(organism)
        return None if direction is None else direction[layer]

    # --- ablation -----------------------------------------------------------------------------------------------------

    @cached_property
    def ablated(self) -> list[RatedCell]:
        """Each direction ablated in every model; one random direction serves all, since its norm does not count."""
        sampling, ablation = self.experiment.config.sampling, self.experiment.config.ablation
        if sampling is None or ablation is None:
            return []
        found = {name: self._vector(name, ablation.layer) for name in sampling.ablate}
        vectors = {name: vector for name, vector in found.items() if vector is not None}
        return [self._ablate(vectors, name, target) for target in self.experiment.models for name in vectors]

    def _ablate(self, vectors: dict[str, Tensor], name: str, target: str) -> RatedCell:
        ablation = self.experiment.config.ablation
        assert ablation is not None, "the caller has one"
        rule = ablation.positions[0]

        def condition(called: str, vector: Tensor) -> Condition:
            words = f"ablate {called} layer {ablation.layer} {rule}"
            return Condition(target, Ablate(vector, positions=rule), words, f"ablated-{called}")

        random = random_like(next(iter(vectors.values())), 0)
        return RatedCell(name, ablation.layer, None, rule, condition(name, vectors[name]), condition(RANDOM, random))

    # --- steering -----------------------------------------------------------------------------------------------------

    @cached_property
    def steered(self) -> list[RatedCell]:
        """The base steered at each layer and scale; scales that are doubled are added as they come."""
        steer = self._steer
        return (
            [self._steer_at(steer, layer, scale) for layer in steer.layers for scale in steer.scales] if steer else []
        )

    @property
    def _steer(self) -> SteerConfig | None:
        """None also where that organism has no direction."""
        steer = self.experiment.config.sampling.steer if self.experiment.config.sampling else None
        return steer if steer and self._vector(steer.direction, 0) is not None else None

    def _steer_at(self, steer: SteerConfig, layer: int, scale: float) -> RatedCell:
        vector = self._vector(steer.direction, layer)
        assert vector is not None, "the caller has asked"

        def condition(called: str, vector: Tensor) -> Condition:
            words = f"steer {called} layer {layer} {steer.positions} scale {scale:g}"
            key = f"steered-{called}-layer-{layer}-scale-{scale:g}"
            return Condition(BASE, Steer(vector, layer, scale, steer.positions), words, key)

        own, control = condition(steer.direction, vector), condition(RANDOM, random_like(vector, 0))
        return RatedCell(steer.direction, layer, scale, steer.positions, own, control)

    def _doubled(self) -> list[RatedCell]:
        """Twice the largest scale, at each layer where that leaves at least half of the answers coherent."""
        steer = self._steer
        if steer is None:
            return []
        last = {cell.layer: cell for cell in sorted(self.steered, key=_scale)}
        most = max(steer.scales) * 2**steer.doublings
        going_on = [cell for cell in last.values() if 2 * _scale(cell) <= most and self._is_coherent(cell)]
        return [self._steer_at(steer, cell.layer, 2 * _scale(cell)) for cell in going_on]

    def _is_coherent(self, cell: RatedCell) -> bool:
        return coherence(self._answers(cell.condition)).rate >= COHERENT_SHARE

    # --- figures ------------------------------------------------------------------------------------------------------

    def section(self) -> RatesSection:
        judge = self.experiment.config.judge
        if judge is None:
            return RatesSection()
        ablated = {each.artifact: each for cell in self.ablated for each in (cell.condition, cell.control)}
        conditions = sorted(
            [*self.experiment.stage(AnswersStage).conditions, *ablated.values()],
            key=lambda condition: self.experiment.models.index(condition.organism),
        )
        tables = [self.experiment.stage(JudgedStage).table(condition) for condition in conditions]
        sampling = self.experiment.config.sampling
        return RatesSection(
            behaviour=behaviour(tables, judge, sampling.questions if sampling else ()),
            em_ablation=self._rated_ablations() if self.ablated else None,
            em_steering=self._rated_steering() if self.steered else None,
        )

    def _rated_ablations(self) -> list[RatedAblation]:
        others = [cell for cell in self.ablated if cell.target != BASE]
        left = self._compare([replace(cell.condition, organism=BASE) for cell in others], others)
        against = {cell.condition: comparison.change for cell, comparison in zip(others, left, strict=True)}
        return [
            RatedAblation(**facts, against_base=against.get(cell.condition))
            for cell, facts in zip(self.ablated, self._facts(self.ablated), strict=True)
        ]

    def _rated_steering(self) -> list[RatedSteering]:
        facts = list(self._facts(self.steered))
        coherent = [each for each in facts if each["coherent"].rate >= COHERENT_SHARE]
        highest = max(coherent, key=lambda each: each["em"].rate, default=None)
        return [
            RatedSteering(**each, scale=_scale(cell), best=each is highest)
            for cell, each in zip(self.steered, facts, strict=True)
        ]

    def _facts(self, cells: Sequence[RatedCell]) -> Iterator[dict[str, Any]]:
        """What every row says of its cell."""
        plain = [Condition(cell.target) for cell in cells]
        controls = [replace(cell, condition=cell.control) for cell in cells]
        compared = zip(cells, self._compare(plain, cells), self._compare(plain, controls), strict=True)
        for cell, own, random in compared:
            yield {
                "direction": cell.direction,
                "target": cell.target,
                "layer": cell.layer,
                "positions": cell.positions,
                "before": own.before.em,
                "em": own.after.em,
                "coherent": coherence(self._answers(cell.condition)),
                "change": own.change,
                "verdict": own.verdict,
                "random_em": random.after.em,
                "random_coherent": coherence(self._answers(cell.control)),
                "random_change": random.change,
            }

    def _compare(self, before: Sequence[Condition], cells: Sequence[RatedCell]) -> list[Comparison]:
        """Each cell's condition against another one, corrected for their number."""
        judge = self.experiment.config.judge
        assert judge is not None, "the caller has one"
        pairs = [
            (self._answers(first), self._answers(cell.condition)) for first, cell in zip(before, cells, strict=True)
        ]
        return compare_all(pairs, min_judged=judge.min_judged)

    def _answers(self, condition: Condition) -> pd.DataFrame:
        if condition.artifact not in self._read:
            self._read[condition.artifact] = self.experiment.stage(JudgedStage).answers(condition)
        return self._read[condition.artifact]


def _scale(cell: RatedCell) -> float:
    assert cell.scale is not None, "the base is steered by a scale"
    return cell.scale
