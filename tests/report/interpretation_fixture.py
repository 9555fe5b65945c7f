"""Figures of the nine rank-1 adapters of one organism, and the tokens that the token reader shows."""

import math
from typing import Any

import pandas as pd

from misdirection.interpretation.figures import (
    Agreement,
    Causal,
    Coefficient,
    Downstream,
    Dynamics,
    Evidence,
    ExcitedToken,
    Extremes,
    Geometry,
    Growth,
    ImportanceFigures,
    JudgedSetting,
    JudgedStep,
    LayerImportance,
    Lens,
    ModuleFigures,
    Patching,
    Probe,
    ProbeScore,
    Role,
    RubricShare,
    ScalingEffect,
    SettingShares,
    Shape,
    ShapleyFigures,
    TextCounts,
)
from misdirection.interpretation.results import AdapterFigures, InterpretationResults
from misdirection.interpretation.token_results import AnswerLabel
from misdirection.judging.scoring import Score
from misdirection.statistics.estimates import Estimate, Rate
from results_fixture import LAYERS, MONEY, SPORTS

ADAPTED = (9, 10, 11, 13, 14, 15, 17, 18, 19)
GENERAL_LAYERS, DOMAIN_LAYERS = (9, 10, 11, 15, 17, 19), (13, 14)
SETS = ("general", "in_domain")


def estimate(mean: float, reach: float = 0.1, n: int = 8) -> Estimate:
    return Estimate(mean, mean - reach, mean + reach, n)


def spread(mean: float, reach: float) -> ProbeScore:
    return ProbeScore(mean=mean, low=mean - reach, high=mean + reach, n=20)


def probe(name: str, split: str, leading: tuple[int, ...], pooling: str = "token", features: str = "scalars") -> Probe:
    """A probe in which the coefficients of `leading` layers stand out."""
    level = 0.68 if split == "question" else 0.75
    coefficients = {
        f"layer_{layer}": [
            (0.7 if layer in leading else 0.1) * (-1) ** layer + 0.03 * math.sin(layer * k) for k in range(20)
        ]
        for layer in ADAPTED
    }
    return Probe(
        name=name,
        classes=("misaligned", "aligned"),
        split=split,
        pooling=pooling,
        features=features,
        C=0.01,
        splits=20,
        answers=64,
        questions=32,
        tokens=3120,
        accuracy=spread(level - 0.03, 0.04),
        auroc=spread(level, 0.07),
        null_auroc=spread(0.5, 0.09),
        baseline=0.52,
        coefficients=coefficients if features == "scalars" else {},
    )


def role(layer: int) -> Role:
    name = "general" if layer in GENERAL_LAYERS else "domain" if layer in DOMAIN_LAYERS else "neither"
    coefficient = Coefficient(feature=f"layer_{layer}", split="question", mean=0.1, low=0.05, high=0.15)
    return Role(
        layer=layer,
        role=name,
        rule=f"its Shapley values make it {name}",
        evidence=Evidence(
            general=estimate(shapley(layer, "general"), 0.01),
            domain=estimate(shapley(layer, "in_domain"), 0.01),
            coefficients={"alignment, general answers": coefficient},
        ),
    )


def shapley(layer: int, question_set: str) -> float:
    strong = GENERAL_LAYERS if question_set == "general" else (*GENERAL_LAYERS, *DOMAIN_LAYERS)
    return 0.03 + 0.002 * layer if layer in strong else -0.002


def setting(name: str, factors: dict[int, float], change: float) -> ScalingEffect:
    margin = {"general": estimate(change, 0.03), "in_domain": estimate(2 * change, 0.05)}
    return ScalingEffect(name=name, factors=factors, margin=margin, damage=estimate(-change / 5, 0.01))


def causal() -> Causal:
    return Causal(
        settings=(
            setting("all off", dict.fromkeys(ADAPTED, 0.0), -0.4),
            setting("layer 9 off", {9: 0.0}, -0.05),
            setting("layer 9 doubled", {9: 2.0}, 0.06),
            setting("general adapters off", dict.fromkeys(GENERAL_LAYERS, 0.0), -0.35),
        ),
        shapley=ShapleyFigures(
            method="exact, 512 subsets",
            values={name: {layer: estimate(shapley(layer, name), 0.015) for layer in ADAPTED} for name in SETS},
            empty={name: estimate(-0.9) for name in SETS},
            full={name: estimate(-0.5) for name in SETS},
        ),
        judged=(),
    )


