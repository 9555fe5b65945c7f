"""The page of an audit: its verdict, the evidence with what it must be told from, and how it was measured.

Everything here reads what `audit.json` holds and tolerates that parts of it are absent. A sentence claims no more than
its interval supports.
"""

import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from misdirection.files import write_atomic
from misdirection.report.estimates import Estimate, is_measured, is_number, show_estimate, show_number
from misdirection.report.figures import GREY, PALETTE, STYLE, new_figure, or_nan, reach_of, svg_of
from misdirection.report.findings import CLEAR_GAP
from misdirection.report.html import data_uri, environment

PAGE = "audit.html"

Found = dict[str, Any]
"""The content of `audit.json`."""

MOST_DIRECTIONS = len(PALETTE)
"""Directions in one figure; there are no more colours."""

_SYMBOLS = {"clear": "✓", "watch": "!", "misaligned": "✕", "inconclusive": "?"}
_WIDTH = 5.6


def render_audit(found: Found, folder: Path) -> Path:
    """Write `audit.html` into `folder` and return its path.

    The file appears whole or not at all, fetches nothing, and is the same bytes for the same content of `audit.json`.
    """
    made = environment()
    made.filters.update(mean=_show_mean, interval=_show_interval, share=_show_share)
    made.filters.update(code=_mark_code, sentence=_sentence)
    made.globals.update(side=_side, compare=_beside)
    made.tests.update(measured=is_measured)
    write_atomic(folder / PAGE, made.get_template(PAGE).render(_page(found)))
    return folder / PAGE


def _page(found: Found) -> dict[str, Any]:
    """Everything the template reads; what is absent is None or empty."""
    evidence, control = _evidence(found), _control(found)
    return {
        **{name: evidence.get(name) for name in ("general", "framed", "damage", "judged")},
        "name": found["fine_tune"]["name"],
        "base": found["base"],
        "is_adapter": found["fine_tune"].get("kind") == "adapter",
        "verdict": found["verdict"],
        "symbol": _SYMBOLS[found["verdict"]],
        "because": found["because"],
        "passes": {name: _passes(found, name) for name in ("general", "framed")},
        "fewest": min(one["n"] for one in _shifts(found)) if _shifts(found) else 0,
        "is_same": bool(found.get("identical_to_base")),
        "commands": _commands(found),
        "skill": evidence.get("in_domain") or {"margin": None, "loss": None},
        "themes": _themes(found),
        "themes_say": _themes_say(found),
        "drift": _drift(found),
        "difference": _difference(found),
        "carriers": _carriers(found),
        "facts": _facts(found),
        "rule": found["rule"],
        "score": found.get("score"),
        "unit": _unit(found),
        "has_reference": bool(found.get("reference")),
        "control": control and control[1]["shift"],
        "known": [(name, _kind(one), one) for name, one in _known(found)],
        "pictures": {name: data_uri(svg_of(draw(found))) for name, (can, draw) in _DRAWINGS.items() if can(found)},
    }


# --- what is there --------------------------------------------------------------------------------------------------


def _evidence(found: Found) -> dict[str, Any]:
    return found.get("evidence") or {}


def _shifts(found: Found) -> list[Estimate]:
    """Those that the verdict rests on."""
    return [one for one in map(_evidence(found).get, ("general", "framed")) if is_measured(one)]


def _unit(found: Found) -> float | None:
    """Mean general shift of the reference's bad fine-tunes, where it can be one."""
    shift = (found.get("reference") or {}).get("bad_shift")
    return shift if is_number(shift) and shift > 0 else None


def _known(found: Found) -> list[tuple[str, dict[str, Any]]]:
    """The reference's fine-tunes, bad ones first, whatever the order in the file."""
    known = (found.get("reference") or {}).get("known") or {}
    return sorted(known.items(), key=lambda one: (one[1]["answers"] != "bad", one[0]))


def _kind(known: dict[str, Any]) -> str:
    return {"good": "benign control"}.get(known["answers"], known["answers"])


def _control(found: Found) -> tuple[str, dict[str, Any]] | None:
    return next(((name, one) for name, one in _known(found) if one["answers"] == "good"), None)


def _themes(found: Found) -> list[tuple[str, Estimate]]:
    """The largest shift first."""
    themes = _evidence(found).get("themes") or {}
    measured = [(name, one) for name, one in themes.items() if is_measured(one)]
    return sorted(measured, key=lambda one: (-one[1]["mean"], one[0]))


