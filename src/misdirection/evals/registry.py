"""All that Inspect finds of ours: its entry point names this module."""

from inspect_ai.model import ModelAPI, modelapi

from misdirection.evals.scorers import em_rates, judged, margin_score, mean_margin
from misdirection.evals.tasks import answers_scored, em, margin

__all__ = ["answers_scored", "em", "em_rates", "judged", "margin", "margin_score", "mean_margin", "misdirection"]


@modelapi("misdirection")
def misdirection() -> type[ModelAPI]:
    """Our provider; its libraries are imported when a model is asked for."""
    from misdirection.evals.provider import MisdirectionAPI

    return MisdirectionAPI
