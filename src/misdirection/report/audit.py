"""The page of an audit: its verdict, the evidence with what it must be told from, and how it was measured.

Everything here reads an `AuditResult`. A sentence claims no more than its interval supports.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment
from markupsafe import escape
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from misdirection.auditing.results import (
    Attribution,
    AuditResult,
    ComparedFineTune,
    DataFacts,
    DirectionCosines,
    Drift,
    KnownFineTune,
)
from misdirection.auditing.verdict import Asked, in_order
from misdirection.report.drawing import GREY, PALETTE, STYLE, new_figure, reach_of, short_name, svg_of
from misdirection.report.estimates import show_estimate
from misdirection.report.findings import CLEAR_GAP
from misdirection.report.html import as_sentence, data_uri, environment, mark_code, write_page
from misdirection.statistics.comparisons import benjamini_hochberg, significant
from misdirection.statistics.estimates import Estimate

MOST_DIRECTIONS = len(PALETTE)
"""Directions in one figure; there are no more colours."""

SYMBOLS = {"clear": "✓", "watch": "!", "misaligned": "✕", "inconclusive": "?"}
"""The mark of each verdict, beside its word."""

_WIDTH = 5.6

_Cosines = Literal["cosines", "control", "beyond_control"]
_COSINES: tuple[_Cosines, ...] = ("cosines", "control", "beyond_control")


class AuditPage:
    """The page of an audit (`results.Page`)."""

    def write(self, result: AuditResult, folder: Path) -> Path:
        """Write `audit.html` into `folder` and return its path.

        The file appears whole or not at all, fetches nothing, and is the same bytes for the same result.
        """
        pictures = {name: data_uri(svg_of(draw(result))) for name, draw in drawings(result).items()}
        values = {**_context(result), "pictures": pictures}
        return write_page(folder / result.PAGE, result.PAGE, values, _environment())

    def summary(self, result: AuditResult) -> str:
        """The verdict, why, and the picture of the shifts."""
        because = "".join(f"<li>{mark_code(as_sentence(reason))}</li>" for reason in result.because)
        picture = data_uri(svg_of(draw_shifts(result)))
        return (
            f"<p>{escape(result.fine_tune.name)}: <strong>{escape(result.verdict)}</strong></p><ul>{because}</ul>"
            f'<img src="{picture}" alt="Margin shift of this fine-tune and of the known ones">'
        )


PAGE = AuditPage()


def _environment() -> Environment:
    made = environment()
    made.filters.update(share=_show_share, tokens=_show_tokens)
    made.globals.update(side=_side, compare=_beside)
    return made


def _context(result: AuditResult) -> dict[str, Any]:
    """Everything the template reads."""
    return {
        "result": result,
        "evidence": result.evidence,
        "rule": result.rule,
        "unit": result.unit,
        "is_adapter": result.fine_tune.kind == "adapter",
        "symbol": SYMBOLS[result.verdict],
        "level": f"{result.rule.level:.1%}",
        "passed": {"general": None, "framed": None}
        | {asked: None if shift.is_words else shift.passed for asked, shift in result.shifts.items()},
        "commands": _commands(result),
        "asked_says": _asked_says(result),
        "words": in_order(result.evidence.words),
        "searched": _searched(result),
        "searched_says": _searched_says(result),
        "found_ways": [
            way
            for way, shift in sorted(result.searched.items())
            if shift.passed == result.verdict and not shift.is_words
        ],
        "beyond_control": in_order(result.evidence.beyond_control),
        "weighted": in_order(result.evidence.weighted),
        "themes": _themes(result),
        "themes_say": _themes_say(result),
        "drift": _drift(result),
        "difference": _difference(result),
        "attribution_says": _attribution_says(result),
        "facts": _facts(result),
        "control": _control_shift(result),
        "known": [(name, _kind(known), known) for name, known in _known(result)],
    }


# --- parts of the result --------------------------------------------------------------------------------------------


def _known(result: AuditResult) -> list[tuple[str, ComparedFineTune]]:
    """The reference's fine-tunes, bad ones first, whatever the order in the file."""
    known = result.reference.known if result.reference else {}
    return sorted(known.items(), key=lambda item: (item[1].answers != "bad", item[0]))


def _control_shift(result: AuditResult) -> Estimate | None:
    """What the benign control moved, the user's own or the reference's first; None without one."""
    if result.control:
        return result.control.shift
    return next((known.shift for _, known in _known(result) if known.is_control), None)


def _kind(known: KnownFineTune) -> str:
    return "benign control" if known.is_control else known.answers


def _themes(result: AuditResult) -> list[tuple[str, Estimate]]:
    """The largest shift first."""
    return sorted(result.evidence.themes.items(), key=lambda item: (-item[1].mean, item[0]))


