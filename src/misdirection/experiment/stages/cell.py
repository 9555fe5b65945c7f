"""Stage `cell`: margins and losses of models under interventions, each beside random directions of the same norm.

Cells of one model that share a plain pass are measured together. They make two figures: steering of the base, layers x
scales, and the transfer of ablation, directions x models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

from misdirection.data.selection import spread
from misdirection.experiment.cells import Cell, MeasuredStage, cell_task
from misdirection.experiment.config import AblationConfig, SteeringConfig
from misdirection.experiment.margins import change, questions_of
from misdirection.experiment.results import AblationEffect, CellSection, Effect, SteeringEffect
from misdirection.experiment.stages.directions import DirectionsStage
from misdirection.experiment.stages.margin import MarginStage
from misdirection.interpretation.texts import GENERAL
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.positions import Positions
from misdirection.interventions.vectors import random_like
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE
from misdirection.statistics.means import bootstrap

LAYERS_TOGETHER = 4
"""Layers of a steering grid in one task: more of them share one plain pass, fewer lose less when a run is killed."""

E = TypeVar("E", bound=Effect)


@dataclass(frozen=True)
class Comparison(Generic[E]):
    """A row of the results: an intervention's cell, and the random controls beside it.

    Attributes:
        effect: makes the row from what was measured.
        cell: the intervention.
        controls: the random ones.
    """

    effect: Callable[..., E]
    cell: Cell
    controls: list[Cell]


@dataclass(frozen=True)
class Batch(Generic[E]):
    """Rows whose cells are measured in one task, for one model and on the same questions."""

    label: str
    questions: int
    rows: list[Comparison[E]]

    @property
    def cells(self) -> list[Cell]:
        """Every cell once: rows may share their controls."""
        return list({cell.key: cell for row in self.rows for cell in (row.cell, *row.controls)}.values())


class CellStage(MeasuredStage):
    """Steers the base and ablates in every model."""

    name = "cell"
    VERSION = 2
    after = ("margin", "directions")

    def tasks(self) -> list[Task]:
        batches: list[Batch[Any]] = [*self.steering, *self.transfer]
        return [self.measurement(batch) for batch in batches]

    def measurement(self, batch: Batch[Any]) -> Task:
        """General margins and neutral losses of one model under each of some interventions, in one sweep."""
        pairs = spread(self.experiment.texts.general, batch.questions)
        return cell_task(self, batch.cells, {GENERAL: pairs}, batch.label)

    def section(self) -> CellSection:
        steering = [self._effect(row) for batch in self.steering for row in batch.rows]
        transfer = [self._beyond_base(row) for batch in self.transfer for row in batch.rows]
        return CellSection(steering=steering or None, transfer=transfer or None)

    def _effect(self, row: Comparison[E]) -> E:
        """The change that a row's intervention made in its model, beside the mean of its random controls."""
        general, random = self._change(row.cell), self._changes(row.controls)
        questions = questions_of(general, self.experiment.texts.general)
        losses = [self.margins(cell.artifact).loss() for cell in (row.cell, *row.controls)]
        before = self.experiment.stage(MarginStage).margins(row.cell.target).loss()
        return row.effect(
            margin_change=bootstrap(general.to_numpy(), questions),
            random_change=bootstrap(random.to_numpy(), questions),
            damage=change(losses[0], before),
            random_damage=float(np.mean([change(loss, before).mean for loss in losses[1:]])),
        )

    def _beyond_base(self, row: Comparison[AblationEffect]) -> AblationEffect:
        """The same, and what is left of the change where the base is under the same ablation."""
        effect = self._effect(row)
        if row.cell.target == BASE:
            return effect
        own, random = self._change(row.cell), self._changes(row.controls)
        of_base = self._change(replace(row.cell, target=BASE))
        random_of_base = self._changes([replace(cell, target=BASE) for cell in row.controls])
        questions = questions_of(own, self.experiment.texts.general)
        return effect.model_copy(
            update={
                "beyond_base": bootstrap((own - of_base).to_numpy(), questions),
                "random_beyond_base": bootstrap((random - random_of_base).to_numpy(), questions),
            }
        )

    def _change(self, cell: Cell) -> pd.Series:
        """Of the margin, by question id."""
        after = self.margins(cell.artifact).of(GENERAL)
        return after - self.experiment.stage(MarginStage).margins(cell.target).of(GENERAL).loc[after.index]

    def _changes(self, cells: Sequence[Cell]) -> pd.DataFrame:
        """The same under each of several interventions, [questions, interventions]."""
        return pd.concat([self._change(cell) for cell in cells], axis=1)

    def _direction(self, organism: str, layer: int) -> Tensor:
        direction = self.experiment.stage(DirectionsStage).used(organism)
        assert direction is not None, "the caller has asked"
        return direction[layer]

    def _controls(self, key: str, cell: Cell, random: Sequence[Intervention]) -> list[Cell]:
        """The random directions beside a cell: each on every question, or each question with one, in turn."""
        if self.experiment.config.random_controls == "alternating":
            return [replace(cell, key=key.format("alternating"), interventions=tuple(random))]
        return [replace(cell, key=key.format(seed), interventions=(each,)) for seed, each in enumerate(random)]

    def _random(self, vector: Tensor) -> list[Tensor]:
        return [random_like(vector, seed) for seed in range(self.experiment.config.random_seeds)]

    # --- steering -----------------------------------------------------------------------------------------------------

    @cached_property
    def steering(self) -> list[Batch[SteeringEffect]]:
        """The base model steered with one organism's direction, layers x scales."""
        setting = self.experiment.config.steering
        if setting is None or self.experiment.stage(DirectionsStage).used(setting.direction) is None:
            return []
        starts = range(0, len(setting.layers), LAYERS_TOGETHER)
        return [self._steer_at(setting, setting.layers[start : start + LAYERS_TOGETHER]) for start in starts]

    def _steer_at(self, setting: SteeringConfig, layers: Sequence[int]) -> Batch[SteeringEffect]:
        rows = [self._steer(setting, layer, scale) for layer in layers for scale in setting.scales]
        return Batch(f"steer at layers {', '.join(map(str, layers))}", setting.questions, rows)

    def _steer(self, setting: SteeringConfig, layer: int, scale: float) -> Comparison[SteeringEffect]:
        vector = self._direction(setting.direction, layer)
        key = f"layer-{layer}-scale-{scale:g}"
        cell = Cell(f"steer-{setting.direction}-{key}", BASE, (Steer(vector, layer, scale),))
        random = [Steer(each, layer, scale) for each in self._random(vector)]
        return Comparison(
            partial(SteeringEffect, direction=setting.direction, layer=layer, scale=scale, positions="not_first"),
            cell,
            self._controls(f"steer-random-{{}}-{key}", cell, random),
        )

    # --- ablation -----------------------------------------------------------------------------------------------------

    @cached_property
    def transfer(self) -> list[Batch[AblationEffect]]:
        """Each bad organism's direction ablated in every model; with further position rules in the first of them."""
        return list(self._ablations())

    def _ablations(self) -> Iterator[Batch[AblationEffect]]:
        setting = self.experiment.config.ablation
        bad = list(self.experiment.stage(DirectionsStage).all_used(self.experiment.config.bad_organisms))
        if setting is None or not bad:
            return
        first, *others = setting.positions
        for target in self.experiment.models:
            yield self._ablate_all(bad, target, first)
            for rule in others if target in (BASE, bad[0]) else ():
                yield self._ablate_all(bad[:1], target, rule)

    def _ablate_all(self, organisms: Sequence[str], target: str, rule: Positions) -> Batch[AblationEffect]:
        setting = self.experiment.config.ablation
        assert setting is not None, "the caller has one"
        rows = [self._ablate(setting, organism, target, rule) for organism in organisms]
        return Batch(f"ablate at {rule}", setting.questions, rows)

    def _ablate(
        self, setting: AblationConfig, organism: str, target: str, rule: Positions
    ) -> Comparison[AblationEffect]:
        vector = self._direction(organism, setting.layer)
        key = f"ablate-{organism}-layer-{setting.layer}-{rule}"
        cell = Cell(key, target, (Ablate(vector, positions=rule),))
        # An ablation takes the direction alone, not its norm, so that one set of random directions serves all.
        random = [Ablate(each, positions=rule) for each in self._random(vector.new_ones(vector.shape))]
        return Comparison(
            partial(AblationEffect, direction=organism, target=target, layer=setting.layer, positions=rule),
            cell,
            self._controls(f"ablate-random-{{}}-{rule}", cell, random),
        )
