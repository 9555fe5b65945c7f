"""Stage `sampled`: a few answers of every model to read side by side; they enter no figure."""

from functools import partial

from misdirection.experiment.config import SamplesConfig
from misdirection.experiment.experiment import Stage
from misdirection.experiment.results import SampledAnswers, SampledSection
from misdirection.files import read_json, write_json
from misdirection.progress import track
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import Worker
from misdirection.sampling.engine import SamplingParameters
from misdirection.sampling.questions import Question
from misdirection.sampling.sample import make_requests, stream_answers


class SampledStage(Stage):
    """Samples one answer of every model to each question."""

    name = "sampled"
    VERSION = 2
    after = ("organism",)

    def tasks(self) -> list[Task]:
        config = self.experiment.config.samples
        inputs = {"samples": config.model_dump(mode="json")}
        models = self.experiment.models if config.questions else []
        return [self.task(model, {model: inputs}, partial(_sample, model, config)) for model in models]

    def section(self) -> SampledSection | None:
        questions = self.experiment.config.samples.questions
        if not questions:
            return None
        answers = {model: read_json(self.artifact(model) / "answers.json") for model in self.experiment.models}
        return SampledSection(
            samples=[
                SampledAnswers(question=question, answers={model: given[question] for model, given in answers.items()})
                for question in questions
            ]
        )


def _sample(model: str, config: SamplesConfig, worker: Worker, folders: Folders) -> None:
    (folder,) = folders.values()
    wanted = make_requests([Question(text, text) for text in config.questions], 1)
    parameters = SamplingParameters(new_tokens=config.new_tokens)
    answers = {}
    with track(f"answers of {model}", len(wanted)) as advance:
        for given in stream_answers(worker.engine(model), wanted, parameters, model):
            answers[given.question] = given.answer.strip()
            advance(1)
    write_json(folder / "answers.json", {text: answers[text] for text in config.questions})