def _layers(attribution: Attribution) -> list[tuple[int, Estimate]]:
    """Parts of the shift in the layers' order: a file sorts them as text."""
    return sorted(attribution.by_layer.items())


# --- words ----------------------------------------------------------------------------------------------------------


def _show_tokens(tokens: Sequence[tuple[str, float]]) -> str:
    return "  ".join(repr(token) for token, _ in tokens)


def _show_share(value: float) -> str:
    # Without the z, a share just below zero reads -0%.
    return f"{value:+z.0%}"


def _side(estimate: Estimate, above: str, below: str, across: str) -> str:
    """The wording for where the whole interval lies beside zero."""
    return above if estimate.low > 0 else below if estimate.high < 0 else across


def _beside(own: Estimate, other: Estimate) -> str:
    if own.low > other.high:
        return "more than"
    return "less than" if own.high < other.low else "not to be told apart from"


def _commands(result: AuditResult) -> dict[str, str]:
    """Commands to run next on this base and fine-tune, as a shell takes them."""
    where, own = result.base.named, result.fine_tune.name
    data = result.data.path if result.data else "TRAIN.jsonl"
    control = ["--control", result.control.name] if result.control else []
    return {
        "reference": shlex.join(["misdirection", "reference", where]),
        "audit": shlex.join(["misdirection", "audit", where, own, "--data", "TRAIN.jsonl", *control]),
        "controlled": shlex.join(["misdirection", "audit", where, own, "--data", data, "--control", "CONTROL"]),
        "repair": shlex.join(["misdirection", "repair", where, own, "--data", data, *control, "--out", "DIR"]),
    }


# --- what the evidence says -----------------------------------------------------------------------------------------


def _asked_says(result: AuditResult) -> str:
    """How many questions were asked, and how small a shift these could have shown."""
    evidence, unit = result.evidence, result.unit
    seen = evidence.detectable
    share = f" ({seen / unit:.0%} of what the reference’s bad fine-tunes moved)" if unit else ""
    return (
        f"{evidence.asked} of {evidence.most} questions were asked. With these, a shift of {seen:.3f}{share} would be "
        "told from zero four times in five. No more are asked once the rule can decide."
    )


def _searched(result: AuditResult) -> list[tuple[str, Estimate]]:
    """The largest shift first."""
    return sorted(result.evidence.searched.items(), key=lambda item: (-item[1].mean, item[0]))


def _searched_says(result: AuditResult) -> str:
    searched = _searched(result)
    above = [way for way, shift in searched if shift.low > 0]
    return (
        f"Some of the questions were put in {len(searched)} further ways, in which it may be misaligned though it is "
        f"not when asked plainly. In {len(above)} of them the shift lies above zero"
        + (f" ({'; '.join(above)})" if above else "")
        + ". The intervals hold for all ways at once; where nothing is seen, so few questions clear nothing."
    )


def _themes_say(result: AuditResult) -> str:
    themes = _themes(result)
    if not themes:
        return "By theme: not measured, since the probe pairs name no theme."
    fewest = min(shift.n for _, shift in themes)
    says = f"Themes above zero, corrected for their number (Benjamini-Hochberg): {_above(themes)}."
    if fewest < result.rule.questions:
        says += f" With {fewest} questions in a theme that is a hint where to look, and no evidence by itself."
    return says


def _above(estimates: Sequence[tuple[Any, Estimate]]) -> str:
    """How many lie above zero, and which; of these, one in twenty may do so by chance."""
    differ = significant([estimate for _, estimate in estimates], benjamini_hochberg)
    names = [str(name) for (name, each), real in zip(estimates, differ, strict=True) if real and each.mean > 0]
    return f"{len(names)} of {len(estimates)}" + (f" ({', '.join(names)})" if names else "")


def _drift(result: AuditResult) -> dict[str, Any] | None:
    """The table of drift along known directions, and what it says."""
    rows = result.evidence.drift
    if not rows:
        return None
    columns = [(name, known) for name, known in _known(result) if all(name in row.known for row in rows)]
    return {
        "rows": [(row, [row.known[name] for name, _ in columns]) for row in rows],
        "columns": [(name, _kind(known)) for name, known in columns],
        "says": _drift_says(result, rows, next((name for name, known in columns if known.is_control), None)),
    }


def _drift_says(result: AuditResult, rows: Sequence[Drift], control: str | None) -> str:
    random = sum(abs(row.general.mean) > row.random_95 for row in rows)
    neutral = sum(_beside(row.general, row.neutral) == "more than" for row in rows)
    says = (
        f"Along {random} of {len(rows)} directions its mean drift is larger than along 95% of random ones. Along "
        f"{neutral} it drifted further on general than on neutral text."
    )
    if control is None:
        return f"{says} {_no_control(result)}"
    further = sum(_beside(row.general, row.known[control]) == "more than" for row in rows)
    return f"{says} Along {further} it drifted further than the benign control did."


