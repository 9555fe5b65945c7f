"""Sampling into a journal: what is there is not sampled again, and a stop loses the answers under way only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from misdirection.errors import InputError
from misdirection.files import read_json, write_json
from misdirection.sampling.answers import Answer, AnswerKey, Journal
from misdirection.sampling.engine import Engine, SamplingParameters, SamplingRequest
from misdirection.sampling.sample import named, stream_answers


def collect(
    engine: Engine,
    requests: Sequence[SamplingRequest],
    parameters: SamplingParameters,
    journal: Journal,
    *,
    organism: str,
    intervention: str = "",
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The answers to `requests`, in their order; those that the journal lacks are sampled and added to it.

    Args:
        engine: what samples.
        requests: see `make_requests`.
        parameters: how it is sampled. Answers of another seed do not count as there.
        journal: an open journal; it may hold answers of other organisms.
        organism: what the answers say has answered.
        intervention: see `named`.
        progress: told the number of answers that are there, first, and then of those just finished.
    """
    keys = [_key(request, parameters, organism, named(engine, request, intervention)) for request in requests]
    missing = [request for request, key in zip(requests, keys, strict=True) if key not in journal]
    if progress:
        progress(len(requests) - len(missing))
    for answer in stream_answers(engine, missing, parameters, organism, intervention):
        journal.append(answer)
        if progress:
            progress(1)
    answers = {AnswerKey.of(answer): answer for answer in journal.answers}
    return [answers[key] for key in keys]


def in_order(answers: Iterable[Answer]) -> list[Answer]:
    """Answers by condition, question and sample, whatever finished first: the same table with or without a stop."""
    return sorted(answers, key=_order)


def _order(answer: Answer) -> tuple[str | int, ...]:
    condition = (answer.organism, answer.intervention, answer.seed)
    return (*condition, answer.question_id, answer.question, answer.system or "", answer.sample)


def require_same(journal: Journal, organism: str, intervention: str, how: Mapping[str, Any]) -> None:
    """Notes beside a journal how the answers of one condition are sampled; refuse to mix them with others of that name.

    Args:
        journal: an open journal; the note is in `NAME.settings.json`. It binds as soon as there is one answer.
        organism, intervention: the condition, as the answers say.
        how: model, adapter, settings: JSON values.

    Raises:
        InputError: this condition was sampled in another way; names the first difference.
    """
    path = journal.path.with_suffix(".settings.json")
    condition = " | ".join(filter(None, (organism, intervention)))
    begun = any((answer.organism, answer.intervention) == (organism, intervention) for answer in journal.answers)
    known = read_json(path) if path.exists() else {}
    before = known.get(condition, how) if begun else how
    for name in sorted(before.keys() | how.keys()):
        if before.get(name) != how.get(name):
            raise InputError(
                f"{path}: {condition!r} was sampled with {name} {before.get(name)!r}, not {how.get(name)!r}: "
                "choose another --out or --name"
            )
    write_json(path, {**known, condition: dict(how)})


def _key(request: SamplingRequest, parameters: SamplingParameters, organism: str, intervention: str) -> AnswerKey:
    question = request.question
    return AnswerKey(question.text, question.system, organism, intervention, parameters.seed, request.sample)
