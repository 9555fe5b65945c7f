"""Answers by the paper's protocol and a judge's scores of them, as tasks of any run: an experiment's or an audit's.

A killed task goes on where it was: answers are in a journal as they come, verdicts in the judge's cache.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from misdirection.data.published import is_published
from misdirection.errors import InputError
from misdirection.experiment.results import Words
from misdirection.interventions.intervention import Intervention
from misdirection.judging.config import JudgeConfig
from misdirection.judging.evidence import undated
from misdirection.judging.judge import judge, judging_cost
from misdirection.judging.judges import ModelJudge
from misdirection.judging.profile import require_calibration_of
from misdirection.judging.rubrics import Rubric, read_rubrics
from misdirection.judging.scoring import EM_COLUMNS, score
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import Worker
from misdirection.sampling.answers import Journal, read_answers, write_answers
from misdirection.sampling.collect import collect
from misdirection.sampling.config import SamplingConfig
from misdirection.sampling.engine import Engine, SamplingParameters
from misdirection.sampling.questions import Question, question_sets, read_questions, without
from misdirection.sampling.sample import make_requests
from misdirection.sampling.transformers_engine import TransformersEngine

log = logging.getLogger("misdirection")

ANSWERS = "answers.parquet"
JUDGED = "judged.parquet"

# Raised whenever judging would give another result from the same inputs.
_VERSION = 1


@dataclass(frozen=True)
class Condition:
    """A model, and what is done to it while it answers.

    Attributes:
        organism: the model, as the table names it.
        intervention: what is done to it.
        label: the intervention, as the table names it.
        key: the intervention, as the artifact's path names it.
        adapter: the PEFT folder of a model that is no organism of the experiment, such as a checkpoint of one.
    """

    organism: str
    intervention: Intervention | None = None
    label: str = ""
    key: str = "plain"
    adapter: Path | None = None

    @property
    def artifact(self) -> str:
        """The key of its artifacts."""
        return f"{self.organism}/{self.key}"


def check_behaviour(sampling: SamplingConfig | None, judge: JudgeConfig | None) -> None:
    """Raise `InputError` for questions, rubrics and a judge that cannot be used, before hours of other work."""
    if sampling:
        make_requests(read_question_sets(sampling), sampling.n)
    if judge:
        rubrics = _read_rubrics(judge)
        judge.check()
        # A local judge is not loaded for this: its scores are held against the calibration when they are there.
        if (calibration := judge.read_calibration()) and not issubclass(judge.kind, ModelJudge):
            require_calibration_of(judge.open(), rubrics, EM_COLUMNS, calibration)


# --- answers ----------------------------------------------------------------------------------------------------------


def read_question_sets(config: SamplingConfig) -> list[Question]:
    """All sets' questions; an id that two sets have is named after its set in the later one."""
    questions: list[Question] = []
    for source in config.questions:
        before = {question.id for question in questions}
        questions += [
            replace(question, id=f"{source}: {question.id}") if question.id in before else question
            for question in read_questions(source)
        ]
    return without(questions, config.leave_out)


def whose_words(source: str) -> Words:
    """Who worded a question set."""
    if source in question_sets():
        return "the package's own"
    return "the published" if is_published(source, "questions") else "the user's"


@dataclass(frozen=True)
class Asking:
    """The questions that a model answers under one condition.

    Attributes:
        config: how answers are sampled.
        condition: what answers.
        questions: what is asked.
    """

    config: SamplingConfig
    condition: Condition
    questions: list[Question]

    def inputs(self) -> dict[str, Any]:
        """Everything that the answers depend on besides the model."""
        intervention = self.condition.intervention
        return {
            "intervention": intervention.described() if intervention else None,
            "questions": [asdict(question) for question in self.questions],
            # What is left out is not among the questions.
            "sampling": self.config.model_dump(mode="json", exclude={"ablate", "steer", "engine", "leave_out"}),
            **_engine_inputs(self.config),
        }

    def ask(self, engine: Engine, working: Path, folder: Path) -> None:
        """Write `answers.parquet`; what is in the working folder's journal is not asked again."""
        config, name, label = self.config, self.condition.organism, self.condition.label
        intervention = self.condition.intervention
        wanted = make_requests(self.questions, config.n, [intervention] if intervention else [])
        settings = SamplingParameters(config.temperature, config.top_p, config.new_tokens, config.seed)
        title = f"answers of {name}" + (f", {label}" if label else "")
        with Journal(working / "answers.jsonl") as journal, track(title, len(wanted)) as advance:
            answers = collect(engine, wanted, settings, journal, organism=name, intervention=label, progress=advance)
        write_answers(answers, folder / ANSWERS)