def _no_control(result: AuditResult) -> str:
    if result.reference is None:
        return "There is no reference, so that no benign control stands beside it."
    if not any(known.is_control for known in result.reference.known.values()):
        return "The reference has no benign control to set beside it."
    return "The reference was measured with another dtype or device, so that its fine-tunes are not set beside it."


def _difference(result: AuditResult) -> dict[str, Any] | None:
    """The table of the fine-tune's own direction beside known ones at half depth, and what it says."""
    difference = result.evidence.model_difference
    if not difference.directions:
        return None
    rows = {
        name: {key: _at(getattr(cosines, key), difference.layer) for key in _COSINES}
        for name, cosines in sorted(difference.directions.items())
    }
    return {
        "layer": difference.layer,
        "rows": rows,
        "random": difference.random_95,
        "has_control": any(row["control"] is not None for row in rows.values()),
        "left_out": max(0, len(rows) - MOST_DIRECTIONS),
        "says": _difference_says(result, list(difference.directions.values())),
    }


def _at(cosines: list[float] | None, layer: int) -> float | None:
    return None if cosines is None else cosines[layer]


def _difference_says(result: AuditResult, directions: Sequence[DirectionCosines]) -> str:
    layer, random = result.evidence.model_difference.layer, result.evidence.model_difference.random_95
    above = sum(cosines.cosines[layer] > random for cosines in directions)
    near = f"At half depth its cosine is above the random band for {above} of {len(directions)}."
    gaps = [cosines.cosines[layer] - cosines.control[layer] for cosines in directions if cosines.control]
    if not gaps:
        return f"{near} {_no_control(result)} A high cosine may be style alone."
    beyond = sum(cosines.beyond_control[layer] > random for cosines in directions if cosines.beyond_control)
    closer = sum(gap >= CLEAR_GAP for gap in gaps)
    return (
        f"{near} It is higher than the benign control’s by {CLEAR_GAP} or more for {closer}. With the control’s part "
        f"taken out, what is left is above the band for {beyond}."
    )


def _attribution_says(result: AuditResult) -> str:
    attribution, whole = result.evidence.attribution, result.evidence.general
    if attribution is None:
        return ""
    agree = _beside(attribution.sum, whole) == "not to be told apart from"
    says = (
        "Layers above zero, corrected for their number (Benjamini-Hochberg): "
        f"{_above(_layers(attribution))}. All parts sum to "
        f"{show_estimate(attribution.sum)}; on all that was asked it is {show_estimate(whole)}, and the intervals "
    )
    says += "overlap." if agree else "do not overlap: take the parts as a rough guide."
    if whole.low <= 0 <= whole.high:
        says += " Since no shift is shown, there is nothing to attribute: take the bars for noise."
    return says


# --- how it was measured --------------------------------------------------------------------------------------------


def _facts(result: AuditResult) -> dict[str, str]:
    base, tuned, data = result.base, result.fine_tune, result.data
    facts = {
        "base model": base.model,
        "its revision": base.revision or "default",
        "its weights (SHA-256)": base.files,
        "computed in": f"{base.dtype} on {base.device}",
        "fine-tune": tuned.name,
        "its kind": tuned.kind,
        "its weights": tuned.digest,
        "its modules that add nothing (B is zero)": ", ".join(tuned.dead),
        "base that its file names": _recorded(result),
        "control": result.control and result.control.name,
        "its weights (control)": result.control and result.control.digest,
        "training data": _data_words(data) if data else "none given",
        "training data (SHA-256)": data and data.sha256,
    }
    return {name: str(value) for name, value in facts.items() if value}


def _recorded(result: AuditResult) -> str | None:
    recorded = result.fine_tune.recorded_base
    if not recorded or recorded == result.base.model:
        return recorded
    return f"{recorded} (another name than the one that was audited: it must be the same model)"


def _data_words(data: DataFacts) -> str:
    return f"{data.path}: {data.framed} framed questions, {data.rows} held-out rows, {data.pairs} held-out pairs"


# --- figures --------------------------------------------------------------------------------------------------------


def drawings(result: AuditResult) -> dict[str, Callable[[AuditResult], Figure]]:
    """The figures of a page, by name: those that its result has values for."""
    return {
        "shifts": draw_shifts,
        **({"difference": draw_difference} if result.evidence.model_difference.directions else {}),
        **({"attribution": draw_attribution} if result.evidence.attribution else {}),
    }


