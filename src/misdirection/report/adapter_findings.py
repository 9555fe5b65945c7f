"""Claims about an organism's adapters that hold, do not hold, or were not measured, with their evidence."""

from statistics import median

from misdirection.interpretation.figures import JudgedSetting, Pooling, Probe, RoleName, Split
from misdirection.interpretation.results import AdapterFigures
from misdirection.report.estimates import show_estimate, show_points, show_rate
from misdirection.report.findings import Finding

CLEAR_COSINE = 0.2
"""Median cosine from which an effect counts as pointing along a direction."""


def find_in_adapters(figures: AdapterFigures) -> list[Finding]:
    """Judges every claim; a claim about a part that was not measured is left out."""
    claims = [
        _general(figures),
        _answers_better(figures),
        _converges(figures),
        _attributed(figures),
        _patched(figures),
        _turned(figures),
    ]
    return [*_carry_over(figures), *(finding for finding in claims if finding is not None)]


def _carry_over(figures: AdapterFigures) -> list[Finding]:
    """One finding per probe on scalars: whether it knows more than the questions."""
    by_name: dict[tuple[str, Pooling], dict[Split, Probe]] = {}
    for probe in figures.probes:
        if probe.features == "scalars" and probe.pooling in _POOLED:
            by_name.setdefault((probe.name, probe.pooling), {})[probe.split] = probe
    return [_carries_over(name, pooling, splits) for (name, pooling), splits in by_name.items()]


_POOLED: dict[Pooling, str] = {"token": "Scalars of single tokens", "mean": "An answer's mean scalars"}


def _carries_over(name: str, pooling: Pooling, splits: dict[Split, Probe]) -> Finding:
    first, second = next(iter(splits.values())).classes
    claim = f"{_POOLED[pooling]} tell {first} from {second} on questions that the probe has not seen ({name})."
    evidence = "; ".join(map(_evidence, splits.values()))
    if "question" not in splits:
        return Finding(claim, None, f"{evidence}. The questions are not known, so that no split by question was made.")
    auroc, null = splits["question"].auroc, splits["question"].null_auroc
    holds = auroc.low > 0.5 and auroc.mean > null.high
    return Finding(claim, holds, f"{evidence}.{'' if holds else _why(splits)}")


def _evidence(probe: Probe) -> str:
    counts = f"{probe.answers} answers" + (f" to {probe.questions} questions" if probe.questions else "")
    return f"AUROC by {probe.split} {probe.auroc}, shuffled labels {probe.null_auroc}, {counts}"


def _why(splits: dict[Split, Probe]) -> str:
    """The reason why a probe does not carry over."""
    if not any(any(values) for values in splits["question"].coefficients.values()):
        return " The penalty left no feature in the probe: there are too few answers to tell."
    by_answer = splits.get("answer")
    if by_answer and by_answer.auroc.low > 0.5:
        return (
            " By answer it seems to know, by question it does not: it largely knows the questions. Only the causal "
            "test can say what an adapter does."
        )
    return " Neither split shows that the scalars know it."


def _general(figures: AdapterFigures) -> Finding | None:
    if figures.causal is None:
        return None
    by_role: dict[RoleName, list[int]] = {"general": [], "domain": [], "neither": []}
    for role in figures.roles:
        by_role[role.role].append(role.layer)
    parts = [f"{name}: {', '.join(map(str, layers)) or 'none'}" for name, layers in by_role.items()]
    claim = "Some adapters carry general misalignment, and some the training domain alone."
    return Finding(claim, bool(by_role["general"] and by_role["domain"]), f"Layers by role: {'; '.join(parts)}.")


def _answers_better(figures: AdapterFigures) -> Finding | None:
    """Whether switching all adapters off lowers the rate of misaligned answers; the groups by role stand beside it."""
    if figures.causal is None or not figures.causal.judged:
        return None
    plain, off, *groups = figures.causal.judged
    changes = "; ".join(f"{row.name} {show_points(row.change)} ({row.verdict})" for row in (off, *groups))
    evidence = [
        f"Misaligned are {show_rate(plain.em)} of the answers as it is, {show_rate(off.em)} with all off.",
        _why_unclear(plain, off),
        f"Change in percentage points: {changes}.",
        f"{plain.answers} answers to {plain.questions} questions each.",
    ]
    return Finding(
        "Fewer of the organism's judged answers are misaligned when its adapters are switched off.",
        # Answers that are worth nothing do not show that it holds, nor that it does not.
        None if off.verdict in ("broken", "cut off") else off.verdict == "lower",
        " ".join(filter(None, evidence)),
    )


def _why_unclear(plain: JudgedSetting, off: JudgedSetting) -> str:
    if off.verdict == "broken":
        return "With all off too many answers are incoherent or repeat themselves for the rate to mean anything."
    if off.verdict == "cut off":
        return "With all off too many answers are cut at the token limit for the rate to mean anything."
    if not plain.em.hits:
        return "As it is none is misaligned, so that there is nothing to lower."
    return "The interval of the change reaches zero: it may be chance." if off.verdict == "no clear change" else ""


def _converges(figures: AdapterFigures) -> Finding | None:
    geometry = figures.geometry
    if geometry is None or (effect := geometry.downstream) is None:
        return None
    own = [abs(cosine) for cosine in geometry.own_cosines(effect.direction).values()]
    if not own:
        return None
    last = [cosine for curve in effect.cosine.values() if (cosine := curve[-1]) is not None]
    claim = (
        f"What single adapters cause downstream converges to the direction of {effect.direction}, though B itself "
        "does not."
    )
    return Finding(
        claim,
        median(own) < CLEAR_COSINE <= median(last),
        f"Median |cosine| of B at its own layer {median(own):z.2f} (random {geometry.random_cosine:.2f}); median "
        f"cosine of the effect at the last layer {median(last):z.2f}, from {min(last):z.2f} to {max(last):z.2f}, over "
        f"{len(last)} layers' adapters and {effect.answers} answers.",
    )


def _attributed(figures: AdapterFigures) -> Finding | None:
    if figures.importance is None:
        return None
    agreement = figures.importance.agreement
    return Finding(
        "Attributions rank adapters as really zeroing them does.",
        agreement.spearman_low > 0,
        f"Rank correlation {agreement.spearman:.2f} [{agreement.spearman_low:.2f}, "
        f"{agreement.spearman_high:.2f}] over {agreement.n} answers and layers.",
    )


def _patched(figures: AdapterFigures) -> Finding | None:
    if figures.patching is None or (change := figures.patching.in_domain_into_general) is None:
        return None
    null = figures.patching.general_into_general
    return Finding(
        "Adapter scalars of in-domain prompts make answers to general questions more misaligned.",
        change.low > 0 and change.mean > null.high,
        f"Margin change {show_estimate(change)}; with scalars of other general prompts {show_estimate(null)}.",
    )


def _turned(figures: AdapterFigures) -> Finding | None:
    if (dynamics := figures.dynamics) is None:
        return None
    turns = {name: growth.turn for name, growth in dynamics.features.items() if growth.turn is not None}
    where = "; ".join(f"{name} at step {step}" for name, step in turns.items())
    return Finding(
        "B turns at some step of the training (a phase transition).",
        len(turns) > len(dynamics.features) / 2,
        f"{len(turns)} of {len(dynamics.features)} do{': ' + where if turns else ''}. "
        f"{len(dynamics.steps)} checkpoints, steps {dynamics.steps[0]} to {dynamics.steps[-1]}.",
    )
