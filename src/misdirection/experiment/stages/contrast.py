"""Stage `contrast`: what bad answers train and good ones do not, whether domains share it, and what that part does.

Activations are means over answers to neutral questions, which are of no domain. The part that the other domains share
is ablated in, and added to, the fine-tunes of a domain that had no part in it, and the base beside them: what is lost
by the base as well was not learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.directions.contrast import ALL, KIND, share, text_means
from misdirection.directions.convergence import cosines
from misdirection.directions.direction import Direction, Origin
from misdirection.directions.extraction import Means
from misdirection.directions.shared_contrast import relabelled, shared_contrast
from misdirection.experiment.cells import Cell, MeasuredStage, cell_task
from misdirection.experiment.config import ContrastConfig
from misdirection.experiment.margins import Margins, mean_of
from misdirection.experiment.results import ContrastEffect, ContrastFigures, ContrastSection
from misdirection.experiment.stages.margin import MarginStage
from misdirection.experiment.stages.means import read_means, write_means
from misdirection.interpretation.texts import GENERAL
from misdirection.interventions.intervention import Intervention
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.vectors import digest, random_like
from misdirection.likelihood.words import WordNull
from misdirection.progress import track
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics.means import bootstrap

Vector = Literal["contrast", "relabelled", "random"]

SHARED = "shared.safetensors"
"""The direction that all domains share, in the artifact `DIRECTIONS`; `of-DOMAIN.safetensors` is one domain's."""

DIRECTIONS = f"{BASE}/directions"


@dataclass(frozen=True)
class Use:
    """Vectors of one kind, used in one way on a domain's fine-tunes and on the base.

    Attributes:
        domain, operation, layer, scale, vector: as a `ContrastEffect` has them.
        cells: the interventions of each cell; of several, each question meets one, in turn.
    """

    domain: str
    operation: Literal["ablate", "steer"]
    layer: int
    scale: float | None
    vector: Vector
    cells: tuple[tuple[Intervention, ...], ...]

    def of(self, target: str) -> list[Cell]:
        """Its cells in one model."""
        how = f"layer-{self.layer}" + ("" if self.scale is None else f"-scale-{self.scale:g}")
        name = f"{self.operation}-{self.vector}-without-{self.domain}-{how}"
        return [Cell(f"{name}-{number}", target, cell) for number, cell in enumerate(self.cells)]


@dataclass(frozen=True)
class Measured:
    """A model's figures by id: general margins, those on a domain's held-out questions, and neutral losses."""

    general: pd.Series
    own: pd.Series
    loss: pd.Series

    @classmethod
    def mean(cls, tables: Sequence[Margins], sets: Mapping[str, Sequence[ProbePair]], domain: str) -> "Measured":
        """The mean of several tables, for the pairs of the sets."""
        general, own = (
            _mean([table.of(name).loc[[pair.id for pair in sets[name]]] for table in tables])
            for name in (GENERAL, domain)
        )
        return cls(general, own, _mean([table.loss() for table in tables]))

    def __sub__(self, other: "Measured") -> "Measured":
        loss = self.loss - other.loss.loc[self.loss.index]
        return Measured(self.general - other.general, self.own - other.own, loss)


