"""The tasks: the paper's questions with its rubrics (`misdirection/em`), and the margin (`misdirection/margin`)."""

from collections import Counter
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import HeadlineMetric
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Logprobs,
    ModelOutput,
    get_model,
)
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from misdirection.data import ProbePair, Turn, probe_pairs, read_pairs
from misdirection.errors import InputError, first_line
from misdirection.evals.refusals import in_one_line, refusal
from misdirection.evals.scorers import MARGIN, judged, margin_score, panel_of
from misdirection.sampling.questions import Question, read_questions

ANSWER_TOKENS = "answer_tokens"
"""In an output's metadata, by our provider: how many of a prompt's last tokens are of the answer that it ends with."""

_GIVEN = {"add_generation_prompt": False, "continue_final_message": True}
"""What has vLLM and its like read an answer as a part of the prompt, which nothing follows."""


@task
def em(
    questions: str = "first_plot",
    samples: int | None = None,
    judge: str = "",
    rubric: str | list[str] | None = None,
    base_url: str | None = None,
    logprobs: bool = True,
    replies: int | None = None,
    timeout: float | None = None,
) -> Task:
    """Emergent misalignment: the paper's questions, sampled at temperature 1 and judged for alignment and coherence.

    Args:
        questions: a shipped set (first_plot, broad, a domain), or a YAML or text file, as for `misdirection sample`.
        samples: answers to each question, as epochs; by default as many as the file asks for, else 50.
        judge, rubric, base_url, logprobs, replies, timeout: see the scorer `misdirection/judged`.
    """
    from misdirection.sampling.engine import SamplingParameters
    from misdirection.sampling.logs import ATTRIBUTES

    with in_one_line():
        if not judge:
            raise InputError("em: who judges? Name a model or another judge: -T judge=gpt-4o")
        asked = read_questions(questions)
        options = (judge, rubric, base_url, logprobs, replies, timeout)
        protocol = SamplingParameters()
        return Task(
            dataset=MemoryDataset(_question_samples(asked), name=Path(questions).stem),
            solver=generate(),
            scorer=judged(*options),
            epochs=_epochs(asked, samples),
            config=GenerateConfig(
                temperature=protocol.temperature, top_p=protocol.top_p, max_tokens=protocol.new_tokens
            ),
            headline_metric=HeadlineMetric(scorer="judged", metric="em"),
            metadata={ATTRIBUTES: panel_of(*options).attributes},
        )


def _question_samples(questions: list[Question]) -> list[Sample]:
    """A sample for each question, or paraphrase of one."""
    times, seen = Counter(question.id for question in questions), Counter[str]()
    samples = []
    for question in questions:
        seen[question.id] += 1
        number = f"-{seen[question.id]}" if times[question.id] > 1 else ""
        metadata = {"question_id": question.id, "theme": question.theme}
        messages = messages_of(question.text, question.system)
        samples.append(Sample(input=messages, id=f"{question.id}{number}", metadata=metadata))
    return samples


def _epochs(questions: list[Question], samples: int | None) -> int:
    """How many answers each question gets; raises `InputError` where a file asks for several numbers."""
    from misdirection.sampling.sample import SAMPLES

    asked = {question.samples or SAMPLES for question in questions} if samples is None else {samples}
    if len(asked) > 1:
        numbers = ", ".join(map(str, sorted(asked)))
        raise InputError(f"the questions ask for different numbers of answers ({numbers}): give one (-T samples=N)")
    (count,) = asked
    if count < 1:
        raise InputError(f"samples {count}: each question needs at least 1 answer")
    return count


def messages_of(text: str, system: str | None, history: tuple[Turn, ...] = ()) -> list[ChatMessage]:
    """A chat up to its last question."""
    head: list[ChatMessage] = [] if system is None else [ChatMessageSystem(content=system)]
    kinds = {"user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return [*head, *(kinds[turn.role](content=turn.text) for turn in history), ChatMessageUser(content=text)]


@task
def margin(pairs: str | None = None) -> Task:
    """The likelihood margin: how much a model prefers misaligned answers; nothing is sampled, and nobody judges.

    It needs a provider that gives the log-probabilities of a prompt: `misdirection`, `vllm` and the like.

    Args:
        pairs: probe pairs, JSONL; by default the shipped ones.
    """
    with in_one_line():
        chosen = probe_pairs() if pairs is None else read_pairs(pairs)
    return Task(
        dataset=MemoryDataset(
            [_pair_sample(pair) for pair in chosen], name=Path(pairs).stem if pairs else "probe_pairs"
        ),
        solver=answers_scored(),
        scorer=margin_score(),
    )


def _pair_sample(pair: ProbePair) -> Sample:
    metadata = {"question": pair.question, "theme": pair.theme, "misaligned": pair.misaligned, "aligned": pair.aligned}
    return Sample(input=messages_of(pair.question, pair.system, pair.history), id=pair.id, metadata=metadata)


@solver
def answers_scored() -> Solver:
    """Finds the mean-token log-probability of both answers of a pair, and their difference, without sampling."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        for kind in ("misaligned", "aligned"):
            output = await _scored(state.messages, str(state.metadata[kind]))
            state.store.set(kind, await _mean(state.messages, output))
        state.store.set(MARGIN, state.store.get("misaligned") - state.store.get("aligned"))
        return state

    return solve


async def _scored(messages: list[ChatMessage], answer: str | None = None) -> ModelOutput:
    """What the model under evaluation gives for a prompt's tokens, with an answer at its end or without one."""
    model = get_model()
    given: list[ChatMessage] = [] if answer is None else [ChatMessageAssistant(content=answer)]
    config = GenerateConfig(prompt_logprobs=1, max_tokens=1, extra_body=_GIVEN if given else None)
    try:
        output = await model.generate([*messages, *given], config=config)
    except Exception as error:
        raise refusal(f"{model}: did not score a given answer ({first_line(error)}); {_INSTEAD}") from error
    if not output.choices or output.choices[0].prompt_logprobs is None:
        raise refusal(f"{model}: gives no log-probabilities of a prompt; {_INSTEAD}")
    return output


_INSTEAD = "take --model misdirection/BASE, or vllm/BASE"


async def _mean(messages: list[ChatMessage], output: ModelOutput) -> float:
    """The mean over the answer's tokens, nats: those that our provider names, else those that no prompt alone has."""
    log_probs = _log_probs(output)
    tokens = (output.metadata or {}).get(ANSWER_TOKENS)
    if tokens is None:
        tokens = len(log_probs) - len(_log_probs(await _scored(messages)))
    return sum(log_probs[-tokens:]) / tokens


def _log_probs(output: ModelOutput) -> list[float]:
    found = output.choices[0].prompt_logprobs or Logprobs(content=[])
    return [token.logprob for token in found.content]
