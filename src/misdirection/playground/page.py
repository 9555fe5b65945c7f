"""The page: its controls, and what happens when one of them is used."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from markupsafe import Markup

from misdirection.choices import MOST, Positions
from misdirection.data import ProbePair
from misdirection.errors import MisdirectionError
from misdirection.extras import needed_for
from misdirection.playground import panels
from misdirection.playground.asking import GrowingAnswer, Playground
from misdirection.playground.conditions import Controls
from misdirection.playground.readings import PROJECTION
from misdirection.sampling.engine import SamplingParameters
from misdirection.sampling.questions import Question

PLAIN = "nothing"
"""The choice of shades that leaves the answers plain text."""

_EVERY = 0.1
"""Seconds between two pictures of growing answers: more of them would keep the browser from anything else."""

T = TypeVar("T")


def build(playground: Playground) -> Any:
    """The page, as blocks of Gradio."""
    with needed_for("play"):
        import gradio as gr
    actions = _Actions(playground)
    with gr.Blocks(title="misdirection playground", analytics_enabled=False, fill_width=True) as blocks:
        _html(gr, panels.heading(playground))
        asked = _texts(gr, ("question", "Question"), ("system", "System prompt (optional)"))
        controls = _controls(gr, playground)
        sampling = _sampling(gr)
        with gr.Row():
            ask, stop = gr.Button("Ask", variant="primary", elem_id="ask"), gr.Button("Stop", elem_id="stop")
        status, shown = _html(gr, panels.said(""), "status"), _html(gr, actions.empty(), "answers")
        shade = gr.Dropdown([PLAIN, *playground.readings], value=PLAIN, label="Shade tokens by", elem_id="shade")
        pair = _texts(gr, ("misaligned", "A misaligned answer to the question"), ("aligned", "An aligned answer to it"))
        measure, table = gr.Button("Measure the margin", elem_id="measure"), _html(gr, Markup(), "margins")

        answers, stopping = gr.State([]), gr.State(_Stopping())
        # One queue for all that needs the model.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        queued = {**quiet, "concurrency_limit": 1, "concurrency_id": "model"}
        starts = [ask.click, *(text.submit for text in asked)]
        gr.on(starts, actions.ask, [stopping, *asked, *sampling, shade, *controls], [answers, shown, status], **queued)
        changes = [shade.input, controls[0].release]
        gr.on(
            changes, actions.shade, [answers, shade, controls[0]], [shown, status], trigger_mode="always_last", **queued
        )
        measure.click(actions.measure, [*asked, *pair, *controls], table, **queued)
        stop.click(actions.stop, stopping, queue=False, **quiet)
    return blocks


def _html(gr: Any, value: Markup, name: str | None = None) -> Any:
    return gr.HTML(value, elem_id=name, elem_classes=["playground", "reader"])


def _texts(gr: Any, *named: tuple[str, str]) -> list[Any]:
    with gr.Row():
        return [gr.Textbox(label=label, lines=2, elem_id=name) for name, label in named]


def _controls(gr: Any, playground: Playground) -> list[Any]:
    """The controls of the interventions, in the order of the fields of `Controls`."""
    last, seeds = len(playground.chat.layers) - 1, {"precision": 0, "minimum": 0, "maximum": MOST}
    with gr.Row(visible=playground.direction is not None):
        return [
            gr.Slider(0, last, playground.middle, step=1, label="Layer", elem_id="layer"),
            gr.Slider(-8, 8, 1, step=0.25, label="Scale of the steering", elem_id="scale"),
            gr.Radio(list(get_args(Positions)), value="not_first", label="Positions", elem_id="positions"),
            gr.Checkbox(label="Random direction of the same norm, too", elem_id="random"),
            gr.Number(0, label="Seed of the random direction", elem_id="random-seed", **seeds),
        ]


def _sampling(gr: Any) -> list[Any]:
    """Temperature, tokens and seed."""
    with gr.Row():
        return [
            gr.Slider(0, 2, 1, step=0.1, label="Temperature (0 takes the likeliest token)", elem_id="temperature"),
            gr.Slider(1, 600, 100, step=1, label="Tokens of an answer at most", elem_id="tokens"),
            gr.Number(0, label="Seed of the answers", precision=0, minimum=0, maximum=MOST, elem_id="seed"),
        ]


@dataclass
class _Stopping:
    """Whether the answers under way in one browser's tab are to end; Gradio keeps one for each."""

    is_asked: bool = False


