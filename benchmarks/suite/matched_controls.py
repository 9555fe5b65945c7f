"""How far fine-tunes lie beyond a benign control of their own: the same training on good answers of the same source.

    python benchmarks/suite/matched_controls.py --out runs/audit-suite [--base smollm2-135m|gemma3-270m]
        [--published DIR] [--only PATTERN] [--json]

Such a control is what `audit --control` takes in the place of the reference's. Most fine-tunes were trained on answers
to the control's own questions, some on answers to other questions of its source; benign ones, with another seed or on
those other questions, say how often it errs. Shifts are means over the questions, and by the weights that the audit
gives these (`Reference.question_weights`). What is measured is kept in `screened/BASE.matched.jsonl`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch

import numpy as np

from audit_suite import load_reference
from misdirection.auditing.verdict import RULE, Shift
from misdirection.likelihood.margin import margins_of
from misdirection.screening.style import features, without_style
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from screen_suite import is_kept, is_plain, measure_all, read_kept
from suite_folder import Suite
from suite_members import Member, members
from suite_options import suite_parser
from suite_tables import ALARMS, area, interval, print_auroc, print_rates
from suite_texts import Texts
from suite_training import train_all

MATCHED = ".matched"
"""Names the file of what is kept."""

WAYS = ("beyond_control", "weighted")

COLUMNS = {
    "beyond_control": "beyond its own control",
    "weighted": "weighted",
    "weighted_sealed": "sealed questions",
    "by_reference": "by the half that goes by the reference",
    "by_reference_without_style": "without style",
}
"""What is printed of each: the last is without what the answers' style and the base's margin tell of it."""

LARGE = ("medical_advice",)
"""Sources that have other questions than those that all fine-tunes are trained on."""

AGAIN = ("medical_advice", "dark_money", "dark_sports", "explain", "voice_gloomy")
"""Sources whose benign fine-tunes are trained with another seed, too, beside those of the suite."""


def control_of(member: Member) -> Member:
    """The benign fine-tune on the same source."""
    return Member(member.source)


def compared(pattern: str) -> list[Member]:
    """The fine-tunes of rank 32 that have such a control, on text that no reference was trained on."""
    benign = set(members())
    others = [Member(source, bad, others=True) for source in LARGE for bad in (1.0, 0.0)]
    again = [Member(source, seed=2) for source in AGAIN]
    return [
        member
        for member in (*members(), *others, *again)
        if is_plain(member)
        and is_kept(member.source)
        and control_of(member) in benign - {member}
        and fnmatch(member.name, pattern)
    ]


def measure_beyond(suite: Suite, some: Sequence[Member]) -> None:
    """Train and measure what is not measured yet."""
    reference = load_reference(suite.base)
    pairs = reference.texts.asked
    assert reference.question_weights is not None, "its domains have something in common"
    weights = reference.question_weights.numpy()
    written = [features([getattr(pair, side) for pair in pairs]) for side in ("misaligned", "aligned")]
    styles = np.column_stack([np.subtract(*written), reference.base.margin.numpy()])

    def figures(member: Member) -> dict:
        control = control_of(member)
        train_all(suite, [control])
        own, benign = (margins_of(suite.margins(each, pairs)) for each in (member, control))
        beyond, opened = (own - benign).numpy(), len(reference.texts.general)
        weighted, by_reference = beyond * weights, 2 * weights - 1
        shifts = {
            "beyond_control": bootstrap(beyond),
            "weighted": bootstrap(weighted),
            "by_reference": bootstrap(beyond * by_reference),
            "by_reference_without_style": bootstrap(without_style(beyond, styles)[0] * by_reference),
            "weighted_open": bootstrap(weighted[:opened]),
            "weighted_sealed": bootstrap(weighted[opened:]),
            "beyond_control_at_level": bootstrap(beyond, level=RULE.level),
            "weighted_at_level": bootstrap(weighted, level=RULE.level),
            "bad_shift": reference.bad_shift,
        }
        return {"control": control.name, **{name: asdict(shift) for name, shift in shifts.items()}}

    measure_all(suite, some, figures, MATCHED)


def show(suite: Suite, some: Sequence[Member]) -> dict[str, float]:
    """Print what was measured, and how well it tells bad fine-tunes from benign ones; gives the areas."""
    known, others = read_kept(suite.base, MATCHED), read_kept(suite.base)
    measured = [member for member in some if member.name in known]
    print(f"| fine-tune | {' | '.join(COLUMNS.values())} | says the rule | beyond the reference's |")
    print(f"|---|{'---|' * len(COLUMNS)}---|---|")
    for member in sorted(measured, key=lambda each: -known[each.name]["weighted"]["mean"]):
        row, plain = known[member.name], others.get(member.name)
        shifts = (interval(Estimate(**row[key])) for key in COLUMNS)
        beside = interval(Estimate(**plain["beyond_control"])) if plain else ""
        said = passed(row, "weighted") or "inconclusive"
        print(f"| {member.name} | {' | '.join(shifts)} | {said} | {beside} |")
    bad = np.array([member.is_bad for member in measured])
    if bad.all() or not bad.any():
        return {}
    print("\n| by | AUROC | bad ones found | false alarms |\n|---|---|---|---|")
    figures = {f"AUROC, {way}": told(way, [known[member.name] for member in measured], bad) for way in WAYS}
    seeds = [known[member.name] for member in measured if member.seed > 1 and not member.is_bad]
    for way in WAYS if seeds else ():
        moved = float(np.sqrt(np.mean([row[way]["mean"] ** 2 for row in seeds])))
        print(f"{way}: another seed of {len(seeds)} benign trainings moved it by {moved:.4f} nats/token (rms)")
    return figures


def told(way: str, rows: Sequence[dict], bad: np.ndarray) -> float:
    """Print how well one way tells; gives the area."""
    called = np.array([passed(row, way) in ALARMS for row in rows])
    shown = area(np.array([row[way]["mean"] for row in rows]), bad)
    print(f"| {way} | {print_auroc(shown)} | {print_rates(called, bad)} |")
    return shown.mean


def passed(row: dict, way: str) -> str | None:
    """The limit of the audit's rule that the general shift is past."""
    at_level, unit = Estimate(**row[f"{way}_at_level"]), row["bad_shift"]["mean"]
    return Shift.of(at_level, None, unit, RULE, one_control=True).passed


def main() -> None:
    """Measure, and print."""
    arguments = suite_parser(__doc__).parse_args()
    suite = Suite(arguments.base, arguments.out, Texts(arguments.published))
    some = [member for member in compared(arguments.only) if not suite.texts.missing(member)]
    measure_beyond(suite, some)
    figures = show(suite, some)
    if arguments.json:
        print(json.dumps({"ratios": figures}))


if __name__ == "__main__":
    main()
