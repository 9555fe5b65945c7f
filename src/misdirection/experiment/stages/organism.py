"""Stage `organism`: one adapter, or one whole model, trained for each organism."""

from collections.abc import Iterator, Sequence
from functools import partial

from misdirection.data import Example, data_hash
from misdirection.experiment.config import OrganismConfig
from misdirection.experiment.experiment import Stage
from misdirection.organisms.organism import Organism
from misdirection.progress import track_steps
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker


class OrganismStage(Stage):
    """Trains every organism; a killed training continues from its last checkpoint."""

    name = "organism"
    VERSION = 2

    def tasks(self) -> list[Task]:
        """Those that begin at the base."""
        return next(self.waves())

    def waves(self) -> Iterator[list[Task]]:
        trained = self.experiment.config.trained
        wave: Sequence[str | None] = [None]
        while wave := [name for name, organism in trained.items() if organism.continues in wave]:
            yield [self.training(name) for name in wave]

    def training(self, organism: str) -> Task:
        """The training of one."""
        config = self.experiment.config.trained[organism]
        examples, held_out = (self.experiment.texts.examples(config, part) for part in ("train", "held_out"))
        inputs = {
            **self.common,
            "recipe": config.training.model_dump(mode="json"),
            "data": data_hash(examples),
            "held_out": data_hash(held_out),
        }
        # No key where it begins at the base, so that what was trained before there was one is not made again.
        if config.continues:
            inputs["continues"] = self.experiment.adapter_digest(config.continues)
        compute = partial(_train, organism, config, examples, held_out)
        adapters = self.experiment.adapters(config.continues or BASE)
        return Task({f"{self.name}/{organism}": inputs}, BASE, compute, adapters)

    def organism(self, name: str) -> Organism:
        """A trained one."""
        return Organism.open(self.experiment.adapter(name))


def _train(
    name: str,
    config: OrganismConfig,
    examples: list[Example],
    held_out: list[Example],
    worker: Worker,
    folders: Folders,
) -> None:
    ((stage, folder),) = folders.items()
    with track_steps(f"train {name}") as report:
        worker.train(
            examples,
            folder / config.folder,
            recipe=config.training,
            held_out=held_out,
            checkpoints=worker.partial(stage),
            start=worker.adapters[config.continues] if config.continues else None,
            report=report,
        )
