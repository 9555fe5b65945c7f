"""Cells: margins and losses of one model under interventions, as tasks of any stage. Those of one model that share a
plain pass are measured together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.experiment.experiment import Stage
from misdirection.experiment.margins import Margins, measure
from misdirection.interventions.intervention import Intervention
from misdirection.likelihood.sweep import Alternating
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import Worker


class MeasuredStage(Stage):
    """A stage whose artifacts are tables of margins."""

    @cached_property
    def margins(self) -> Callable[[str], Margins]:
        """Gives the table of an artifact by its key, such as a model's name."""
        return cache(lambda key: Margins.read(self.artifact(key)))


@dataclass(frozen=True)
class Cell:
    """One model under one intervention.

    Attributes:
        key: names the intervention in the artifact's path.
        target: the model, `base` or an organism.
        interventions: one; or several, of which each question meets one, in turn.
    """

    key: str
    target: str
    interventions: tuple[Intervention, ...]

    @property
    def artifact(self) -> str:
        """Its artifact's key."""
        return f"{self.target}/{self.key}"


def cell_task(stage: Stage, cells: Sequence[Cell], sets: Mapping[str, Sequence[ProbePair]], label: str) -> Task:
    """Margins of some pairs, and neutral losses, of one model under each of some interventions, in one sweep.

    Args:
        stage: whose artifacts the cells are.
        cells: of one model.
        sets: the pairs, by the name of their set.
        label: says what is measured.
    """
    target, experiment = cells[0].target, stage.experiment
    neutral = spread(experiment.texts.neutral, experiment.config.damage.interventions)
    inputs = {
        cell.artifact: {
            "interventions": [each.described() for each in cell.interventions],
            "pairs": data_hash([pair for pairs in sets.values() for pair in pairs]),
            "neutral": data_hash(neutral),
        }
        for cell in cells
    }
    by_stage = {f"{stage.name}/{cell.artifact}": cell for cell in cells}
    return stage.task(target, inputs, partial(_measure, by_stage, sets, neutral, f"{label} in {target}"))


def _measure(
    cells: Mapping[str, Cell],
    sets: Mapping[str, Sequence[ProbePair]],
    neutral: Sequence[Example],
    label: str,
    worker: Worker,
    folders: Folders,
) -> None:
    wanted = [cells[stage] for stage in folders]
    settings = [Alternating(tuple([each] for each in cell.interventions)) for cell in wanted]
    tables = measure(worker.chat(wanted[0].target), sets, neutral, label, settings)
    for folder, table in zip(folders.values(), tables, strict=True):
        table.write(folder)
