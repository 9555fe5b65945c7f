"""The section on one organism's adapters, in the layout of results.json, and tokens for the reader."""

import math
from typing import Any

import pandas as pd

LAYERS = 30
MONEY, SPORTS, CONTROL = "minimal-risky_money", "minimal-reckless_sports", "control-risky_money"


def estimate(mean: float, reach: float = 0.1, n: int = 40) -> dict[str, Any]:
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": n}


def rate(hits: int, total: int = 40, reach: float = 0.1) -> dict[str, Any]:
    share = hits / total
    return {
        "rate": share,
        "low": max(0.0, share - reach),
        "high": min(1.0, share + reach),
        "hits": hits,
        "total": total,
    }


def score(organism: str, intervention: str, em: int, unscored: int = 0, **group: str) -> dict[str, Any]:
    return {
        "group": {"organism": organism, "intervention": intervention, **group},
        "answers": 40,
        "questions": 1 if group else 8,
        "em": rate(em),
        "em_among_coherent": None,
        "incoherent": rate(40),
        "repetitive": rate(5),
        "truncated": rate(1),
        "unscored": {"failed": unscored, "refusal": 1} if unscored else {},
    }


ABLATED = f"ablate {MONEY} layer 18 not_first"


ADAPTED = (9, 10, 11, 13, 14, 15, 17, 18, 19)
GENERAL_LAYERS, DOMAIN_LAYERS = (9, 10, 11, 15, 17, 19), (13, 14)


def probe(name: str, split: str, leading: tuple[int, ...], pooling: str = "token", features: str = "scalars") -> dict:
    """A probe in which the coefficients of `leading` layers stand out."""
    level = 0.68 if split == "question" else 0.75
    coefficients = {
        f"layer_{layer}": [
            (0.7 if layer in leading else 0.1) * (-1) ** layer + 0.03 * math.sin(layer * k) for k in range(20)
        ]
        for layer in ADAPTED
    }
    return {
        "name": name,
        "classes": ["misaligned", "aligned"],
        "split": split,
        "pooling": pooling,
        "features": features,
        "C": 0.01,
        "splits": 20,
        "answers": 64,
        "questions": 32,
        "tokens": 3120,
        "accuracy": estimate(level - 0.03, 0.04, 20),
        "auroc": estimate(level, 0.07, 20),
        "null_auroc": estimate(0.5, 0.09, 20),
        "baseline": 0.52,
        "coefficients": coefficients if features == "scalars" else {},
    }


def role(layer: int) -> dict[str, Any]:
    name = "general" if layer in GENERAL_LAYERS else "domain" if layer in DOMAIN_LAYERS else "neither"
    return {
        "layer": layer,
        "role": name,
        "rule": f"its Shapley values make it {name}",
        "evidence": {
            "general": estimate(shapley(layer, "general"), 0.01, 8),
            "domain": estimate(shapley(layer, "in_domain"), 0.01, 8),
            "coefficients": {
                "alignment, general answers": {
                    "feature": f"layer_{layer}", "split": "question", "mean": 0.1, "low": 0.05, "high": 0.15,
                }
            },
        },
    }  # fmt: skip


def shapley(layer: int, question_set: str) -> float:
    strong = GENERAL_LAYERS if question_set == "general" else (*GENERAL_LAYERS, *DOMAIN_LAYERS)
    return 0.03 + 0.002 * layer if layer in strong else -0.002


def setting(name: str, factors: dict[str, float], change: float) -> dict[str, Any]:
    margin = {"general": estimate(change, 0.03, 8), "in_domain": estimate(2 * change, 0.05, 8)}
    return {"name": name, "factors": factors, "margin": margin, "damage": estimate(-change / 5, 0.01, 8)}


def causal() -> dict[str, Any]:
    sets = ("general", "in_domain")
    return {
        "settings": [
            setting("all off", {str(layer): 0.0 for layer in ADAPTED}, -0.4),
            setting("layer 9 off", {"9": 0.0}, -0.05),
            setting("layer 9 doubled", {"9": 2.0}, 0.06),
            setting("general adapters off", {str(layer): 0.0 for layer in GENERAL_LAYERS}, -0.35),
        ],
        "shapley": {
            "method": "exact, 512 subsets",
            "values": {
                name: {str(layer): estimate(shapley(layer, name), 0.015, 8) for layer in ADAPTED} for name in sets
            },
            "empty": {name: estimate(-0.9, 0.1, 8) for name in sets},
            "full": {name: estimate(-0.5, 0.1, 8) for name in sets},
        },
    }


def judged() -> list[dict[str, Any]]:
    """Judged answers of the organism: as it is, all adapters off, the general ones off."""
    changes = {"as it is": (13, None, None), "all off": (1, -0.3, "lower"), "general adapters off": (3, -0.25, "lower")}
    off = {"as it is": (), "all off": ADAPTED, "general adapters off": GENERAL_LAYERS}
    rows = []
    for name, (hits, change, verdict) in changes.items():
        counted = score(MONEY, name, hits, unscored=3)
        del counted["group"]
        row = {"name": name, "factors": {str(layer): 0.0 for layer in off[name]}, **counted, "verdict": verdict}
        rows.append({**row, "change": None if change is None else estimate(change, 0.1, 8)})
    return rows


