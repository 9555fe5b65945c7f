"""Names, and figures as JSON has them, that several fixtures of the report share."""

from typing import Any

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
