"""Stage `answers`: answers of every model by the paper's protocol, as it is and perhaps under an ablation."""

from dataclasses import replace
from functools import cached_property, partial

from misdirection.experiment.answering import Asking, Condition, read_question_sets
from misdirection.experiment.experiment import Stage
from misdirection.experiment.stages.means import MeansStage
from misdirection.interventions.kinds import Ablate
from misdirection.interventions.vectors import random_like
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

    @cached_property
    def conditions(self) -> list[Condition]:
        """Who answers, and under what; nobody without a `sampling` section.

        Every model as it is; and perhaps under an ablation, and one random direction beside it: answers are too dear
        for several.
        """
        sampling, ablation = self.experiment.config.sampling, self.experiment.config.ablation
        models = self.experiment.models if sampling else []
        if sampling is None or sampling.ablate is None or ablation is None or not self.experiment.texts.common_pairs:
            return [Condition(model) for model in models]
        vector = self.experiment.stage(MeansStage).direction(sampling.ablate)[ablation.layer]
        rule, vectors = ablation.positions[0], {sampling.ablate: vector, "random": random_like(vector, 0)}
        under = [
            partial(
                Condition,
                intervention=Ablate(each, positions=rule),
                label=f"ablate {name} layer {ablation.layer} {rule}",
                key=f"ablated-{name}",
            )
            for name, each in vectors.items()
        ]
        conditions = [partial(Condition), *under]
        return [condition(model) for model in models for condition in conditions]

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
    served = asking.config.engine.vllm is not None
    engine = worker.vllm_engine(model) if served else worker.engine(model)
    asking.ask(engine, worker.partial(stage), folder)
