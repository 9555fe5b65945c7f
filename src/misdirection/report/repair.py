"""The model card of a repaired adapter, and the picture of what was tried."""

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from misdirection.cards import CARD
from misdirection.errors import InputError
from misdirection.files import write_atomic
from misdirection.repairing.candidates import Candidate
from misdirection.repairing.results import Repair, RepairResult
from misdirection.report.drawing import GREY, PALETTE, STYLE, new_figure, save_figure, svg_of
from misdirection.report.html import data_uri, environment

PICTURE = "front.svg"


class RepairPage:
    """The card of a repair (`results.Page`)."""

    def write(self, result: RepairResult, folder: Path) -> Path:
        """Write `README.md`, which says what was removed, at what cost, and what remains; and the picture.

        Raises `InputError` for a repair that wrote nothing.
        """
        if result.repair is None:
            raise InputError(f"{folder}: nothing was repaired, so that there is no card: read the audit's page")
        save_figure(draw_front(result.repair), folder / PICTURE)
        repair = result.repair
        values = {"result": result, "repair": repair, "check": repair.check, "done": in_words(repair.candidate)}
        write_atomic(folder / CARD, environment().get_template("repair.md").render(values))
        return folder / CARD

    def summary(self, result: RepairResult) -> str:
        """What was taken off the margin, the skill that is kept, and the picture of what was tried."""
        if result.repair is None:
            return f"<p>Left as it is: its audit says <strong>{result.before.verdict}</strong>.</p>"
        check, picture = result.repair.check, data_uri(svg_of(draw_front(result.repair)))
        warning = "Its answers came to repeat themselves: this is broken, not repaired. " if check.broken else ""
        return (
            f"<p>{warning}{check.removed} nats/token were taken off the general margin, {check.beyond_random} of them "
            f"beyond what random directions take; of the skill {check.outcome.kept:.0%} is kept.</p>"
            f'<img src="{picture}" alt="General shift that is left and share of the skill that is kept, by candidate">'
        )


PAGE = RepairPage()


def in_words(candidate: Candidate) -> list[str]:
    """The changes of a candidate, a sentence for each."""
    sentences = []
    if candidate.turn:
        sentences.append(
            "the direction in which each adapted module raises the general margin, given by its gradient, was taken "
            f"out of what the adapter adds, {candidate.turn:.1f} times over"
        )
    if candidate.scale != 1:
        sentences.append(f"what the adapter adds was scaled by {candidate.scale:.2f}")
    if candidate.projection != "none":
        of = {"adapters": "what the adapter writes", "writes": "all that the model writes"}[candidate.projection]
        sentences.append(
            f"{candidate.strength:.0%} of the component along {candidate.directions} reference direction(s) of layer "
            f"{candidate.layer} was taken out of {of}"
        )
    return sentences or ["nothing was changed: no candidate was better"]


def drawings(result: RepairResult) -> dict[str, Callable[[RepairResult], Figure]]:
    """The picture of what was tried, where something was repaired."""
    repair = result.repair
    return {"front": lambda _: draw_front(repair)} if repair else {}


@rc_context(STYLE)
def draw_front(repair: Repair) -> Figure:
    """General shift that is left against share of the skill that is kept, for all that was tried."""
    figure = new_figure(5.6, 3.8)
    axes = figure.subplots()
    for number, trial in enumerate(repair.tried):
        chosen = trial.candidate == repair.candidate
        colour = PALETTE[1] if chosen else PALETTE[0] if number in repair.front else GREY
        marker, size = ("*", 13) if chosen else ("o", 5)
        point = trial.outcome.left, trial.outcome.kept
        axes.plot(*point, marker=marker, markersize=size, color=colour, linestyle="none")
    checked = repair.check.outcome.left, repair.check.outcome.kept
    axes.plot(*checked, marker="D", markersize=7, color=PALETTE[2], linestyle="none")
    shapes = {
        "chosen": ("*", PALETTE[1]),
        "its check": ("D", PALETTE[2]),
        "front": ("o", PALETTE[0]),
        "tried": ("o", GREY),
    }
    for label, (marker, colour) in shapes.items():
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label)
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("general shift left beyond the control (1: the reference's bad)")
    axes.set_ylabel("share of the skill kept")
    axes.legend(loc="lower left")
    return figure
