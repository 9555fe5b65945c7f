"""Alignment against coherence, answer by answer: the still picture, and the page on which a point opens its answer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from misdirection.files import write_atomic
from misdirection.judging.quadrant_results import QUADRANTS, ConditionAnswers, Quadrant, Quadrants
from misdirection.judging.scoring import COHERENT_ABOVE, MISALIGNED_BELOW, Score
from misdirection.report.drawing import GREY, MARKERS, PALETTE, STYLE, new_figure, short_name
from misdirection.report.html import environment, frame, render
from misdirection.report.reader import visible

PAGE_FILE = "quadrants.html"

MOST_NAMED = 2 * len(PALETTE)
"""Questions with a mark of their own; all further ones share another."""

MOST_PANELS, _ACROSS = 16, 4
"""Conditions in one still picture, and how many of them stand beside one another."""

WORDS: Mapping[Quadrant, str] = {
    "misaligned": "misaligned and coherent (EM)",
    "coherent": "coherent, not misaligned",
    "misaligned_incoherent": "misaligned, incoherent",
    "incoherent": "incoherent, not misaligned",
}

_EDGE = "#8c8c8c"
_TINT = "#f6dccb"
"""Behind the answers that count as emergently misaligned."""


# --- marks ------------------------------------------------------------------------------------------------------------


def question_mark(place: int) -> dict[str, Any]:
    """The marker, the colour and the filling of a question's points: filled for the first seven, then hollow."""
    if place >= MOST_NAMED:
        return {"marker": ".", "colour": GREY, "filled": True}
    number, is_hollow = place % len(PALETTE), place >= len(PALETTE)
    return {"marker": MARKERS[number], "colour": PALETTE[number], "filled": not is_hollow}


def share_words(condition: ConditionAnswers, quadrant: Quadrant) -> str:
    """How many of a condition's answers are in a quadrant, and their share of all."""
    count = condition.quadrants[quadrant]
    return f"{count} ({count / condition.score.answers:.1%})"


def count_words(condition: ConditionAnswers) -> str:
    """How many answers are drawn, of how many with both scores and of how many in all."""
    unscored = condition.score.answers - condition.scored
    without = f", and {unscored:,} without both scores are not" if unscored else ""
    return f"{len(condition.shown):,} of {condition.scored:,} answers are drawn{without}"


# --- the still picture ------------------------------------------------------------------------------------------------


def drawings(quadrants: Quadrants) -> Mapping[str, Callable[[Quadrants], Figure]]:
    """The picture, where there is an answer to draw."""
    return {"quadrants": draw_quadrants} if any(condition.shown for condition in quadrants.conditions) else {}


@rc_context(STYLE)
def draw_quadrants(quadrants: Quadrants) -> Figure:
    """Alignment against coherence of every answer that is shown, a panel for each condition, marked by question."""
    chosen = quadrants.conditions[:MOST_PANELS]
    across = min(len(chosen), _ACROSS)
    down = math.ceil(len(chosen) / across)
    figure = new_figure(max(5.2, 3.1 * across), 3.3 * down + 0.9)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, condition in zip(grid.flat, chosen, strict=False):
        _draw_condition(axes, condition)
    for axes in grid[:, 0]:
        axes.set_ylabel("alignment")
    # The lowest of each column, below which there may be an empty place.
    for axes in grid.flat[max(0, len(chosen) - across) : len(chosen)]:
        axes.set_xlabel("coherence")
        axes.tick_params(labelbottom=True)
    left_out = len(quadrants.conditions) - len(chosen)
    title = f"and {left_out} more conditions, which are not drawn" if left_out else None
    figure.legend(handles=_keys(quadrants), loc="outside lower center", ncols=min(4, across + 1), title=title)
    return figure


def _draw_condition(axes: Axes, condition: ConditionAnswers) -> None:
    axes.axhspan(0, MISALIGNED_BELOW, xmin=(COHERENT_ABOVE + 3) / 106, xmax=103 / 106, color=_TINT, linewidth=0)
    axes.axhline(MISALIGNED_BELOW, color=_EDGE, linewidth=0.8)
    axes.axvline(COHERENT_ABOVE, color=_EDGE, linewidth=0.8)
    for place in sorted({answer.question for answer in condition.shown}):
        points = [answer for answer in condition.shown if answer.question == place]
        coherent, aligned = [point.coherent for point in points], [point.aligned for point in points]
        axes.plot(coherent, aligned, linestyle="", alpha=0.6, **_look(place))
    axes.set(xlim=(-3, 103), ylim=(-3, 103), xticks=(0, COHERENT_ABOVE, 100), yticks=(0, MISALIGNED_BELOW, 70, 100))
    axes.set_title(f"{short_name(condition.name, 38)}\nEM {share_words(condition, 'misaligned')}", fontsize=9)


def _look(place: int) -> dict[str, Any]:
    mark = question_mark(place)
    face = mark["colour"] if mark["filled"] else "white"
    return {"marker": mark["marker"], "color": mark["colour"], "mfc": face, "ms": 4, "mew": 0.8}


def _keys(quadrants: Quadrants) -> list[Line2D]:
    named = quadrants.questions[:MOST_NAMED]
    keys = [
        Line2D([], [], linestyle="", label=short_name(question.id, 28), **_look(place))
        for place, question in enumerate(named)
    ]
    if further := len(quadrants.questions) - len(named):
        keys.append(Line2D([], [], linestyle="", label=f"{further} further questions", **_look(MOST_NAMED)))
    return keys


# --- the page ---------------------------------------------------------------------------------------------------------


def quadrants_data(quadrants: Quadrants) -> dict[str, Any]:
    """What the template and its script take, every text made visible."""
    return {
        "rule": quadrants.rule,
        "words": WORDS,
        "cuts": {"aligned": MISALIGNED_BELOW, "coherent": COHERENT_ABOVE},
        "named": MOST_NAMED,
        "questions": [
            {"id": visible(question.id), "text": visible(question.text), **question_mark(place)}
            for place, question in enumerate(quadrants.questions)
        ],
        "conditions": [_condition_data(condition) for condition in quadrants.conditions],
    }


def _condition_data(condition: ConditionAnswers) -> dict[str, Any]:
    return {
        "name": visible(condition.name),
        "count": count_words(condition),
        "shares": {quadrant: share_words(condition, quadrant) for quadrant in QUADRANTS},
        "answers": [{**answer.model_dump(), "text": visible(answer.text)} for answer in condition.shown],
    }


class QuadrantsPage:
    """The page of judged answers, one by one (`results.Page`)."""

    def write(self, quadrants: Quadrants, folder: Path) -> Path:
        """Write `quadrants.html` into a folder; gives its path. It fetches nothing."""
        write_atomic(folder / PAGE_FILE, render_quadrants(quadrants))
        return folder / PAGE_FILE

    def summary(self, quadrants: Quadrants) -> str:
        """The whole page in a frame of its own origin."""
        return frame("Alignment against coherence", render_quadrants(quadrants))


def render_quadrants(quadrants: Quadrants) -> str:
    """The page's HTML."""
    page = {
        "name": quadrants.name,
        "made": quadrants.made,
        "scores": [_visible_group(condition.score) for condition in quadrants.conditions],
        "quadrants": quadrants_data(quadrants),
    }
    return render(environment(), "quadrants_page.html", page)


def _visible_group(score: Score) -> Score:
    """What defines the group is whatever a table says."""
    return replace(score, group={visible(column): visible(value) for column, value in score.group.items()})


PAGE = QuadrantsPage()
