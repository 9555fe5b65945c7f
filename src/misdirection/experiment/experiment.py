"""An experiment under way: its configuration, its run folder, its runner, and the stages that they make.

Another package adds a stage by an entry point of the group `misdirection.stages`, or by `@STAGES.register(name)`.
"""

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from graphlib import TopologicalSorter
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.results import RunResults
from misdirection.experiment.texts import ExperimentTexts
from misdirection.interpretation.reading import hash_of_weights
from misdirection.models.weightless import read_structure
from misdirection.registry import Registry
from misdirection.results import Figures, Result
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import Compute, Runner, Task
from misdirection.runs.worker import BASE

_NO_PAIRS = {
    "given": "No domain has good answers beside its bad ones, so that no direction was read: convergence, steering, "
    "ablation and what words predict are left out.",
    "judged": "No domain has good answers beside its bad ones: convergence on given answers and what words predict are "
    "left out.",
}
"""By `extraction.answers`."""

EXTENSIONS = "extensions"
"""The key of the results that has the figures of other packages' stages."""

_PACKAGES = ("torch", "transformers", "peft", "numpy")


class Stage(ABC):
    """One kind of work of an experiment, with the figures that come of it; there is one object for each experiment.

    Args:
        experiment: what it is a stage of; its other stages, which this one may ask, among it.
    """

    name: ClassVar[str]
    """Begins the names of its artifacts, `NAME/KEY`, and is the key of its figures where they are an extension."""
    VERSION: ClassVar[int]
    """Raised whenever it would give another result from the same inputs, so that old artifacts are made again."""
    after: ClassVar[tuple[str, ...]] = ()
    """The stages whose artifacts its tasks read."""

    def __init__(self, experiment: "Experiment") -> None:
        self.experiment = experiment

    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """The work, once all stages of `after` are made; none where the configuration does not ask for it."""

    def waves(self) -> Iterator[Sequence[Task]]:
        """The work in several parts, each of which is asked for when the one before it is made."""
        yield self.tasks()

    def section(self) -> Figures | None:
        """The figures, read from the artifacts; None where nothing was asked for.

        A section of this package is some of the keys of `RunResults`. Any other's is kept under its stage's name in
        `RunResults.extensions`.
        """
        return None

    def beside(self) -> Result | None:
        """A result that stands beside the run's own, once all is made; None where there is none."""
        return None

    def artifact(self, key: str) -> Path:
        """The folder of one of its artifacts."""
        return self.experiment.run.artifact(f"{self.name}/{key}")

    @property
    def common(self) -> dict[str, Any]:
        """The inputs of everything that it makes."""
        return {"version": self.VERSION, "base": self.experiment.texts.identity.model_dump()}

    def task(
        self,
        model: str,
        artifacts: Mapping[str, Mapping[str, Any]],
        compute: Compute,
        adapter: Path | None = None,
    ) -> Task:
        """Work on the base model or an organism, or on a model with another adapter.

        Args:
            model: its name.
            artifacts: the inputs of each artifact by its key, without `common` and the adapter, which are added.
            compute: makes them; it goes to other processes with all that it holds.
            adapter: the PEFT folder of a model that is no organism of the experiment.
        """
        digest = hash_of_weights(adapter) if adapter else self.experiment.adapter_digest(model)
        common = {**self.common, "adapter": digest}
        stages = {f"{self.name}/{key}": {**common, **inputs} for key, inputs in artifacts.items()}
        adapters = {model: adapter} if adapter else self.experiment.adapters(model)
        return Task(stages, model, compute, adapters)


STAGES: Registry[type[Stage]] = Registry(
    "stage",
    "misdirection.stages",
    {
        "organism": "misdirection.experiment.stages.organism:OrganismStage",
        "margin": "misdirection.experiment.stages.margin:MarginStage",
        "means": "misdirection.experiment.stages.means:MeansStage",
        "cell": "misdirection.experiment.stages.cell:CellStage",
        "contrast": "misdirection.experiment.stages.contrast:ContrastStage",
        "solutions": "misdirection.experiment.stages.solutions:SolutionsStage",
        "sampled": "misdirection.experiment.stages.sampled:SampledStage",
        "answers": "misdirection.experiment.stages.answers:AnswersStage",
        "judged": "misdirection.experiment.stages.judged:JudgedStage",
        "directions": "misdirection.experiment.stages.directions:DirectionsStage",
        "rates": "misdirection.experiment.stages.rates:RatesStage",
        "themes": "misdirection.experiment.stages.themes:ThemesStage",
        "interpretation": "misdirection.experiment.stages.interpretation:InterpretationStage",
    },
)
"""Stages by name."""