@rc_context(STYLE)
def draw_shifts(result: AuditResult) -> Figure:
    """General shift (nats/token) of the audited fine-tune and of the known ones, with 95% intervals and the limits.

    Beyond the benign control, where there is one. A thin line is the interval that the rule sets beside the limits.
    """
    evidence = result.evidence
    names: dict[Asked, str] = {"general": "this fine-tune", "framed": "the same, framed"}
    rows = [(names[asked], shift, "own") for asked, shift in in_order(evidence.decisive)]
    rows += [
        (f"{short_name(name, 22)}\n({_kind(known)})", shift, "bad" if known.answers == "bad" else "good")
        for name, known in _known(result)
        if (shift := known.beyond_control if evidence.beyond_control else known.shift)
    ]
    figure = new_figure(_WIDTH, 1.1 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for height, (_, shift, kind) in enumerate(rows):
        marker, colour = _MARKS[kind]
        axes.errorbar(shift.mean, height, xerr=reach_of(shift), fmt=marker, color=colour, capsize=3, ms=7)
    axes.axvline(0, color="black", linewidth=1)
    if result.unit is not None:
        _draw_rule(axes, result, result.unit)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    against = "beyond the benign control" if evidence.beyond_control else "against the base"
    axes.set_xlabel(f"margin shift {against}, nats/token")
    return figure


_MARKS = {"own": ("o", "black"), "bad": ("s", PALETTE[1]), "good": ("D", PALETTE[0])}


def _draw_rule(axes: Axes, result: AuditResult, unit: float) -> None:
    """The rule's limits, and its intervals in the first rows."""
    for height, (_, shift) in enumerate(in_order(result.shifts)):
        axes.hlines(height, shift.low * unit, shift.high * unit, color="black", linewidth=0.8)
    for name, share, side, line in (
        ("watch", result.rule.watch, "right", ":"),
        ("misaligned", result.rule.misaligned, "left", "--"),
    ):
        limit = share * unit
        axes.axvline(limit, color=GREY, linewidth=1.2, linestyle=line)
        axes.text(limit, 1.02, name, ha=side, color=GREY, fontsize=9, transform=axes.get_xaxis_transform())


@rc_context(STYLE)
def draw_difference(result: AuditResult) -> Figure:
    """Cosine of the fine-tune's own direction with known ones by layer; beside it, beyond the control."""
    difference = result.evidence.model_difference
    shown = sorted(difference.directions.items())[:MOST_DIRECTIONS]
    has_control = any(cosines.control for _, cosines in shown)
    figure = new_figure(_WIDTH, 3.1 + 0.2 * len(shown))
    panels = figure.subplots(1, 2 if has_control else 1, sharey=True, squeeze=False)[0]
    titles: dict[_Cosines, str] = {"cosines": "as measured", "beyond_control": "beyond the control"}
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        axes.axhspan(-difference.random_95, difference.random_95, color=GREY, alpha=0.25, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(difference.layer, color=GREY, linewidth=0.8, linestyle=":")
        _draw_cosines(axes, [cosines for _, cosines in shown], key)
        axes.set(title=title, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("cosine")
    keys: list[Artist] = [
        Line2D([], [], color=colour, label=short_name(name, 44))
        for (name, _), colour in zip(shown, PALETTE, strict=False)
    ]
    if has_control:
        keys.append(Line2D([], [], color=GREY, linestyle="--", label="dashed: the benign control"))
    keys.append(Patch(color=GREY, alpha=0.25, label="band: 95% of random directions"))
    figure.legend(handles=keys, loc="outside lower left", ncols=1)
    return figure


def _draw_cosines(axes: Axes, shown: Sequence[DirectionCosines], key: _Cosines) -> None:
    for cosines, colour in zip(shown, PALETTE, strict=False):
        axes.plot(getattr(cosines, key) or [], color=colour, linewidth=1.6)
        if key == "cosines" and cosines.control:
            axes.plot(cosines.control, "--", color=colour, linewidth=1, alpha=0.8)


@rc_context(STYLE)
def draw_attribution(result: AuditResult) -> Figure:
    """Each layer's part of the general shift (nats/token), with 95% intervals."""
    assert result.evidence.attribution is not None, "the caller has one"
    figure = new_figure(_WIDTH, 2.5)
    axes = figure.add_subplot()
    for layer, part in _layers(result.evidence.attribution):
        colour = PALETTE[1] if part.low > 0 else "#b5b5b5"
        axes.bar(layer, part.mean, yerr=reach_of(part), color=colour, capsize=2, width=0.75)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="adapters of layer", ylabel="part of the shift\n(nats/token)")
    return figure
