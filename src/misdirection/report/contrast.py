"""The picture of contrasts in a run's report: how far domains share one, and what that does to a domain left out."""

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from misdirection.experiment.results import ContrastEffect, ContrastFigures, RunResults
from misdirection.report.drawing import GREY, MARKERS, PALETTE, STYLE, new_figure, reach_of, short_name
from misdirection.report.figures import ReportFigure

VECTORS = {"contrast": "the shared contrast", "relabelled": "good and bad swapped", "random": "random directions"}
"""What the vectors of a `ContrastEffect` are called."""


@rc_context(STYLE)
def draw_contrast(results: RunResults) -> Figure:
    """Cosine between domains' contrasts by layer with its nulls, and changes of a left-out domain's shift."""
    contrast = results.contrast
    assert contrast is not None, "the figure applies"
    figure = new_figure(9.5, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    _draw_cosines(left, contrast)
    _draw_changes(right, contrast.effects)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return figure


def _draw_cosines(axes: Axes, contrast: ContrastFigures) -> None:
    shared = contrast.shared
    layers = range(len(shared.mean))
    axes.plot(shared.mean, color=PALETTE[0], label=f"contrasts of {len(shared.domains)} domains, mean of pairs")
    axes.plot(shared.relabelled, "--", color="black", label="fine-tunes relabelled by chance, mean")
    axes.fill_between(
        layers, shared.relabelled, shared.relabelled_95, color="black", alpha=0.12, label="to the largest twentieth"
    )
    if shared.single and shared.ceiling:
        axes.plot(shared.single, ":", color=PALETTE[0], label="single seeds, two domains")
        axes.plot(shared.ceiling, "-", color="#a8a8a8", label="single seeds, one domain (ceiling)")
    for index, (name, curve) in enumerate(contrast.voices.items(), start=1):
        axes.plot(curve, "-.", color=PALETTE[index % len(PALETTE)], label=f"difference of voice: {short_name(name)}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", integer=True)
    axes.set(title="what bad answers train beyond good ones", xlabel="layer", ylabel="cosine")


def _draw_changes(axes: Axes, effects: list[ContrastEffect]) -> None:
    uses = list(dict.fromkeys(map(_use, effects)))
    for index, (vector, label) in enumerate(VECTORS.items()):
        chosen = [effect for effect in effects if effect.vector == vector]
        if chosen:
            heights = [uses.index(_use(effect)) + 0.25 * (index - 1) for effect in chosen]
            reach = reach_of(*(effect.shift_change for effect in chosen))
            means = [effect.shift_change.mean for effect in chosen]
            colour = GREY if vector == "random" else PALETTE[index]
            axes.errorbar(means, heights, xerr=reach, fmt=MARKERS[index], color=colour, capsize=2.5, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(uses)), uses)
    axes.set_ylim(len(uses) - 0.4, -0.6)
    axes.set(
        title="tried on the domain left out", xlabel="change of shift against the base\nunder the same (nats/token)"
    )


def _use(effect: ContrastEffect) -> str:
    how = "ablated" if effect.scale is None else f"added, scale {effect.scale:g}"
    return f"{short_name(effect.domain)}\n{how}, layer {effect.layer}"


CONTRAST = ReportFigure(
    "Contrast",
    "Cosine between the contrasts of different domains by layer, with relabelled fine-tunes and other seeds; and the "
    "change of a left-out domain's shift by the shared contrast, beside swapped labels and random directions",
    "A contrast is what a fine-tune on bad answers has and one on good answers to the same questions has not, on "
    "neutral text. Left: how far the contrasts of different domains point the same way. Right: what the other domains "
    "share, taken out of or added to the fine-tune of a domain that had no part in it: change of its margin minus that "
    "of the base under the same.",
    lambda results: results.contrast is not None,
    draw_contrast,
)