S = TypeVar("S", bound=Stage)


class Experiment:
    """One experiment in its run folder.

    Args:
        config: what is done.
        run: where the artifacts are kept.
        runner: does the work.
    """

    def __init__(self, config: ExperimentConfig, run: RunFolder, runner: Runner) -> None:
        self.config, self.run, self.runner = config, run, runner
        self.texts = ExperimentTexts(config)

    @property
    def models(self) -> list[str]:
        """The base and every organism, with its first seed."""
        return [BASE, *self.config.organisms]

    @property
    def trained(self) -> list[str]:
        """The base and every organism with every seed."""
        return [BASE, *self.config.trained]

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """All stages by name, each after those that it needs."""
        kinds = dict(STAGES.items())
        order = TopologicalSorter({name: kind.after for name, kind in kinds.items()}).static_order()
        return {name: STAGES[name](self) for name in order}

    def stage(self, kind: type[S]) -> S:
        """This experiment's stage of a kind."""
        stage = self.stages[kind.name]
        assert isinstance(stage, kind), "a stage is registered under its name"
        return stage

    def adapter(self, organism: str) -> Path:
        """The folder of an organism, an adapter or a whole model, where it is or will be."""
        return self.run.artifact(f"organism/{organism}") / self.config.trained[organism].folder

    def adapters(self, model: str) -> dict[str, Path]:
        """The organism's folder that a model is made with, by name; the base has none."""
        return {} if model == BASE else {model: self.adapter(model)}

    def adapter_digest(self, model: str) -> str | None:
        """Hash of a trained organism; None for the base."""
        return None if model == BASE else self.run.digest(f"organism/{model}")

    def make_all(self) -> None:
        """Make every artifact that is not there yet."""
        for together in self._levels():
            waves = (stage.waves() for stage in together)
            # Lazily: each round of waves is asked for when the one before it is made.
            for tasks in zip_longest(*waves, fillvalue=()):
                self.runner.make(list(chain.from_iterable(tasks)))

    def _levels(self) -> Iterator[list[Stage]]:
        """Stages that wait for nothing but the ones before them."""
        waiting = TopologicalSorter({name: stage.after for name, stage in self.stages.items()})
        waiting.prepare()
        while waiting.is_active():
            ready = waiting.get_ready()
            yield [stage for name, stage in self.stages.items() if name in ready]
            waiting.done(*ready)

    def keep_results(self) -> None:
        """Write every stage's figures, once all is made, and the results that stand beside them."""
        self.results().save(self.run.folder)
        for stage in self.stages.values():
            if (result := stage.beside()) is not None:
                self.run.keep(result)

    def results(self) -> RunResults:
        """Every stage's figures, once all is made."""
        own: dict[str, Any] = {}
        extensions: dict[str, dict[str, Any]] = {}
        for name in self.stages:
            figures = self.figures(name)
            extensions |= figures.pop(EXTENSIONS, {})
            own |= figures
        return RunResults(environment=self._environment(), **self.facts(), extensions=extensions, **own)

    def figures(self, name: str) -> dict[str, Any]:
        """What one stage puts into the results, by key; nothing where it was not asked for."""
        section = self.stages[name].section()
        if section is None:
            return {}
        if type(section).model_fields.keys() <= RunResults.model_fields.keys():
            return dict(section)
        return {EXTENSIONS: {name: section.model_dump(mode="json")}}

    def facts(self) -> dict[str, Any]:
        """What the results say of the experiment itself, by key."""
        lacking = [] if self.texts.common_pairs else [_NO_PAIRS[self.config.extraction.answers]]
        return {
            "name": self.config.name,
            "left_out": [*self.config.left_out, *lacking],
            "seconds": self.run.seconds(),
        }

    def sizes(self) -> tuple[int, int]:
        """The base model's layers and width, from its configuration."""
        chat = read_structure(self.config.model, self.config.revision).chat
        return len(chat.layers), chat.width

    def _environment(self) -> dict[str, str]:
        packages = {name: version(name) for name in _PACKAGES}
        return {"python": platform.python_version(), "machine": platform.machine(), **packages}
