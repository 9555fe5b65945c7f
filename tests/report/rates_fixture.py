"""Figures of judged answers under interventions, of directions of judged answers, and of themes, as typed results."""

from misdirection.directions.direction import Directions
from misdirection.experiment.judged_results import (
    JudgedAnswers,
    JudgedConvergence,
    JudgedDirections,
    RatedAblation,
    RatedSteering,
    ThemeDirection,
    ThemeEffect,
    ThemeFigures,
)
from misdirection.statistics.estimates import Estimate, Rate
from results_fixture import CONTROL, MONEY, SPORTS
from results_fixture import rate as rate_values
from run_fixture import curve, pair_cosines, per_organism

ANSWERS = 400
THEMES = ("medical", "<b>financial</b>")


def rate(share):
    return Rate(**rate_values(round(share * ANSWERS), ANSWERS, 0.04))


def change(points):
    return Estimate(points, points - 0.05, points + 0.05, 8, 0.001)


def rated(before, after, coherent, **where):
    return {
        "direction": MONEY,
        "positions": "not_first",
        "before": rate(before),
        "em": rate(after),
        "coherent": rate(coherent),
        "change": change(after - before),
        "verdict": "higher" if after > before + 0.05 else "no clear change",
        "random_em": rate(before + 0.01),
        "random_coherent": rate(0.97),
        "random_change": change(0.01),
        **where,
    }


def em_steering():
    """Doubled from 1; at the middle layers coherence falls under half."""
    rows = []
    for layer in (6, 12, 18, 24):
        for scale in (1.0, 2.0, 4.0, 8.0):
            coherent = max(0.1, 0.99 - 0.01 * scale**2 * (1 if layer in (12, 18) else 0.3))
            em = 0.003 * scale * layer / 6 * coherent
            best = (layer, scale) == (24, 8.0)
            rows.append(RatedSteering(**rated(0.0, em, coherent, target="base", layer=layer), scale=scale, best=best))
    return rows


def em_ablation():
    before = {"base": 0.0, MONEY: 0.33, SPORTS: 0.21, CONTROL: 0.0}
    return [
        RatedAblation(
            **rated(before[target], before[target] / 8, 0.96, target=target, layer=18) | {"direction": direction},
            against_base=None if target == "base" else change(before[target] / 8),
        )
        for target in before
        for direction in (MONEY, SPORTS)
    ]


def answers(pairs, lacking=None):
    return JudgedAnswers(misaligned=2 * pairs, aligned=300, pairs=pairs, questions=6, lacking=lacking)


def judged_directions():
    kinds = Directions.kinds()
    return JudgedDirections(
        answers={
            MONEY: answers(60),
            SPORTS: answers(40),
            CONTROL: answers(2, "2 answers of each class to the same questions: it has the direction of given answers"),
        },
        convergence=JudgedConvergence(
            cosine=pair_cosines(0.8),
            given=per_organism(0.3),
            base_null=per_organism(0.9),
            base_pair_null=pair_cosines(0.75),
            shuffled_null=per_organism(0.1),
            split_half=per_organism(0.93),
        ),
        variants={
            name: {a: {b: curve(1.0 if a == b else 0.2 * place) for place, b in enumerate(kinds)} for a in kinds}
            for name in (MONEY, SPORTS)
        },
    )


def theme_effect(direction, em, **about):
    shares = {THEMES[0]: about.get("medical", 0.02), THEMES[1]: about.get("financial", 0.1)}
    changed = {theme: change(share - {THEMES[0]: 0.02, THEMES[1]: 0.1}[theme]) for theme, share in shares.items()}
    return ThemeEffect(
        direction=direction,
        em=rate(em),
        coherent=rate(0.95),
        about={theme: rate(share) for theme, share in shares.items()},
        em_about={theme: rate(em * share) for theme, share in shares.items()},
        change={} if direction == "none" else changed,
    )


def themes():
    medical, financial = THEMES
    return ThemeFigures(
        organism=MONEY,
        layer=18,
        scale=4.0,
        norm=12.3456,
        above=50.0,
        answers={medical: answers(25), financial: answers(31)},
        directions={
            "shared": ThemeDirection(kept=1.0, cosine=1.0),
            medical: ThemeDirection(kept=1.0, cosine=0.7),
            f"{medical} without the shared one": ThemeDirection(kept=0.71, cosine=0.0),
        },
        cosine={medical: {medical: curve(1.0)}},
        effects=[
            theme_effect("none", 0.0),
            theme_effect("shared", 0.3, medical=0.1, financial=0.3),
            theme_effect(medical, 0.25, medical=0.5),
            theme_effect(financial, 0.28, financial=0.6),
            theme_effect(f"{medical} without the shared one", 0.05, medical=0.4),
            theme_effect("shared without the themes", 0.12),
            theme_effect("random", 0.01),
        ],
    )


def rated_parts():
    """All of them, as parts of a run's results."""
    return {
        "em_steering": em_steering(),
        "em_ablation": em_ablation(),
        "judged_directions": judged_directions(),
        "themes": themes(),
    }