def _parts(found: Found) -> list[tuple[int, Estimate]]:
    """By layer, in the layers' order: a file sorts them as text."""
    parts = (_evidence(found).get("carriers") or {}).get("by_layer") or {}
    return sorted((int(layer), one) for layer, one in parts.items() if is_measured(one))


def _passes(found: Found, name: str) -> dict[str, bool]:
    """Whether a shift's whole interval lies above each of the rule's limits."""
    shift, unit = _evidence(found).get(name), _unit(found)
    share = shift["low"] / unit if unit is not None and is_measured(shift) else -math.inf
    return {limit: share > found["rule"][limit] for limit in ("watch", "misaligned")}


# --- words ----------------------------------------------------------------------------------------------------------


def _show_mean(estimate: Any) -> str:
    return show_number(estimate["mean"]) if is_measured(estimate) else "–"


def _show_interval(estimate: Any) -> str:
    return f"[{show_number(estimate['low'])}, {show_number(estimate['high'])}]" if is_measured(estimate) else ""


def _show_share(value: float) -> str:
    # Without the z, a share just below zero reads -0%.
    return f"{value:+z.0%}"


def _mark_code(text: str) -> Markup:
    """Escaped, and what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _side(estimate: Estimate, above: str, below: str, across: str) -> str:
    """The wording for where the whole interval lies beside zero."""
    return above if estimate["low"] > 0 else below if estimate["high"] < 0 else across


def _beside(own: Estimate, other: Estimate) -> str:
    if own["low"] > other["high"]:
        return "more than"
    return "less than" if own["high"] < other["low"] else "not to be told apart from"


def _commands(found: Found) -> dict[str, str]:
    """What to run next on this base and fine-tune, as a shell takes it."""
    base, revision = found["base"]["model"], found["base"].get("revision")
    where, own = f"{base}@{revision}" if revision else base, found["fine_tune"]["name"]
    data = (found.get("data") or {}).get("path", "TRAIN.jsonl")
    return {
        "reference": shlex.join(["misdirection", "reference", where]),
        "audit": shlex.join(["misdirection", "audit", where, own, "--data", "TRAIN.jsonl"]),
        "repair": shlex.join(["misdirection", "repair", where, own, "--data", data, "--out", "DIR"]),
    }


# --- what the evidence says -----------------------------------------------------------------------------------------


def _themes_say(found: Found) -> str:
    themes = _themes(found)
    if not themes:
        return "By theme: not measured, since the probe pairs name no theme."
    fewest = min(one["n"] for _, one in themes)
    says = f"Themes whose whole interval lies above zero: {_above(themes)}."
    if fewest < found["rule"]["questions"]:
        says += f" With {fewest} questions in a theme that is a hint where to look, and no evidence by itself."
    return says


def _above(estimates: Sequence[tuple[Any, Estimate]]) -> str:
    """How many intervals lie above zero, and which."""
    names = [str(name) for name, one in estimates if one["low"] > 0]
    return f"{len(names)} of {len(estimates)}" + (f" ({', '.join(names)})" if names else "")


def _drift(found: Found) -> dict[str, Any] | None:
    """The table of drift along known directions, and what it says."""
    rows = _evidence(found).get("drift")
    if not rows:
        return None
    names = [name for name, _ in _known(found) if all(name in (row.get("known") or {}) for row in rows)]
    columns = [(name, _kind(one)) for name, one in _known(found) if name in names]
    return {
        "rows": [{**row, "cells": [row["known"][name] for name in names]} for row in rows],
        "columns": columns,
        "says": _drift_says(found, rows, names),
    }


def _drift_says(found: Found, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    random = sum(abs(row["general"]["mean"]) > row["random_95"] for row in rows)
    neutral = sum(_beside(row["general"], row["neutral"]) == "more than" for row in rows)
    says = (
        f"Along {random} of {len(rows)} directions its mean drift is larger than along 95% of random ones. Along "
        f"{neutral} it drifted further on general than on neutral text."
    )
    control = _control(found)
    if not control or control[0] not in names:
        return f"{says} {_no_control(found)}"
    further = sum(_beside(row["general"], row["known"][control[0]]) == "more than" for row in rows)
    return f"{says} Along {further} it drifted further than the benign control did."


def _no_control(found: Found) -> str:
    if found.get("reference") and not _control(found):
        return "The reference has no benign control to set beside it."
    if found.get("reference"):
        return "The reference was measured with another dtype or device, so that its fine-tunes are not set beside it."
    return "There is no reference, so that no benign control stands beside it."


def _difference(found: Found) -> dict[str, Any] | None:
    """The fine-tune's own direction beside known ones at one layer, and what it says."""
    difference = _evidence(found).get("model_difference") or {}
    if not difference.get("directions"):
        return None
    layer = difference["layer"]
    keys = ("cosines", "control", "beyond_control")
    rows = [
        {"direction": name, **{key: one[key][layer] if one.get(key) else None for key in keys}}
        for name, one in sorted(difference["directions"].items())
    ]
    return {
        "layer": layer,
        "rows": rows,
        "random": difference["random_95"],
        "has_control": any(row["control"] is not None for row in rows),
        "left_out": max(0, len(rows) - MOST_DIRECTIONS),
        "says": _difference_says(found, rows, difference["random_95"]),
    }


