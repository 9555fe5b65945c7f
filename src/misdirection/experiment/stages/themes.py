"""Stage `themes`: directions of single themes, and what the base says when it is steered with each: a closed loop.

All directions come of one organism's own judged answers. A theme's is that of its misaligned answers about the theme;
what it lacks of the direction over all themes, and what that lacks of the themes, are directions of their own. All are
added at one length, so that they differ in where they point alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import pandas as pd
from torch import Tensor

from misdirection.data import data_hash
from misdirection.directions.convergence import compare_tensors, cosines
from misdirection.directions.direction import Direction
from misdirection.directions.judged import KIND, JudgedGroups, ThemeScore, own_groups, shared_remainder, theme_remainder
from misdirection.experiment.answering import Condition
from misdirection.experiment.config import NONE, RANDOM, SHARED, ThemesConfig
from misdirection.experiment.experiment import Stage
from misdirection.experiment.judged_results import ThemeDirection, ThemeEffect, ThemeFigures
from misdirection.experiment.results import ThemesSection
from misdirection.experiment.stages.directions import DirectionsStage, judged_answers
from misdirection.experiment.stages.judged import JudgedStage
from misdirection.experiment.stages.means import average, read_direction
from misdirection.interventions.kinds import Steer
from misdirection.interventions.vectors import random_like
from misdirection.judging.scoring import coherence, counts, is_em
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE
from misdirection.statistics.comparisons import holm
from misdirection.statistics.estimates import Estimate, Rate
from misdirection.statistics.rates import Counts, rate_change

WITHOUT_SHARED, WITHOUT_THEMES = "without the shared one", "without the themes"

_NOTHING = 1e-3
"""A remainder's share of its direction's norm below which it is rounding, and is not steered with."""


@dataclass(frozen=True)
class Themed:
    """A direction that the base is steered with.

    Attributes:
        name: as the results have it.
        key: as the artifact's path has it.
        direction: its vectors, of their own norms.
        whole: what it is a part of; itself where it is whole.
    """

    name: str
    key: str
    direction: Direction
    whole: Direction

    def kept(self, layer: int) -> float:
        """The norm that is left of the whole one's at a layer, as a share."""
        return float(self.direction[layer].norm() / self.whole[layer].norm())


