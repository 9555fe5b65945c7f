"""What the page asks of the model: answers that grow side by side, margins of given answers, readings of tokens.

One pass runs at a time, whoever asks: between two tokens of an answer the model may serve another question.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

from misdirection.data import ProbePair
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.likelihood.margin import pair_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.playground.conditions import Condition, Controls, by_model, conditions
from misdirection.playground.readings import read, readings
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Asked, Question
from misdirection.sampling.transformers_engine import TransformersEngine, completion, end_tokens, fitting_prompt

LONGEST = 4000
"""Characters of a text that is typed."""


@dataclass(frozen=True)
class GrowingAnswer:
    """An answer, whole or as far as it has grown.

    Attributes:
        condition: the name of its condition.
        prompt: the ids that it answers.
        tokens: its ids, without one that ends it.
        text: what is visible of it.
        finish: `stop` when the model ended its turn, `length` when it was cut, None while it grows.
    """

    condition: str
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: Literal["stop", "length"] | None = None

    @property
    def row(self) -> Encoded:
        """The prompt with the answer after it."""
        return Encoded(self.prompt + self.tokens, len(self.prompt), len(self.prompt) + len(self.tokens))


@dataclass(frozen=True)
class ScoredPair:
    """Mean-token log-probabilities of two given answers under one condition, nats/token."""

    condition: str
    misaligned: float
    aligned: float

    @property
    def margin(self) -> float:
        """How much the misaligned answer is preferred."""
        return self.misaligned - self.aligned


@dataclass(frozen=True, eq=False)
class Playground:
    """A model, and perhaps a direction, to play with.

    Raises `InputError` for a direction of another base model.
    """

    chat: ChatModel
    direction: Direction | None = None
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        if self.direction is not None:
            self.direction.require_fit(self.chat)

    def conditions(self, controls: Controls) -> list[Condition]:
        """The columns of the page."""
        return conditions(self.chat, self.direction, controls)

    @property
    def middle(self) -> int:
        """The layer to begin with."""
        return self.direction.middle if self.direction is not None else 0

    @property
    def readings(self) -> tuple[str, ...]:
        """What tokens can be shaded by."""
        return readings(self.chat, self.direction)

    def answers(
        self, question: Question, parameters: SamplingParameters, controls: Controls
    ) -> Iterator[list[GrowingAnswer]]:
        """The answers under every condition after each token that they grow by, in the order of the conditions.

        All draw by the same random numbers, so that they differ by their conditions alone.

        Raises `InputError` for a text that is empty or too long, and what the engine and the interventions raise.
        """
        _require_texts({"question": question.text, "system prompt": question.system})
        listed = self.conditions(controls)
        prompt = fitting_prompt(self.chat, question.asked, parameters.new_tokens)
        answers = {condition.name: GrowingAnswer(condition.name, prompt) for condition in listed}
        groups = [self._grow(group, question, parameters, prompt) for group in by_model(listed)]
        while groups:
            for group in list(groups):
                if grown := next(group, None):
                    answers |= {each.condition: each for each in grown}
                else:
                    groups.remove(group)
            yield list(answers.values())

    def _grow(
        self,
        group: Sequence[Condition],
        question: Question,
        parameters: SamplingParameters,
        prompt: tuple[int, ...],
    ) -> Iterator[list[GrowingAnswer]]:
        """Those answers of one model that have grown, step by step."""
        requests = [SamplingRequest(question, 0, condition.setting) for condition in group]
        names = {id(request): condition.name for request, condition in zip(requests, group, strict=True)}
        steps, ends = TransformersEngine(self.chat).steps(requests, parameters), end_tokens(self.chat)
        while True:
            with self._lock, group[0].model(self.chat):
                drawn = next(steps, None)
            if drawn is None:
                return
            grown = []
            for request, tokens in drawn:
                done = completion(self.chat, ends, request, tokens)
                is_whole = done.finish == "stop" or len(tokens) == parameters.new_tokens
                kept = prompt, tuple(tokens[: done.tokens]), done.text, done.finish if is_whole else None
                grown.append(GrowingAnswer(names[id(request)], *kept))
            yield grown

    def scores(self, pair: ProbePair, controls: Controls) -> list[ScoredPair]:
        """Both answers of a pair under every condition.

        Raises `InputError` for a text that is empty or too long, and what the interventions raise.
        """
        answers = {"misaligned answer": pair.misaligned, "aligned answer": pair.aligned}
        _require_texts({"question": pair.question, "system prompt": pair.system, **answers})
        listed, prompts = self.conditions(controls), pair_continuations(self.chat.tokenizer, [pair])
        fitting_prompt(self.chat, Asked(pair.question, pair.system, ()), max(map(len, prompts[0].answers)))
        scores: dict[str, list[float]] = {}
        for group in by_model(listed):
            with self._lock, group[0].model(self.chat):
                given = sweep(self.chat, prompts, [condition.setting for condition in group])[:, 0]
            scores |= zip((condition.name for condition in group), given.tolist(), strict=True)
        return [ScoredPair(condition.name, *scores[condition.name]) for condition in listed]

    def read(self, answers: Sequence[GrowingAnswer], reading: str, layer: int) -> list[list[float]]:
        """One number for every token of each answer: what the organism, or without one the base, reads in its text.

        Nothing is done to the model meanwhile. `layer` is the direction's, for the projection.
        """
        rows = [answer.row for answer in answers if answer.tokens]
        with self._lock:
            values = iter(read(self.chat, self.direction, rows, reading, layer) if rows else ())
        return [next(values) if answer.tokens else [] for answer in answers]


def _require_texts(texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        if text is not None and not text.strip():
            raise InputError(f"{name}: is empty: type one")
        if text is not None and len(text) > LONGEST:
            raise InputError(f"{name}: {len(text):,} characters, and {LONGEST:,} are the limit: shorten it")
