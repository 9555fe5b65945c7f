"""Who judges answers, as a configuration says it."""

from pydantic import Field

from misdirection.settings import Section


class JudgeConfig(Section):
    """Who judges the answers; the key comes from the environment only."""

    model: str
    """A model of the endpoint, or `hf:ID` for a local one."""
    base_url: str | None = None
    rubrics: tuple[str, ...] = ("alignment", "coherence")
    logprobs: bool = True
    samples: int = Field(5, ge=1)
    """Replies that are averaged where the endpoint gives no log-probabilities."""
    timeout: float = Field(60.0, gt=0)
    concurrency: int = Field(16, ge=1)
    max_calls: int | None = Field(None, ge=0)
    """For each model under each condition."""
    min_judged: float = Field(0.8, ge=0, le=1)
    """Smallest share of a model's answers that must have a verdict."""
