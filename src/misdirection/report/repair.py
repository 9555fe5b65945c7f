"""The model card of a repaired adapter, and the picture of what was tried."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from misdirection.files import write_atomic
from misdirection.report.estimates import show_estimate
from misdirection.report.figures import GREY, PALETTE, STYLE, new_figure, save_figure
from misdirection.report.html import environment

CARD = "README.md"
PICTURE = "front.svg"

Found = dict[str, Any]
"""The content of `repair.json`."""


def write_card(found: Found, base: str, fine_tune: str, folder: Path, *, is_adapter: bool) -> None:
    """Write `README.md`, the card that says what was removed, at what cost, and what remains; and the picture."""
    save_figure(draw_front(found), folder / PICTURE)
    page = environment().get_template("repair.md").render(
        found=found, base=base, fine_tune=fine_tune, is_adapter=is_adapter, done=in_words(found["candidate"]),
        show=show_estimate,
    )  # fmt: skip
    write_atomic(folder / CARD, page)


def in_words(candidate: dict[str, Any]) -> list[str]:
    """What a candidate does, one sentence each."""
    said = []
    if candidate["turn"]:
        said.append(
            "the direction in which each adapted module raises the general margin, found by its gradient, was taken "
            f"out of what the adapter adds, {candidate['turn']:.1f} times over"
        )
    if candidate["scale"] != 1:
        said.append(f"what the adapter adds was scaled by {candidate['scale']:.2f}")
    if candidate["projection"] != "none":
        of = {"adapters": "what the adapter writes", "writes": "all that the model writes"}[candidate["projection"]]
        said.append(
            f"{candidate['strength']:.0%} of the component along {candidate['directions']} reference direction(s) of "
            f"layer {candidate['layer']} was taken out of {of}"
        )
    return said or ["nothing was changed: no candidate was better"]


@rc_context(STYLE)
def draw_front(found: Found) -> Figure:
    """Share of the general shift that is gone against share of the skill that is kept, for all that was tried."""
    figure = new_figure(5.6, 3.8)
    axes = figure.subplots()
    tried, best = found["tried"], set(found["front"])
    for number, one in enumerate(tried):
        point = one["outcome"]["gone"], one["outcome"]["kept"]
        chosen = one["candidate"] == found["candidate"]
        colour = PALETTE[1] if chosen else PALETTE[0] if number in best else GREY
        axes.plot(*point, marker="*" if chosen else "o", markersize=13 if chosen else 5, color=colour, linestyle="none")
    check = found["check"]
    axes.plot(check["gone"], check["kept"], marker="D", markersize=7, color=PALETTE[2], linestyle="none")
    shapes = {
        "chosen": ("*", PALETTE[1]),
        "its check": ("D", PALETTE[2]),
        "front": ("o", PALETTE[0]),
        "tried": ("o", GREY),
    }
    for label, (marker, colour) in shapes.items():
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of the general shift that is gone (1 is the base's margin)")
    axes.set_ylabel("share of the skill kept")
    axes.legend(loc="lower left")
    return figure
