"""Stage `directions`: which direction of each organism is used, and those of its own judged answers.

An organism's own misaligned and aligned answers go through it and through the base, so that with the differences of the
models on each kind of answers all variants of the paper are there.
"""

from collections.abc import Callable, Iterable
from functools import cache, cached_property, partial

from torch import Tensor

from misdirection.data import data_hash
from misdirection.directions.convergence import compare_tensors, cosines, shuffled, split_half
from misdirection.directions.direction import Direction, difference_vectors
from misdirection.directions.extraction import Means
from misdirection.directions.judged import KIND, JudgedGroups, own_groups
from misdirection.experiment.answering import Condition
from misdirection.experiment.experiment import Stage
from misdirection.experiment.judged_results import JudgedAnswers, JudgedConvergence, JudgedDirections
from misdirection.experiment.results import ChannelShare, DirectionFigures, DirectionsSection
from misdirection.experiment.stages.judged import JudgedStage
from misdirection.experiment.stages.means import MeansStage, average, read_direction, read_means
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE

TOP_CHANNELS = 5
"""So many channels of each direction are listed."""


class DirectionsStage(Stage):
    """Means over organisms' own judged answers, where the configuration asks for these."""

    name = "directions"
    VERSION = 1
    after = ("means", "judged")

    @cached_property
    def groups(self) -> dict[str, JudgedGroups]:
        """The judged answers of every organism by class, however few; empty where directions are of given answers."""
        config, judged = self.experiment.config, self.experiment.stage(JudgedStage)
        names = config.organisms if config.extraction.answers == "judged" else ()
        return {name: own_groups(judged.answers(Condition(name)), name) for name in names}

    @cached_property
    def organisms(self) -> list[str]:
        """Those with enough judged answers for a direction of their own."""
        fewest = self.experiment.config.extraction.fewest
        return [name for name, groups in self.groups.items() if not groups.lacking(fewest)]

    def tasks(self) -> list[Task]:
        return [self._average(model, name) for name in self.organisms for model in (name, BASE)]

    def _average(self, model: str, organism: str) -> Task:
        pairs = self.groups[organism].pairs
        compute = partial(average, model, f"judged answers of {organism}", pairs, kind=KIND)
        return self.task(model, {self._key(model, organism): {"pairs": data_hash(pairs)}}, compute)

    def _key(self, model: str, organism: str) -> str:
        return f"{organism}/{'base' if model == BASE else 'own'}"

    @cached_property
    def used(self) -> Callable[[str], Direction | None]:
        """Gives an organism's direction that is steered with and ablated: of judged answers where there is one, else of
        given ones, or None."""
        return cache(self._find)

    def all_used(self, organisms: Iterable[str]) -> dict[str, Direction]:
        """The same for those of some organisms that have one."""
        used = {name: self.used(name) for name in organisms}
        return {name: direction for name, direction in used.items() if direction is not None}

    def _find(self, organism: str) -> Direction | None:
        if organism in self.organisms:
            return read_direction(self.artifact(self._key(organism, organism)))
        return self.experiment.stage(MeansStage).direction(organism) if self.experiment.texts.common_pairs else None

    # --- figures ------------------------------------------------------------------------------------------------------

    def section(self) -> DirectionsSection:
        judged = self.experiment.config.extraction.answers == "judged"
        return DirectionsSection(directions=self._ablated(), judged_directions=self._judged() if judged else None)

    def _ablated(self) -> dict[str, DirectionFigures] | None:
        config = self.experiment.config
        if config.ablation is None:
            return None
        layer = config.ablation.layer
        used = self.all_used(config.bad_organisms)
        return {name: describe(direction[layer], layer) for name, direction in used.items()} or None

    def _judged(self) -> JudgedDirections:
        own = {name: read_means(self.artifact(self._key(name, name))) for name in self.organisms}
        base = {name: read_means(self.artifact(self._key(BASE, name))) for name in self.organisms}
        return JudgedDirections(
            answers={
                name: judged_answers(groups, self.experiment.config.extraction.fewest, self._instead(name))
                for name, groups in self.groups.items()
            },
            convergence=self._convergence(own, base),
            variants={name: compare_tensors(difference_vectors(own[name], base[name])) for name in own},
        )

    def _instead(self, organism: str) -> str:
        return "has no direction" if self.used(organism) is None else "has the direction of given answers"

    def _convergence(self, own: dict[str, Means], base: dict[str, Means]) -> JudgedConvergence:
        of_own, of_base = _differences(own), _differences(base)
        given = self.experiment.stage(MeansStage).direction if self.experiment.texts.common_pairs else None
        return JudgedConvergence(
            cosine=compare_tensors(of_own),
            given={name: cosines(vectors, given(name).vectors) for name, vectors in of_own.items()} if given else {},
            base_null={name: cosines(vectors, of_base[name]) for name, vectors in of_own.items()},
            base_pair_null=compare_tensors(of_base),
            shuffled_null={name: shuffled(means) for name, means in own.items()},
            split_half={name: split_half(means) for name, means in own.items()},
        )


def judged_answers(groups: JudgedGroups, fewest: int, instead: str) -> JudgedAnswers:
    """The counts of some judged answers; where a class has fewer than `fewest`, `instead` says what becomes of it."""
    lacking = groups.lacking(fewest)
    return JudgedAnswers(
        **groups.available,
        pairs=len(groups.pairs),
        questions=len(groups.by_question),
        lacking=f"{lacking}: it {instead}" if lacking else None,
    )


def _differences(means: dict[str, Means]) -> dict[str, Tensor]:
    return {name: each.difference("misaligned", "aligned") for name, each in means.items()}


def describe(vector: Tensor, layer: int, count: int = TOP_CHANNELS) -> DirectionFigures:
    """A layer's vector, [width]: its norm, and the channels that carry most of its squared norm."""
    vector = vector.double()
    top = (vector**2 / vector.dot(vector)).topk(min(count, len(vector)))
    shares = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    channels = [ChannelShare(channel=channel, share=share) for channel, share in shares]
    return DirectionFigures(layer=layer, norm=float(vector.norm()), top_channels=channels)
