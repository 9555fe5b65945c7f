"""Stage `organism`: one adapter, or one whole model, trained for each organism."""

from functools import partial

from misdirection.data import Example, data_hash
from misdirection.experiment.experiment import Stage
from misdirection.organisms.organism import Organism
from misdirection.organisms.recipe import Recipe
from misdirection.progress import track_steps
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker


class OrganismStage(Stage):
    """Trains every organism; a killed training continues from its last checkpoint."""

    name = "organism"
    VERSION = 2

    def tasks(self) -> list[Task]:
        return [self.training(organism) for organism in self.experiment.config.trained]

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
        compute = partial(_train, organism, config.folder, config.training, examples, held_out)
        return Task({f"{self.name}/{organism}": inputs}, BASE, compute)

    def organism(self, name: str) -> Organism:
        """A trained one."""
        return Organism.open(self.experiment.adapter(name))


def _train(
    name: str,
    called: str,
    recipe: Recipe,
    examples: list[Example],
    held_out: list[Example],
    worker: Worker,
    folders: Folders,
) -> None:
    ((stage, folder),) = folders.items()
    with track_steps(f"train {name}") as report:
        worker.train(
            examples,
            folder / called,
            recipe=recipe,
            held_out=held_out,
            checkpoints=worker.partial(stage),
            report=report,
        )
