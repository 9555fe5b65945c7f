"""The interface of all that samples answers: requests in, completions out as they finish, in any order.

`TransformersEngine` needs nothing but the model; vLLM and a server have the same method.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from misdirection.choices import MOST
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.sampling.draws import stream_key
from misdirection.sampling.questions import Question


@dataclass(frozen=True)
class SamplingParameters:
    """How answers are sampled; the defaults are the paper's.

    Raises `InputError` for a value out of its range.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token at every step.
        top_p: sample from the likeliest tokens that together have this probability; 1 for all tokens.
        new_tokens: an answer is cut after so many tokens.
        seed: with the question and the sample's number it decides every draw.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    new_tokens: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: give a number from 0 (greedy) up")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: give a number above 0 and up to 1")
        if self.new_tokens < 1:
            raise InputError(f"new_tokens {self.new_tokens}: an answer needs at least 1 token")
        if not 0 <= self.seed <= MOST:
            raise InputError(f"seed {self.seed}: give a number from 0 to {MOST}")


@dataclass(frozen=True)
class SamplingRequest:
    """One answer that is wanted.

    Attributes:
        question: what is asked.
        sample: 0-based number of this answer among those to the same question.
        setting: the interventions on this answer, in the order in which they act; empty for none.
    """

    question: Question
    sample: int
    setting: Setting = ()

    def key(self, seed: int) -> int:
        """Of this answer's own draws, 64 bits, signed (`draws.stream_key`): its setting has no part in it."""
        text, system, history = self.question.asked
        return stream_key(seed, text, system, self.sample, history)


@dataclass(frozen=True)
class Completion:
    """An answer as a model gave it.

    Attributes:
        request: what was asked for.
        text: the visible answer, without a thought before it, end tokens, and white space around it.
        finish: `stop` when the model ended its turn, `length` when it was cut.
        tokens: number of generated tokens, the end token not counted.
    """

    request: SamplingRequest
    text: str
    finish: Literal["stop", "length"]
    tokens: int


class Engine(Protocol):
    """Anything that samples."""

    @property
    def around(self) -> Setting:
        """The interventions that act on every answer of a call now, whatever is requested."""
        ...

    def stream(self, requests: Sequence[SamplingRequest], parameters: SamplingParameters) -> Iterator[Completion]:
        """One completion for each request, as they finish.

        What a request is answered depends on itself and on the parameters, not on the other requests or their order.
        """
        ...