class _Actions:
    """What the page's buttons and choices do, on the values of its components."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground

    def empty(self) -> Markup:
        """The columns without answers."""
        listed = self._playground.conditions(Controls(self._playground.middle))
        return panels.columns([GrowingAnswer(condition.name) for condition in listed])

    def ask(
        self,
        stopping: _Stopping,
        question: str,
        system: str,
        temperature: float,
        tokens: float,
        seed: int | None,
        reading: str,
        *controls: Any,
    ) -> Iterator[tuple[list[GrowingAnswer], Markup, Markup]]:
        """The answers as they grow, their columns, and a line about them; at last in their shades."""
        answers: list[GrowingAnswer] = []
        stopping.is_asked = False
        try:
            parameters = SamplingParameters(temperature, new_tokens=int(tokens), seed=seed or 0)
            asked, chosen = Question("typed", question, system=_optional(system)), _chosen(*controls)
            growing = self._playground.answers(asked, parameters, chosen)
            for answers in paced(itertools.takewhile(lambda _: not stopping.is_asked, growing)):
                longest = max(len(answer.tokens) for answer in answers)
                yield answers, panels.columns(answers), panels.said(f"Answering: {longest} of {int(tokens)} tokens")
            columns, line = self.shade(answers, reading, chosen.layer)
            yield answers, columns, panels.said("Stopped.") if stopping.is_asked else line
        except MisdirectionError as error:
            yield answers, panels.columns(answers) if answers else self.empty(), _problem(error)

    def shade(self, answers: Sequence[GrowingAnswer], reading: str, layer: float) -> tuple[Markup, Markup]:
        """The columns in their shades, and a line that says whether that went well."""
        if not answers:
            return self.empty(), panels.said("")
        if reading == PLAIN:
            return panels.columns(answers), panels.said("")
        try:
            values = self._playground.read(answers, reading, int(layer))
        except MisdirectionError as error:
            return panels.columns(answers), _problem(error)
        named = f"{reading}, layer {int(layer)}" if reading == PROJECTION else reading
        return panels.shaded(self._playground.chat, answers, values, named), panels.said("")

    def measure(self, question: str, system: str, misaligned: str, aligned: str, *controls: Any) -> Markup:
        """The table of margins, or what is wrong."""
        pair = ProbePair("typed", question, aligned, misaligned, system=_optional(system))
        try:
            return panels.margins(self._playground.scores(pair, _chosen(*controls)))
        except MisdirectionError as error:
            return _problem(error)

    def stop(self, stopping: _Stopping) -> None:
        """The answers under way end with the token that they have."""
        stopping.is_asked = True


def _optional(text: str) -> str | None:
    return text if text.strip() else None


def _chosen(layer: float, scale: float, positions: Positions, random: bool, seed: int | None) -> Controls:
    """What the components of `_controls` say; an emptied field is a seed of 0."""
    return Controls(int(layer), scale, positions, random, seed or 0)


def _problem(error: MisdirectionError) -> Markup:
    return panels.said(str(error), is_problem=True)


def paced(states: Iterator[T], seconds: float = _EVERY) -> Iterator[T]:
    """Of states that follow each other quickly one every so many seconds, and the last in any case."""
    shown, waiting = -seconds, []
    for state in states:
        waiting = [state]
        if time.monotonic() - shown >= seconds:
            shown = time.monotonic()
            yield waiting.pop()
    yield from waiting