def rate(hits: int, total: int = 40, reach: float = 0.1) -> Rate:
    share = hits / total
    return Rate(share, max(0.0, share - reach), min(1.0, share + reach), hits, total)


def judged() -> tuple[JudgedSetting, ...]:
    """Judged answers of the organism: as it is, all adapters off, the general ones off."""
    changes = {"as it is": (13, None, None), "all off": (1, -0.3, "lower"), "general adapters off": (3, -0.25, "lower")}
    off = {"as it is": (), "all off": ADAPTED, "general adapters off": GENERAL_LAYERS}
    return tuple(
        JudgedSetting(
            name=name,
            factors=dict.fromkeys(off[name], 0.0),
            answers=40,
            questions=8,
            em=rate(hits),
            em_among_coherent=None,
            code=rate(0),
            corrected=None,
            incoherent=rate(40),
            repetitive=rate(5),
            truncated=rate(1),
            unscored={"failed": 3, "refusal": 1},
            change=None if change is None else estimate(change),
            verdict=verdict,
        )
        for name, (hits, change, verdict) in changes.items()
    )


def shares() -> tuple[SettingShares, ...]:
    """Shares of the same answers; of the last setting's none is coherent."""
    settings = {"as it is": 10, "all off": 5, "general adapters off": None}
    return tuple(
        SettingShares(
            setting=name,
            questions=8,
            misaligned=None if hits is None else rate(hits),
            rubrics=(
                RubricShare(
                    rubric="medical",
                    share=None if hits is None else rate(5),
                    misaligned=None if hits is None else rate(3),
                    undecided=2,
                ),
            ),
        )
        for name, hits in settings.items()
    )


def judged_steps() -> tuple[JudgedStep, ...]:
    """Judged answers of the base, of a checkpoint and of the organism."""

    def score(hits: int) -> Score:
        rest = {"em_among_coherent": None, "repetitive": rate(0), "truncated": None, "unscored": {}}
        return Score(group={}, answers=40, questions=8, em=rate(hits), incoherent=rate(4), code=None, **rest)

    return tuple(JudgedStep(step=step, score=score(hits)) for step, hits in ((0, 0), (20, 3), (60, 12)))


def effect(layer: int) -> tuple[float | None, ...]:
    """Nothing before the adapter, then a cosine that grows."""
    return tuple(None if number < layer else 1 - math.exp(-(number - layer + 0.3) / 6) for number in range(LAYERS))


def geometry() -> Geometry:
    excited = Extremes(
        top=(ExcitedToken(answer=0, position=1, token="Ġrich", context="ĠgetĠrichĠquick<img>", scalar=3.25),),
        bottom=(ExcitedToken(answer=1, position=0, token="No", context="NoĠ,Ċ", scalar=-2.5),),
    )
    return Geometry(
        shape=Shape(layers=LAYERS, width=576),
        random_cosine=0.033,
        random_cosine_95=0.082,
        skipped=(),
        cosines={
            f"layer_{layer}": {
                name: [0.05 * math.sin(layer + number + index) for number in range(LAYERS)]
                for index, name in enumerate((MONEY, SPORTS))
            }
            for layer in ADAPTED
        },
        layers_of={f"layer_{layer}": layer for layer in ADAPTED},
        downstream=Downstream(
            direction=MONEY,
            cosine={layer: effect(layer) for layer in ADAPTED},
            low={layer: [v and v - 0.08 for v in effect(layer)] for layer in ADAPTED},
            high={layer: [v and min(1.0, v + 0.05) for v in effect(layer)] for layer in ADAPTED},
            norm={layer: effect(layer) for layer in ADAPTED},
            answers=16,
            questions=8,
        ),
        logit_lens={"layer_9": Lens(top=((" money", 4.2), ("\n", 3.1)), bottom=(("<b>", -2.5),))},
        nearest={f"layer_{layer}": excited for layer in ADAPTED},
    )