def answer(
    run: RunFolder,
    stage: str,
    chat: Callable[[], ChatModel],
    config: SamplingConfig,
    inputs: Mapping[str, Any],
    condition: Condition,
) -> None:
    """Let a model that is no part of an experiment answer the question sets.

    Args:
        stage: its name.
        chat: gives the model; called when answers are missing.
        inputs: what they depend on besides the questions, the sampling and the intervention.

    Raises `InputError` for another engine than transformers.
    """
    if config.engine.vllm is not None:
        raise InputError("sampling.engine: only an experiment samples with vLLM: leave it out here")
    asking = Asking(config, condition, read_question_sets(config))
    run.stage(
        stage,
        {**inputs, **asking.inputs()},
        lambda folder: asking.ask(
            TransformersEngine(chat(), compile=config.engine.transformers.compile), run.partial(stage), folder
        ),
    )


def _engine_inputs(config: SamplingConfig) -> dict[str, Any]:
    """Both engines draw alike, but half precision turns long answers; a server draws in its own way."""
    vllm = config.engine.vllm
    return {} if vllm is None else {"engine": "vllm server" if vllm.base_url else "vllm"}


# --- a judge's scores -------------------------------------------------------------------------------------------------


def judged(run: RunFolder, config: JudgeConfig, answers_stage: str) -> Task:
    """The answers of the stage `answers/KEY` with a judge's scores, as the stage `judged/KEY`.

    With too few of them the stage is not done, and the next run asks for those that are missing. An endpoint is asked
    by the process that has the run: its key is there, and the verdicts that were paid for.
    """
    rubrics = _read_rubrics(config)
    inputs = {
        "version": _VERSION,
        "answers": run.digest(answers_stage),
        "rubrics": [asdict(rubric) for rubric in rubrics],
        "judge": config.model_dump(mode="json", include={"model", "base_url", "logprobs", "samples"}),
    }
    rows = read_answers(run.artifact(answers_stage) / ANSWERS)
    return Task(
        {answers_stage.replace("answers/", "judged/", 1): inputs},
        config.model,
        partial(_judge, config, rubrics, rows, answers_stage),
        here=not config.kind.ANYWHERE,
    )


def _judge(
    config: JudgeConfig, rubrics: list[Rubric], rows: pd.DataFrame, label: str, worker: Worker, folders: Folders
) -> None:
    (folder,) = folders.values()
    asked, cache = worker.judge(config), worker.verdicts()
    wanted = judging_cost(rows, rubrics, asked, cache=cache)
    log.info("judging %s takes %s", label, wanted)
    limits: dict[str, Any] = config.model_dump(include={"concurrency", "max_calls"})
    with track(f"verdicts on {label}", wanted.prompts + wanted.cached) as advance:
        verdicts = judge(rows, rubrics, asked, cache=cache, **limits, progress=advance)
    score(verdicts.table, min_judged=config.min_judged)
    write_answers(undated(verdicts.table), folder / JUDGED)


def _read_rubrics(config: JudgeConfig) -> list[Rubric]:
    rubrics = read_rubrics(list(config.rubrics))
    if missing := {"aligned", "coherent"} - {rubric.column for rubric in rubrics}:
        raise InputError(
            f"judge.rubrics: none has the column {min(missing)!r}, which the EM rate is made of; add one that has"
        )
    return rubrics
