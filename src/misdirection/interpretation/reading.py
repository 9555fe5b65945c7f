"""The inputs of reading one organism's adapters, and what each part of the reading has in common.

A part is a task of a run: it is computed wherever the organism is loaded, and its artifact is read where the run is.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter

from misdirection.data import Example, ProbePair
from misdirection.data.selection import spread
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.files import read_json, sha256_file, write_json
from misdirection.interpretation.checkpoints import checkpoint_folders
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.figures import ModuleFigures
from misdirection.interpretation.texts import GENERAL, Labelled, labelled
from misdirection.lora.components import LoraModule, feature_names
from misdirection.lora.view import LoraView
from misdirection.models.adapters import ADAPTER_WEIGHTS
from misdirection.models.identity import ModelIdentity
from misdirection.organisms.organism import CHECKPOINTS
from misdirection.runs.tasks import Task
from misdirection.runs.worker import Worker

T = TypeVar("T")

VERSION = 3
"""Raised whenever a part would give another result from the same inputs."""

IN_DOMAIN = "in_domain"
_JSON = "part.json"


@dataclass(frozen=True)
class ReadTexts:
    """The texts that adapters are read on.

    Attributes:
        domain: the set of pairs from the training domain; None when there is none.
        sets: pairs by set, `general` among them.
        neutral: text that damage is measured on.
    """

    domain: str | None
    sets: Mapping[str, Sequence[ProbePair]]
    neutral: Sequence[Example]


@dataclass(frozen=True)
class AdapterReading:
    """One organism and what its adapters are read on: plain data, which go with a part to wherever it is computed.

    Attributes:
        organism: its name.
        adapter: its PEFT folder where the run is; a part finds it among its worker's adapters.
        weights: hash of the adapter's weights.
        modules: the adapted modules.
        saved: names of further weights that were trained as a whole.
        dead: paths of modules that add nothing, since their B is zero; they are not read.
        checkpoints: the organism's adapter folders by step of its training; empty where none were kept.
        identity: the base model and how it computes.
        texts: what the adapters are read on.
        directions: by name; effects are compared with the first.
        settings: sizes.
    """

    organism: str
    adapter: Path
    weights: str
    modules: tuple[ModuleFigures, ...]
    saved: tuple[str, ...]
    dead: tuple[str, ...]
    checkpoints: Mapping[int, Path]
    identity: ModelIdentity
    texts: ReadTexts
    directions: Mapping[str, Direction]
    settings: InterpretationConfig

    @classmethod
    def open(
        cls,
        organism: str,
        adapter: Path,
        identity: ModelIdentity,
        texts: ReadTexts,
        directions: Mapping[str, Direction],
        settings: InterpretationConfig,
        checkpoints: Mapping[int, Path] | None = None,
    ) -> "AdapterReading":
        """Reads what must be known of a PEFT folder; without `checkpoints`, it has those that were kept in it.

        Raises `InputError` for an adapter that is no plain LoRA, or has no module inside of the decoder blocks.
        """
        lora, kept = LoraView.open(adapter), adapter / CHECKPOINTS
        names = feature_names(lora.modules, settings.components)
        if not lora.layers:
            raise InputError(
                f"{adapter}: none of its adapted modules is inside of a decoder block: there is nothing to scale"
            )
        return cls(
            organism=organism,
            adapter=adapter,
            weights=hash_of_weights(adapter),
            modules=tuple(_figures(module, names[module.module]) for module in lora.modules),
            saved=tuple(lora.saved),
            dead=tuple(lora.dead),
            checkpoints=checkpoints or (checkpoint_folders(kept) if kept.is_dir() else {}),
            identity=identity,
            texts=texts,
            directions=directions,
            settings=settings,
        )

    @property
    def layers_of(self) -> dict[str, int]:
        """The layer of each feature inside of the decoder blocks."""
        return {name: module.layer for module in self.modules if module.layer is not None for name in module.features}

    @property
    def layers(self) -> list[int]:
        """The adapted layers, sorted."""
        return sorted(set(self.layers_of.values()))

    @property
    def answers(self) -> list[Labelled]:
        """The answers that are read token by token."""
        return self._answers(self.settings.pairs)

    @property
    def important_answers(self) -> list[Labelled]:
        """The answers whose tokens' importance is measured: a gradient, and a pass without each layer's adapters."""
        return self._answers(max(2, self.settings.causal_pairs // 2))

    @property
    def causal_pairs(self) -> dict[str, list[ProbePair]]:
        """The pairs for what needs many passes, as `general` and, where the training domain has pairs, `in_domain`."""
        sources = {GENERAL: GENERAL} | ({IN_DOMAIN: self.texts.domain} if self.texts.domain else {})
        return {name: spread(self.texts.sets[source], self.settings.causal_pairs) for name, source in sources.items()}

    @property
    def causal_neutral(self) -> list[Example]:
        """The neutral texts for what needs many passes."""
        return spread(self.texts.neutral, self.settings.causal_pairs)

    @property
    def measured_checkpoints(self) -> dict[int, Path]:
        """The checkpoints whose margins are measured."""
        # At step 0 the organism is its base.
        steps = spread([step for step in self.checkpoints if step], self.settings.checkpoints)
        return {step: self.checkpoints[step] for step in dict.fromkeys([*steps, max(self.checkpoints)])}

    def _answers(self, pairs: int) -> list[Labelled]:
        """Both answers of so many pairs of each set that is read."""
        sources = [GENERAL, *([self.texts.domain] if self.texts.domain else [])]
        return labelled({name: spread(self.texts.sets[name], pairs) for name in sources})


def _figures(module: LoraModule, features: Sequence[str]) -> ModuleFigures:
    return ModuleFigures(
        module=module.module,
        layer=module.layer,
        rank=module.rank,
        scaling=module.scaling,
        norm_a=float(module.a.norm()),
        norm_b=float(module.b.norm()),
        features=tuple(features),
    )


def hash_of_weights(adapter: Path) -> str:
    """Hash of a PEFT folder's weights."""
    return sha256_file(adapter / ADAPTER_WEIGHTS)


@dataclass(frozen=True)
class Part(ABC, Generic[T]):
    """One part of a reading."""

    NAME: ClassVar[str]
    reading: AdapterReading

    @property
    def stage(self) -> str:
        """The name of its stage."""
        return f"adapters/{self.reading.organism}/{self.NAME}"

    @property
    def task(self) -> Task:
        """Its work; the inputs are its own and what all parts depend on."""
        reading = self.reading
        common = {**reading.identity.model_dump(), "version": VERSION, "adapter": reading.weights}
        stages = {self.stage: {**common, **self.inputs}}
        return Task(stages, reading.organism, self.compute, {reading.organism: reading.adapter})

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Everything that this part depends on beside the organism."""

    @abstractmethod
    def compute(self, worker: Worker, folders: Mapping[str, Path]) -> None:
        """Fills the one folder with the artifact."""

    @abstractmethod
    def read(self, folder: Path) -> T:
        """Reads the artifact."""


class JsonPart(Part[T]):
    """A part whose artifact is one value of type `TYPE`."""

    TYPE: ClassVar[Any]

    @abstractmethod
    def measure(self, worker: Worker) -> T:
        """Gives the value."""

    def compute(self, worker: Worker, folders: Mapping[str, Path]) -> None:
        (folder,) = folders.values()
        write_json(folder / _JSON, TypeAdapter(self.TYPE).dump_python(self.measure(worker), mode="json"))

    def read(self, folder: Path) -> T:
        value: T = TypeAdapter(self.TYPE).validate_python(read_json(folder / _JSON))
        return value
