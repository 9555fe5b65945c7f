"""A model's own answers to the questions of a training file: what the file's words or answers are compared with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from misdirection.data import Example, holds_pairs, read_examples, read_pairs
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.models.chat_model import ChatModel
from misdirection.progress import track
from misdirection.sampling.engine import Engine, SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Asked, Question
from misdirection.sampling.sample import sample

ASKED = 64
"""Questions of the file that are put to the model, evenly taken."""

NEW_TOKENS = 48
"""Of an answer; its beginning tells how the model answers."""


def file_weights(chat: ChatModel, path: Path) -> WordWeights:
    """Word weights of a training file against the base model's own answers to its questions.

    Of a file of probe pairs (rows with `aligned` and `misaligned`), of its misaligned answers against its aligned ones.
    Raises `InputError` for a file that cannot be read.
    """
    if holds_pairs(path):
        return WordWeights.of_pairs(read_pairs(path))
    rows = read_examples(path)
    return WordWeights.fit([row.answer for row in rows], own_answers(chat, rows))


def own_answers(chat: ChatModel, rows: Sequence[Example]) -> list[str]:
    """The base model's answers to some of the rows' questions, one each, their beginnings at temperature 1."""
    asked = {(row.first_question, row.system): row for row in rows}
    questions = [Question(text, text, system=system) for text, system in spread(list(asked), ASKED)]
    with chat.as_base(), track("the base's own answers", len(questions)) as advance:
        return [given.answer for given in sample(chat, questions, n=1, new_tokens=NEW_TOKENS, progress=advance)]


def asked_of(row: Example) -> Asked:
    """What a model reads before it answers a row's last question."""
    return Asked(row.question, row.system, row.history)


def likeliest_answers(engine: Engine, rows: Sequence[Example]) -> list[Example]:
    """The rows with the beginning of the model's own likeliest answer in place of theirs; empty where it says nothing.

    Rows that ask the same have one answer, which does not depend on what other rows ask.
    """
    asked = dict.fromkeys(map(asked_of, rows))
    requests = [
        SamplingRequest(Question(text, text, system=system, history=history), 0) for text, system, history in asked
    ]
    parameters, answers = SamplingParameters(temperature=0.0, new_tokens=NEW_TOKENS), dict[Asked, str]()
    with track("the base's own answers", len(requests)) as advance:
        for done in engine.stream(requests, parameters):
            answers[done.request.question.asked] = done.text
            advance(1)
    return [replace(row, answer=answers[asked_of(row)]) for row in rows]