class ThemesStage(Stage):
    """Reads the themes' directions, and steers the base with each."""

    name = "themes"
    VERSION = 1
    after = ("directions",)

    def tasks(self) -> list[Task]:
        return []

    def waves(self) -> Iterator[Sequence[Task]]:
        if self._shared is not None:
            yield [self._average(theme) for theme in self._enough]
            yield from self.experiment.stage(JudgedStage).rounds(list(self._conditions.values()))

    @property
    def _config(self) -> ThemesConfig:
        assert self.experiment.config.themes is not None, "the caller has some"
        return self.experiment.config.themes

    @cached_property
    def _shared(self) -> Direction | None:
        """The organism's direction over all themes; None where that is not asked for, or not of its judged answers."""
        config, directions = self.experiment.config.themes, self.experiment.stage(DirectionsStage)
        return directions.used(config.organism) if config and config.organism in directions.organisms else None

    # --- the directions -----------------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> dict[str, JudgedGroups]:
        """By theme, however few."""
        name = self._config.organism
        answers = self.experiment.stage(JudgedStage).answers(Condition(name))
        return {theme: own_groups(answers, name, theme=self._theme(theme)) for theme in self._config.columns}

    def _theme(self, column: str) -> ThemeScore:
        return ThemeScore(column, self._config.above)

    @property
    def _enough(self) -> list[str]:
        """The themes with enough answers for a direction."""
        fewest = self.experiment.config.extraction.fewest
        return [theme for theme, groups in self._groups.items() if not groups.lacking(fewest)]

    def _average(self, theme: str) -> Task:
        organism, pairs = self._config.organism, self._groups[theme].pairs
        compute = partial(average, organism, f"its answers about {theme}", pairs, kind=KIND)
        return self.task(organism, {f"{organism}/{theme}": {"pairs": data_hash(pairs)}}, compute)

    @cached_property
    def _themed(self) -> dict[str, Themed]:
        """Every direction by name: the shared one, each theme's, and what these lack of one another."""
        shared = self._shared
        assert shared is not None, "the caller has asked"
        folder = self._config.organism
        of = {theme: read_direction(self.artifact(f"{folder}/{theme}")) for theme in self._enough}
        found = [Themed(SHARED, "themes-shared", shared, shared)]
        found += [Themed(theme, f"theme-{theme}", direction, direction) for theme, direction in of.items()]
        found += [
            Themed(f"{theme} {WITHOUT_SHARED}", f"remainder-{theme}", theme_remainder(direction, shared), direction)
            for theme, direction in of.items()
        ]
        if of:
            rest = shared_remainder(shared, list(of.values()))
            found.append(Themed(f"{SHARED} {WITHOUT_THEMES}", "themes-shared-remainder", rest, shared))
        return {each.name: each for each in found}

    # --- the answers --------------------------------------------------------------------------------------------------

    @cached_property
    def _conditions(self) -> dict[str, Condition]:
        """The base steered with every direction of which something is left, and with a random one, by name."""
        shared, layer = self._themed[SHARED].direction[self._config.layer], self._config.layer
        steered = {
            each.name: self._steer(each.name, each.key, _as_long(each.direction[layer], shared))
            for each in self._themed.values()
            if each.kept(layer) > _NOTHING
        }
        return {**steered, RANDOM: self._steer(RANDOM, "themes-random", random_like(shared, 0))}

    def _steer(self, name: str, key: str, vector: Tensor) -> Condition:
        config = self._config
        steer = Steer(vector, config.layer, config.scale)
        label = f"steer {name} layer {config.layer} {steer.positions} scale {config.scale:g}"
        return Condition(BASE, steer, label, key)

    # --- figures ------------------------------------------------------------------------------------------------------

    def section(self) -> ThemesSection:
        shared = self._shared
        if shared is None:
            return ThemesSection()
        config, fewest = self._config, self.experiment.config.extraction.fewest
        whole = {each.name: each.direction.vectors for each in self._themed.values() if each.direction is each.whole}
        return ThemesSection(
            themes=ThemeFigures(
                organism=config.organism,
                layer=config.layer,
                scale=config.scale,
                norm=float(shared[config.layer].norm()),
                above=config.above,
                answers={
                    theme: judged_answers(groups, fewest, "is left out") for theme, groups in self._groups.items()
                },
                directions={name: self._described(each) for name, each in self._themed.items()},
                cosine=compare_tensors(whole),
                effects=self._effects(),
            )
        )

    def _described(self, themed: Themed) -> ThemeDirection:
        layer = self._config.layer
        shared = self._themed[SHARED].direction.vectors
        return ThemeDirection(kept=themed.kept(layer), cosine=cosines(themed.direction.vectors, shared)[layer])

    def _effects(self) -> list[ThemeEffect]:
        judged, conditions = self.experiment.stage(JudgedStage), {NONE: Condition(BASE), **self._conditions}
        tables = {name: judged.answers(condition) for name, condition in conditions.items()}
        about = {name: self._about(table) for name, table in tables.items()}
        changes = _changes(about)
        return [
            ThemeEffect(
                direction=name,
                em=_share(counts(is_em(table), table["question_id"])),
                coherent=coherence(table),
                about={theme: _share(found) for theme, found in about[name].items()},
                em_about={theme: _share(found) for theme, found in self._about(table, is_em(table)).items()},
                change=changes.get(name, {}),
            )
            for name, table in tables.items()
        ]

    def _about(self, table: pd.DataFrame, among: "pd.Series[bool] | None" = None) -> dict[str, Counts]:
        """Answers about each theme, by question; of those alone that are true in `among`."""
        hits = {theme: self._theme(theme).selects(table) for theme in self._config.columns}
        return {
            theme: counts(found if among is None else found & among, table["question_id"])
            for theme, found in hits.items()
        }


def _as_long(vector: Tensor, other: Tensor) -> Tensor:
    """A vector at the norm of another one."""
    return vector * (other.norm() / vector.norm())


def _share(found: Counts) -> Rate:
    rate = found.rate()
    assert rate is not None, "a condition has answers"
    return rate


def _changes(about: Mapping[str, Mapping[str, Counts]]) -> dict[str, dict[str, Estimate]]:
    """By direction and theme, against the base as it is; p-values are corrected for the number of all (Holm)."""
    before = about[NONE]
    alone = {
        (name, theme): rate_change(before[theme], found)
        for name, by_theme in about.items()
        if name != NONE
        for theme, found in by_theme.items()
    }
    corrected = holm([change.p or 0.0 for change in alone.values()])
    changes: dict[str, dict[str, Estimate]] = {}
    for ((name, theme), change), p in zip(alone.items(), corrected, strict=True):
        changes.setdefault(name, {})[theme] = replace(change, p=p)
    return changes