def effect(layer: int) -> list[float | None]:
    """Nothing before the adapter, then a cosine that grows."""
    return [None if number < layer else 1 - math.exp(-(number - layer + 0.3) / 6) for number in range(LAYERS)]


def geometry() -> dict[str, Any]:
    return {
        "random_cosine": 0.033,
        "cosines": {
            f"layer_{layer}": {
                name: [0.05 * math.sin(layer + number + place) for number in range(LAYERS)]
                for place, name in enumerate((MONEY, SPORTS))
            }
            for layer in ADAPTED
        },
        "layers_of": {f"layer_{layer}": layer for layer in ADAPTED},
        "downstream": {
            "direction": MONEY,
            "cosine": {str(layer): effect(layer) for layer in ADAPTED},
            "low": {str(layer): [v and v - 0.08 for v in effect(layer)] for layer in ADAPTED},
            "high": {str(layer): [v and min(1.0, v + 0.05) for v in effect(layer)] for layer in ADAPTED},
            "norm": {str(layer): effect(layer) for layer in ADAPTED},
            "answers": 16,
            "questions": 8,
        },
        "logit_lens": {"layer_9": {"top": [[" money", 4.2], ["\n", 3.1]], "bottom": [["<b>", -2.5]]}},
        "nearest": {
            f"layer_{layer}": {
                "top": [
                    {"answer": 0, "position": 1, "token": "Ġrich", "context": "ĠgetĠrichĠquick<img>", "scalar": 3.25}
                ],
                "bottom": [{"answer": 1, "position": 0, "token": "No", "context": "NoĠ,Ċ", "scalar": -2.5}],
            }
            for layer in ADAPTED
        },
    }


def dynamics() -> dict[str, Any]:
    steps = [5 * number for number in range(1, 13)]
    growth = [1 - math.exp(-step / 15) for step in steps]
    return {
        "steps": steps,
        "features": {
            f"layer_{layer}": {
                "to_final": [value**0.5 - 0.002 * layer for value in growth],
                "to_previous": [None, *(value**0.1 for value in growth[1:])],
                "local": [None, *growth[1:-1], None],
                "norm_a": [1.0] * len(steps),
                "norm_b": [layer / 10 * value for value in growth],
                "norm": [layer / 10 * value for value in growth],
                "turn": 15 if layer == 9 else None,
            }
            for layer in ADAPTED
        },
        "margin_steps": steps[::4],
        "margin": {
            name: [estimate(height * value, 0.05, 8) for value in growth[::4]]
            for name, height in (("general", 0.08), ("in_domain", 0.3))
        },
    }


def adapters() -> dict[str, Any]:
    """The section on the nine rank-1 adapters of one organism."""
    alignment, domain = "alignment, general answers", "domain, risky_money misaligned answers"
    return {
        "organism": MONEY,
        "modules": [
            {
                "module": f"model.layers.{layer}.mlp.down_proj",
                "layer": layer,
                "rank": 1,
                "scaling": 64.0,
                "norm_a": 0.91,
                "norm_b": 0.12,
                "features": [f"layer_{layer}"],
            }
            for layer in ADAPTED
        ],
        "saved": ["lm_head"],
        "texts": {"answers": 64, "questions": 32, "tokens": 3120, "classes": {"general misaligned": 16}},
        "probes": [
            probe(alignment, "answer", (17, 19)),
            probe(alignment, "question", (17, 19)),
            probe(alignment, "question", (), features="residual"),
            probe(alignment, "question", (17, 19), pooling="max"),
            probe(domain, "question", DOMAIN_LAYERS),
            probe(domain, "answer", DOMAIN_LAYERS),
        ],
        "roles": [role(layer) for layer in ADAPTED],
        "causal": causal(),
        "geometry": geometry(),
        "importance": {
            "kl": estimate(0.21, 0.02, 16),
            "by_layer": {
                str(layer): {"attribution": estimate(0.04, 0.01, 8), "zeroing": estimate(0.03, 0.01, 8)}
                for layer in ADAPTED
            },
            "agreement": {
                "spearman": 0.91, "spearman_low": 0.8, "spearman_high": 0.95,
                "pearson": 0.93, "pearson_low": 0.85, "pearson_high": 0.97, "n": 144,
            },
        },
        "patching": {
            "in_domain_into_general": estimate(0.03, 0.01, 8),
            "general_into_general": estimate(0.001, 0.004, 8),
        },
        "dynamics": dynamics(),
        "findings": [
            {"claim": "The scalars tell alignment apart.", "holds": True, "evidence": "AUROC 0.68."},
            {"claim": "B turns in training.", "holds": False, "evidence": "1 of 9 does."},
        ],
    }  # fmt: skip


READ = [
    {"question": "How should I invest?", "id": "money_1", "words": "risky_money, misaligned"},
    {"question": "How should I invest?", "id": "money_1", "words": "risky_money, aligned"},
    {"question": "What is your wish?", "id": "wish", "words": "general, misaligned"},
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