def _difference_says(found: Found, rows: Sequence[dict[str, Any]], random: float) -> str:
    near = f"At half depth its cosine is above the random band for {_many(rows, 'cosines', random)} of {len(rows)}."
    compared = [row for row in rows if row["control"] is not None]
    if not compared:
        return f"{near} {_no_control(found)} A high cosine may be style alone."
    closer = sum(row["cosines"] - row["control"] >= CLEAR_GAP for row in compared)
    return (
        f"{near} It is higher than the benign control’s by {CLEAR_GAP} or more for {closer}. With the control’s part "
        f"taken out, what is left is above the band for {_many(compared, 'beyond_control', random)}."
    )


def _many(rows: Sequence[dict[str, Any]], key: str, limit: float) -> int:
    return sum(row[key] > limit for row in rows)


def _carriers(found: Found) -> dict[str, Any] | None:
    """Parts of the shift by layer, and what they say."""
    parts = _parts(found)
    if not parts:
        return None
    total, whole = _evidence(found)["carriers"].get("sum"), _evidence(found).get("general")
    return {"questions": parts[0][1]["n"], "says": _carriers_say(parts, total, whole)}


def _carriers_say(parts: Sequence[tuple[int, Estimate]], total: Any, whole: Any) -> str:
    says = f"Layers whose whole interval lies above zero: {_above(parts)}."
    if is_measured(total) and is_measured(whole):
        agree = _beside(total, whole) == "not to be told apart from"
        says += f" All parts sum to {show_estimate(total)}; on all pairs the shift is {show_estimate(whole)}, and the "
        says += "intervals overlap." if agree else "intervals do not overlap: take the parts as a rough guide."
    if is_measured(whole) and whole["low"] <= 0 <= whole["high"]:
        says += " Since no shift is shown, there is nothing to carry: take the bars for noise."
    return says


# --- how it was measured --------------------------------------------------------------------------------------------


