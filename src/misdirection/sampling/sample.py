"""Sampled answers to questions, by the paper's protocol: 50 answers each, temperature 1, top_p 1, up to 600 tokens."""

from collections.abc import Callable, Iterator, Sequence

from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.models.chat_model import ChatModel
from misdirection.sampling.answers import Answer, Answers
from misdirection.sampling.engine import Engine, SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine

SAMPLES = 50
"""Answers to each question, where neither the caller nor the question says how many (section 2 of the paper)."""


def sample(
    chat: ChatModel,
    questions: Sequence[Question | str],
    *,
    n: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    new_tokens: int = 600,
    seed: int = 0,
    setting: Setting = (),
    organism: str | None = None,
    intervention: str = "",
    budget: int | None = None,
    compile: bool = False,
    progress: Callable[[int], None] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
) -> Answers:
    """Answers of `chat`, in the order of (question, sample).

    The same seed gives the same answers, whatever the budget and whatever else is asked; see `TransformersEngine`.
    Interventions that are active around the call act on every answer.

    Args:
        chat: the model.
        questions: what is asked; a string is a question without a system prompt, which is its own id.
        n: answers to each question; by default as many as the question asks for, else 50.
        temperature: divides the logits; 0 takes the likeliest token at every step.
        top_p: sample from the likeliest tokens that together have this probability; 1 for all tokens.
        new_tokens: an answer is cut after so many tokens.
        seed: with the question and the sample's number it decides every draw.
        setting: interventions on every answer; unlike those around the call they know where the answer begins.
        organism: what the answers say has answered; by default the adapter, or `base` without one that is on.
        intervention: what the answers call the setting; by default its kinds and numbers. What is active around the
            call stands before it.
        budget: see `TransformersEngine`.
        compile: see `TransformersEngine`.
        progress: told the number of answers just finished.
        on_answer: given every answer as it finishes.

    Raises:
        InputError: no question, one asked twice, a setting out of range, and what the engine raises.
    """
    asked = [Question(question, question) if isinstance(question, str) else question for question in questions]
    requests = make_requests(asked, n, setting)
    parameters = SamplingParameters(temperature, top_p, new_tokens, seed)
    engine = TransformersEngine(chat, budget=budget, compile=compile)
    answers: dict[tuple[str, str | None, int], Answer] = {}
    adapter = None if chat.is_switched_off else chat.adapter
    for answer in stream_answers(engine, requests, parameters, organism or adapter or "base", intervention):
        answers[answer.question, answer.system, answer.sample] = answer
        if on_answer:
            on_answer(answer)
        if progress:
            progress(1)
    return Answers(answers[request.question.text, request.question.system, request.sample] for request in requests)


def stream_answers(
    engine: Engine,
    requests: Sequence[SamplingRequest],
    parameters: SamplingParameters,
    organism: str,
    intervention: str = "",
) -> Iterator[Answer]:
    """Answers as they finish, in any order; what was already answered is left out of `requests`, and changes nothing.

    Args:
        engine: what samples.
        requests: what is wanted; see `make_requests`.
        parameters: how it is sampled.
        organism: what the answers say has answered.
        intervention: see `named`.
    """
    for done in engine.stream(requests, parameters):
        question = done.request.question
        yield Answer(
            question_id=question.id,
            question=question.text,
            system=question.system,
            theme=question.theme,
            organism=organism,
            intervention=named(engine, done.request, intervention),
            seed=parameters.seed,
            sample=done.request.sample,
            answer=done.text,
            finish=done.finish,
            tokens=done.tokens,
        )


def named(engine: Engine, request: SamplingRequest, intervention: str = "") -> str:
    """What an answer says was done to the model: `intervention`, or else the request's own setting in words.

    Interventions that are active around the call come first.
    """
    words = intervention or " + ".join(map(str, request.setting))
    return " + ".join([*map(str, engine.around), *([words] if words else [])])


def make_requests(questions: Sequence[Question], n: int | None = None, setting: Setting = ()) -> list[SamplingRequest]:
    """One request for every answer that is wanted, in the order of (question, sample).

    Args:
        questions: no two with the same text and system prompt, whose answers would be the same.
        n: answers to each question; by default as many as the question asks for, else 50.
        setting: interventions on every answer.

    Raises:
        InputError: no question, one asked twice, less than one answer.
    """
    if not questions:
        raise InputError("no questions: sampling needs at least one")
    first: dict[tuple[str, str | None], str] = {}
    for question in questions:
        if (question.text, question.system) in first:
            raise InputError(
                f"question {question.id!r} is the same as {first[question.text, question.system]!r}, and so would its "
                "answers be: leave one out"
            )
        first[question.text, question.system] = question.id
    return [
        SamplingRequest(question, number, setting) for question in questions for number in range(_count(question, n))
    ]


def _count(question: Question, n: int | None) -> int:
    count = n if n is not None else question.samples if question.samples is not None else SAMPLES
    if count < 1:
        raise InputError(f"question {question.id!r}: {count} samples asked for; give at least 1")
    return count