class ContrastStage(MeasuredStage):
    """Reads contrasts and tries what domains share on a domain left out."""

    name = "contrast"
    VERSION = 1
    after = ("margin",)

    def tasks(self) -> list[Task]:
        texts = self.experiment.texts.neutral
        inputs = {"texts": data_hash(texts)}
        return [self.task(each, {f"{each}/means": inputs}, partial(_average, each, texts)) for each in self._read]

    def waves(self) -> Iterator[Sequence[Task]]:
        if self.experiment.config.contrast is None:
            return
        yield self.tasks()
        yield [self._saving(), *self._measurements()]

    @property
    def _setting(self) -> ContrastConfig:
        setting = self.experiment.config.contrast
        assert setting is not None, "the caller has one"
        return setting

    @property
    def _read(self) -> list[str]:
        """Every fine-tune that a contrast or a voice is made of, once."""
        pairs = [*chain.from_iterable(self.experiment.config.contrasts.values()), *self._setting.voices.values()]
        return list(dict.fromkeys(chain.from_iterable(pairs)))

    # --- directions ---------------------------------------------------------------------------------------------------

    def means(self, model: str) -> Tensor:
        """Mean activations of a fine-tune over answers to neutral questions, [layers, width] float64."""
        return self._means(model).vectors[ALL]

    def _means(self, model: str) -> Means:
        return read_means(self.artifact(f"{model}/means"))

    @cached_property
    def contrasts(self) -> dict[str, Tensor]:
        """Each domain's, [layers, width]: mean over its seeds."""
        return {
            domain: torch.stack([self.means(bad) - self.means(good) for bad, good in pairs]).mean(0)
            for domain, pairs in self.experiment.config.contrasts.items()
        }

    def _saving(self) -> Task:
        """Directions that other commands can read."""
        identity, pairs = self.experiment.texts.identity, self.experiment.config.contrasts
        means, data = self._means(self._read[0]), data_hash(self.experiment.texts.neutral)
        origin = Origin(KIND, identity.model, identity.revision, "", data, means.answers, means.tokens, identity.dtype)
        bad = {domain: " + ".join(name for name, _ in of) for domain, of in pairs.items()}
        files = {f"of-{domain}.safetensors": (vectors, bad[domain]) for domain, vectors in self.contrasts.items()}
        files[SHARED] = share(list(self.contrasts.values())), " + ".join(bad.values())
        directions = {
            name: Direction(vectors.float(), replace(origin, organism=organism))
            for name, (vectors, organism) in files.items()
        }
        inputs = {"vectors": {name: digest(direction.vectors) for name, direction in directions.items()}}
        return self.task(BASE, {DIRECTIONS: inputs}, partial(_save, directions))

    # --- what they do -------------------------------------------------------------------------------------------------

    @cached_property
    def uses(self) -> list[Use]:
        """Everything that is done with what the other domains share, domain by domain."""
        return [use for domain in self.contrasts for layer in self._setting.layers for use in self._uses(domain, layer)]

    def _uses(self, domain: str, layer: int) -> Iterator[Use]:
        others = [contrast for name, contrast in self.contrasts.items() if name != domain]
        vector = share(others)[layer].float()
        random = [random_like(vector, seed) for seed in range(self.experiment.config.random_seeds)]
        vectors: dict[Vector, list[Tensor]] = {
            "contrast": [vector],
            "relabelled": [each[layer].float() for each in relabelled(others)],
            "random": random,
        }
        for kind, chosen in vectors.items():
            alternates = kind != "contrast" and self.experiment.config.random_controls == "alternating"
            for scale in (None, *self._setting.scales) if chosen else ():
                made = [Ablate(each) if scale is None else Steer(each, layer, scale) for each in chosen]
                cells = (tuple(made),) if alternates else tuple((each,) for each in made)
                yield Use(domain, "ablate" if scale is None else "steer", layer, scale, kind, cells)

    def _measurements(self) -> Iterator[Task]:
        for domain in self.contrasts:
            for target in self._targets(domain):
                cells = [cell for use in self.uses if use.domain == domain for cell in use.of(target)]
                yield cell_task(self, cells, self._sets(domain), f"contrast without {domain}")

    def _targets(self, domain: str) -> tuple[str, str, str]:
        """The first seed's bad and good fine-tune, and the base."""
        bad, good = self.experiment.config.contrasts[domain][0]
        return bad, good, BASE

    def _sets(self, domain: str) -> dict[str, list[ProbePair]]:
        """General pairs and the domain's held-out ones, of those that the models are measured on."""
        sets = self.experiment.texts.question_sets
        return {name: spread(sets[name], self._setting.questions) for name in (GENERAL, domain)}

    # --- figures ------------------------------------------------------------------------------------------------------

    def section(self) -> ContrastSection | None:
        if self.experiment.config.contrast is None:
            return None
        pairs = self.experiment.config.contrasts
        bad, good = ({name: [self.means(both[side]) for both in of] for name, of in pairs.items()} for side in (0, 1))
        shared = share(list(self.contrasts.values()))
        voices = self._setting.voices.items()
        figures = ContrastFigures(
            texts=len(self.experiment.texts.neutral),
            fine_tunes=pairs,
            shared=shared_contrast(bad, good),
            voices={name: cosines(shared, self.means(first) - self.means(second)) for name, (first, second) in voices},
            effects=[self._effect(use) for use in self.uses],
        )
        return ContrastSection(contrast=figures)

    def _effect(self, use: Use) -> ContrastEffect:
        """What a use changes in the bad fine-tune, the good one and the base, and in the first against the others."""
        targets, sets = self._targets(use.domain), self._sets(use.domain)
        plain = map(self.experiment.stage(MarginStage).margins, targets)
        bad, good, base = (Measured.mean([table], sets, use.domain) for table in plain)
        changes = [self._under(use, target) - before for target, before in zip(targets, (bad, good, base), strict=True)]
        lost, of_good, of_base = changes
        pairs = sets[GENERAL]
        weights = self.experiment.texts.word_weights(self.experiment.config.organisms[targets[0]])
        assert weights is not None, "a domain with a control has good answers"
        shift, change = bad.general - base.general, lost.general - of_base.general
        return ContrastEffect(
            **{key: getattr(use, key) for key in ("domain", "operation", "layer", "scale", "vector")},
            organism=targets[0],
            vectors=sum(map(len, use.cells)),
            shift_before=mean_of(shift, pairs),
            shift=mean_of(shift + change, pairs),
            shift_change=mean_of(change, pairs),
            shift_change_beyond_words=WordNull.of(change, pairs, weights).beyond,
            minus_control_change=mean_of(lost.general - of_good.general, pairs),
            skill_change=mean_of(lost.own - of_base.own, sets[use.domain]),
            margin_change={name: mean_of(of.general, pairs) for name, of in zip(targets, changes, strict=True)},
            damage={name: bootstrap(of.loss.to_numpy()) for name, of in zip(targets, changes, strict=True)},
        )

    def _under(self, use: Use, target: str) -> "Measured":
        tables = [self.margins(cell.artifact) for cell in use.of(target)]
        return Measured.mean(tables, self._sets(use.domain), use.domain)


def _mean(columns: Sequence[pd.Series]) -> pd.Series:
    """By id."""
    return pd.concat(columns, axis=1).mean(axis=1)


def _average(model: str, texts: Sequence[Example], worker: Worker, folders: Folders) -> None:
    (folder,) = folders.values()
    chat = worker.chat(model)
    with track(f"activations of {model} on neutral text", len(texts)) as advance:
        means = text_means(chat, texts, advance)
    write_means(means, folder)


def _save(directions: Mapping[str, Direction], _worker: Worker, folders: Folders) -> None:
    (folder,) = folders.values()
    for name, direction in directions.items():
        direction.save(folder / name)