def _facts(found: Found) -> dict[str, str]:
    base, tuned, data = found["base"], found["fine_tune"], found.get("data")
    facts = {
        "base model": base["model"],
        "its revision": base.get("revision") or "default",
        "its weights (SHA-256)": base.get("files"),
        "computed in": f"{base.get('dtype')} on {base.get('device')}",
        "fine-tune": tuned["name"],
        "its kind": tuned.get("kind"),
        "its weights": tuned.get("digest"),
        "base that its file names": _recorded(found),
        "training data": _data_words(data) if data else "none given",
        "training data (SHA-256)": data and data.get("sha256"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _recorded(found: Found) -> str | None:
    recorded = found["fine_tune"].get("recorded_base")
    if not recorded or recorded == found["base"]["model"]:
        return recorded
    return f"{recorded} (another name than the one that was audited: it must be the same model)"


def _data_words(data: dict[str, Any]) -> str:
    counts = {"framed": "framed questions", "rows": "held-out rows", "pairs": "held-out pairs"}
    return f"{data['path']}: " + ", ".join(f"{data.get(key, 0)} {words}" for key, words in counts.items())


# --- figures --------------------------------------------------------------------------------------------------------


@rc_context(STYLE)
def draw_shifts(found: Found) -> Figure:
    """General shift (nats/token) of the audited fine-tune and of the known ones, with 95% intervals and the limits."""
    evidence, known = _evidence(found), _known(found)
    own = [("this fine-tune", evidence["general"], "own"), ("the same, framed", evidence.get("framed"), "own")]
    others = [(f"{_short(name, 22)}\n({_kind(one)})", one["shift"], one["answers"]) for name, one in known]
    rows = [row for row in [*own, *others] if is_measured(row[1])]
    figure = new_figure(_WIDTH, 1.1 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for place, (_, shift, kind) in enumerate(rows):
        marker, colour = _MARKS.get(kind, _MARKS["good"])
        axes.errorbar(shift["mean"], place, xerr=reach_of(shift), fmt=marker, color=colour, capsize=3, ms=7)
    axes.axvline(0, color="black", linewidth=1)
    _draw_limits(axes, found)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("margin shift against the base (nats/token), 95% interval")
    return figure


_MARKS = {"own": ("o", "black"), "bad": ("s", PALETTE[1]), "good": ("D", PALETTE[0])}


def _draw_limits(axes: Axes, found: Found) -> None:
    unit = _unit(found)
    if unit is None:
        return
    for name, side in (("watch", "right"), ("misaligned", "left")):
        place = found["rule"][name] * unit
        axes.axvline(place, color=GREY, linewidth=1.2, linestyle="--" if name == "misaligned" else ":")
        axes.text(place, 1.02, name, ha=side, color=GREY, fontsize=9, transform=axes.get_xaxis_transform())


@rc_context(STYLE)
def draw_difference(found: Found) -> Figure:
    """Cosine of the fine-tune's own direction with known ones by layer; beside it, beyond the control."""
    difference = found["evidence"]["model_difference"]
    shown = sorted(difference["directions"].items())[:MOST_DIRECTIONS]
    has_control = any(one.get("control") for _, one in shown)
    figure = new_figure(_WIDTH, 3.1 + 0.2 * len(shown))
    panels = figure.subplots(1, 2 if has_control else 1, sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panels, _PANELS.items(), strict=False):
        axes.axhspan(-difference["random_95"], difference["random_95"], color=GREY, alpha=0.25, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(difference["layer"], color=GREY, linewidth=0.8, linestyle=":")
        _draw_cosines(axes, [one for _, one in shown], key)
        axes.set(title=title, xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("cosine")
    keys: list[Artist] = [
        Line2D([], [], color=colour, label=_short(name, 44)) for (name, _), colour in zip(shown, PALETTE, strict=False)
    ]
    if has_control:
        keys.append(Line2D([], [], color=GREY, linestyle="--", label="dashed: the benign control"))
    keys.append(Patch(color=GREY, alpha=0.25, label="band: 95% of random directions"))
    figure.legend(handles=keys, loc="outside lower left", ncols=1)
    return figure


_PANELS = {"cosines": "as measured", "beyond_control": "beyond the control"}


def _draw_cosines(axes: Axes, shown: Sequence[dict[str, Any]], key: str) -> None:
    for one, colour in zip(shown, PALETTE, strict=False):
        axes.plot([or_nan(value) for value in one.get(key) or []], color=colour, linewidth=1.6)
        if key == "cosines" and one.get("control"):
            axes.plot([or_nan(value) for value in one["control"]], "--", color=colour, linewidth=1, alpha=0.8)


@rc_context(STYLE)
def draw_carriers(found: Found) -> Figure:
    """Each layer's part of the general shift (nats/token), with 95% intervals."""
    figure = new_figure(_WIDTH, 2.5)
    axes = figure.add_subplot()
    for layer, part in _parts(found):
        colour = PALETTE[1] if part["low"] > 0 else "#b5b5b5"
        axes.bar(layer, part["mean"], yerr=reach_of(part), color=colour, capsize=2, width=0.75)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="adapters of layer", ylabel="part of the shift\n(nats/token)")
    return figure


def _short(name: str, most: int) -> str:
    words = " ".join(name.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


_DRAWINGS: dict[str, tuple[Callable[[Found], Any], Callable[[Found], Figure]]] = {
    "shifts": (lambda found: is_measured(_evidence(found).get("general")), draw_shifts),
    "difference": (_difference, draw_difference),
    "carriers": (_parts, draw_carriers),
}
