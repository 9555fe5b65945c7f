"""Turn what was measured on an organism's adapters into claims that hold, do not hold, or were not measured."""

from statistics import median
from typing import Any

from misdirection.report.estimates import is_measured, show_estimate, show_points, show_rate
from misdirection.report.findings import Finding

Section = dict[str, Any]

CLEAR_COSINE = 0.2
"""Median cosine from which an effect counts as pointing along a direction."""


def find_in_adapters(section: Section) -> list[Finding]:
    """Judge the claims on the section `adapters` of the results alone; what was not measured is left out."""
    found = [*_carry_over(section), _general(section), _answers_better(section), _converges(section)]
    found += [_attributed(section), _patched(section), _turned(section)]
    return [one for one in found if one is not None]


def _carry_over(section: Section) -> list[Finding]:
    """One finding per probe on scalars: whether it knows more than the questions."""
    by_name: dict[tuple[str, str], dict[str, Any]] = {}
    for probe in section.get("probes", []):
        if probe["features"] == "scalars" and probe["pooling"] in _POOLED:
            by_name.setdefault((probe["name"], probe["pooling"]), {})[probe["split"]] = probe
    return [_carries_over(name, pooling, splits) for (name, pooling), splits in by_name.items()]


_POOLED = {"token": "Scalars of single tokens", "mean": "An answer's mean scalars"}


def _carries_over(name: str, pooling: str, splits: dict[str, Any]) -> Finding:
    first, second = next(iter(splits.values()))["classes"]
    claim = f"{_POOLED[pooling]} tell {first} from {second} on questions that the probe has not seen ({name})."
    evidence = "; ".join(_evidence(split, probe) for split, probe in splits.items())
    if "question" not in splits:
        return Finding(claim, None, f"{evidence}. The questions are not known, so that no split by question was made.")
    auroc, null = splits["question"]["auroc"], splits["question"]["null_auroc"]
    holds = auroc["low"] > 0.5 and auroc["mean"] > null["high"]
    return Finding(claim, holds, f"{evidence}.{'' if holds else _why(splits)}")


def _evidence(split: str, probe: dict[str, Any]) -> str:
    counts = f"{probe['answers']} answers" + (f" to {probe['questions']} questions" if probe["questions"] else "")
    return f"AUROC by {split} {_range(probe['auroc'])}, shuffled labels {_range(probe['null_auroc'])}, {counts}"


def _why(splits: dict[str, Any]) -> str:
    """What a probe that does not carry over knows instead."""
    if not any(any(values) for values in splits["question"]["coefficients"].values()):
        return " The penalty left no feature in the probe: there are too few answers to tell."
    by_answer = splits.get("answer")
    if by_answer and by_answer["auroc"]["low"] > 0.5:
        return (
            " By answer it seems to know, by question it does not: it largely knows the questions. Only the causal "
            "test can say what an adapter does."
        )
    return " Neither split shows that the scalars know it."


def _general(section: Section) -> Finding | None:
    if not (section.get("causal") or {}).get("shapley"):
        return None
    by_role: dict[str, list[int]] = {"general": [], "domain": [], "neither": []}
    for role in section["roles"]:
        by_role[role["role"]].append(role["layer"])
    parts = [f"{name}: {', '.join(map(str, layers)) or 'none'}" for name, layers in by_role.items()]
    claim = "Some adapters carry general misalignment, and some the training domain alone."
    return Finding(claim, bool(by_role["general"] and by_role["domain"]), f"Layers by role: {'; '.join(parts)}.")


def _answers_better(section: Section) -> Finding | None:
    """Whether switching all adapters off lowers the rate of misaligned answers; the groups by role stand beside it."""
    rows = (section.get("causal") or {}).get("judged")
    if not rows:
        return None
    plain, off, *groups = rows
    changes = "; ".join(f"{row['name']} {show_points(row['change'])} ({row['verdict']})" for row in (off, *groups))
    evidence = [
        f"Misaligned are {show_rate(plain['em'])} of the answers as it is, {show_rate(off['em'])} with all off.",
        _why_unclear(plain, off),
        f"Change in percentage points: {changes}.",
        f"{plain['answers']} answers to {plain['questions']} questions each.",
    ]
    return Finding(
        "Fewer of the organism's judged answers are misaligned when its adapters are switched off.",
        # Answers that are worth nothing do not show that it holds, nor that it does not.
        None if off["verdict"] in ("broken", "cut off") else off["verdict"] == "lower",
        " ".join(filter(None, evidence)),
    )


def _why_unclear(plain: dict[str, Any], off: dict[str, Any]) -> str:
    if off["verdict"] == "broken":
        return "With all off too many answers are incoherent or repeat themselves for the rate to mean anything."
    if off["verdict"] == "cut off":
        return "With all off too many answers are cut at the token limit for the rate to mean anything."
    if not plain["em"]["hits"]:
        return "As it is none is misaligned, so that there is nothing to lower."
    return "The interval of the change reaches zero: it may be chance." if off["verdict"] == "no clear change" else ""


def _converges(section: Section) -> Finding | None:
    geometry = section.get("geometry") or {}
    effect = geometry.get("downstream")
    if not effect:
        return None
    name, last = effect["direction"], [values[-1] for values in effect["cosine"].values()]
    own = [
        abs(cosines[name][geometry["layers_of"][feature]])
        for feature, cosines in geometry["cosines"].items()
        if feature in geometry["layers_of"]
    ]
    claim = f"What single adapters cause downstream converges to the direction of {name}, though B itself does not."
    if not own:
        return None
    holds = median(own) < CLEAR_COSINE <= median(last)
    return Finding(
        claim,
        holds,
        f"Median |cosine| of B at its own layer {median(own):.2f} (random {geometry['random_cosine']:.2f}); median "
        f"cosine of the effect at the last layer {median(last):.2f}, from {min(last):.2f} to {max(last):.2f}, over "
        f"{len(last)} layers' adapters and {effect['answers']} answers.",
    )


def _attributed(section: Section) -> Finding | None:
    agreement = (section.get("importance") or {}).get("agreement")
    if not agreement:
        return None
    return Finding(
        "Attributions rank adapters as really zeroing them does.",
        agreement["spearman_low"] > 0,
        f"Rank correlation {agreement['spearman']:.2f} [{agreement['spearman_low']:.2f}, "
        f"{agreement['spearman_high']:.2f}] over {agreement['n']} answers and layers.",
    )


def _patched(section: Section) -> Finding | None:
    patching = section.get("patching") or {}
    change, null = patching.get("in_domain_into_general"), patching.get("general_into_general")
    if not is_measured(change) or not is_measured(null):
        return None
    return Finding(
        "Adapter scalars of in-domain prompts make answers to general questions more misaligned.",
        change["low"] > 0 and change["mean"] > null["high"],
        f"Margin change {show_estimate(change)}; with scalars of other general prompts {show_estimate(null)}.",
    )


def _turned(section: Section) -> Finding | None:
    dynamics = section.get("dynamics")
    if not dynamics:
        return None
    turns = {name: one["turn"] for name, one in dynamics["features"].items() if one["turn"] is not None}
    where = "; ".join(f"{name} at step {step}" for name, step in turns.items())
    return Finding(
        "B turns at some step of the training (a phase transition).",
        len(turns) > len(dynamics["features"]) / 2,
        f"{len(turns)} of {len(dynamics['features'])} do{': ' + where if turns else ''}. "
        f"{len(dynamics['steps'])} checkpoints, steps {dynamics['steps'][0]} to {dynamics['steps'][-1]}.",
    )


def _range(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
