"""Stage `answers`: answers of every model by the paper's protocol, as it is; other stages ask under interventions."""

from dataclasses import replace
from functools import cached_property, partial

from misdirection.experiment.answering import Asking, Condition, read_question_sets
from misdirection.experiment.experiment import Stage
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import Worker
from misdirection.sampling.questions import Question


class AnswersStage(Stage):
    """Samples answers to the question sets."""

    name = "answers"
    VERSION = 1
    after = ("means",)

    def tasks(self) -> list[Task]:
        return [self.answers(condition) for condition in self.conditions]

    @property
    def conditions(self) -> list[Condition]:
        """Every model as it is; nobody without a `sampling` section."""
        return [Condition(model) for model in self.experiment.models] if self.experiment.config.sampling else []

    @cached_property
    def _questions(self) -> list[Question]:
        assert self.experiment.config.sampling is not None, "the caller has one"
        return read_question_sets(self.experiment.config.sampling)

    def answers(self, condition: Condition) -> Task:
        """The answers of one model under one condition."""
        config = self.experiment.config.sampling
        assert config is not None, "the caller has one"
        asking = Asking(config, condition, self._questions)
        artifacts = {condition.artifact: asking.inputs()}
        task = self.task(condition.organism, artifacts, partial(_answer, asking), condition.adapter)
        if config.engine.vllm is None:
            return task
        # vLLM has all adapters from its start.
        adapters = {organism: self.experiment.adapter(organism) for organism in self.experiment.config.organisms}
        return replace(task, adapters={**adapters, **task.adapters})


def _answer(asking: Asking, worker: Worker, folders: Folders) -> None:
    ((stage, folder),) = folders.items()
    model = asking.condition.organism
    settings = asking.config.engine
    served = settings.vllm is not None
    engine = worker.vllm_engine(model) if served else worker.engine(model, settings.transformers.compile)
    asking.ask(engine, worker.partial(stage), folder)