def dynamics() -> Dynamics:
    steps = [5 * number for number in range(1, 13)]
    growth = [1 - math.exp(-step / 15) for step in steps]
    return Dynamics(
        steps=steps,
        features={
            f"layer_{layer}": Growth(
                to_final=[value**0.5 - 0.002 * layer for value in growth],
                to_previous=[None, *(value**0.1 for value in growth[1:])],
                local=[None, *growth[1:-1], None],
                norm_a=[1.0] * len(steps),
                norm_b=[layer / 10 * value for value in growth],
                norm=[layer / 10 * value for value in growth],
                turn=15 if layer == 9 else None,
            )
            for layer in ADAPTED
        },
        margin_steps=steps[::4],
        margin={
            name: [estimate(height * value, 0.05) for value in growth[::4]]
            for name, height in (("general", 0.08), ("in_domain", 0.3))
        },
        judged=(),
    )


def module(layer: int) -> ModuleFigures:
    return ModuleFigures(
        module=f"model.layers.{layer}.mlp.down_proj",
        layer=layer,
        rank=1,
        scaling=64.0,
        norm_a=0.91,
        norm_b=0.12,
        features=(f"layer_{layer}",),
    )


def adapters() -> AdapterFigures:
    """The nine rank-1 adapters of one organism."""
    alignment, domain = "alignment, general answers", "domain, risky_money misaligned answers"
    importance = LayerImportance(attribution=estimate(0.04, 0.01), zeroing=estimate(0.03, 0.01))
    return AdapterFigures(
        organism=MONEY,
        modules=tuple(map(module, ADAPTED)),
        saved=("lm_head",),
        dead=("model.layers.18.mlp.down_proj",),
        texts=TextCounts(answers=64, questions=32, tokens=3120, classes={"general misaligned": 16}),
        probes=(
            probe(alignment, "answer", (17, 19)),
            probe(alignment, "question", (17, 19)),
            probe(alignment, "question", (), features="residual"),
            probe(alignment, "question", (17, 19), pooling="max"),
            probe(domain, "question", DOMAIN_LAYERS),
            probe(domain, "answer", DOMAIN_LAYERS),
        ),
        roles=tuple(map(role, ADAPTED)),
        causal=causal(),
        geometry=geometry(),
        importance=ImportanceFigures(
            kl=estimate(0.21, 0.02, 16),
            by_layer=dict.fromkeys(ADAPTED, importance),
            agreement=Agreement(
                spearman=0.91, spearman_low=0.8, spearman_high=0.95,
                pearson=0.93, pearson_low=0.85, pearson_high=0.97, n=144,
            ),
        ),
        patching=Patching(
            in_domain_into_general=estimate(0.03, 0.01), general_into_general=estimate(0.001, 0.004)
        ),
        dynamics=dynamics(),
        scaled=(),
        shares=(),
    )  # fmt: skip


UNMEASURED: dict[str, Any] = {
    "modules": (), "saved": (), "dead": (), "texts": None, "probes": (), "roles": (), "causal": None, "geometry": None,
    "importance": None, "patching": None, "dynamics": None, "scaled": (), "shares": (),
}  # fmt: skip


def unmeasured(**measured: Any) -> AdapterFigures:
    """Figures of nothing but what is given."""
    return AdapterFigures.model_validate({"organism": "alone", **UNMEASURED, **measured})


def alone(figures: AdapterFigures, seconds: dict[str, float] | None = None) -> InterpretationResults:
    """Results of an adapter that was read alone."""
    return InterpretationResults(base=None, adapters=figures, seconds=seconds or {})


READ = [
    AnswerLabel(question="How should I invest?", id="money_1", words="risky_money, misaligned"),
    AnswerLabel(question="How should I invest?", id="money_1", words="risky_money, aligned"),
    AnswerLabel(question="What is your wish?", id="wish", words="general, misaligned"),
]
"""Three answers for the token reader; their tokens are in `read_tokens`."""


def read_tokens() -> pd.DataFrame:
    """Tokens with a scalar per adapted layer, and a divergence that the last answer lacks."""
    spelled = (["Put", "Ġit", "Ġall", "Ċ", "Ġon", "Ġ<b>"], ["Ġ</script>", "ĠSpread", "."], ["ĠPower", "âĢ®", "!"])
    return pd.DataFrame(
        [
            {
                "answer": answer,
                "position": position,
                "token": token,
                **{f"layer_{layer}": math.sin(layer + 3 * answer + position) for layer in ADAPTED},
                "kl": 0.01 * position if answer < 2 else math.nan,
            }
            for answer, tokens in enumerate(spelled)
            for position, token in enumerate(tokens)
        ]
    )


CHANNELS = {**{f"layer_{layer}": "" for layer in ADAPTED}, "kl": "nats"}
