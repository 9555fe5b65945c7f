"""A figure with its interval, and a share of answers with one: what all results are made of."""

from dataclasses import asdict, dataclass

LEVEL, SIGNIFICANT = 0.95, 0.05
"""The level of every interval, and what the p-value of a claim that counts is below."""

Z_SIGNIFICANT, Z_POWER = 1.96, 0.84
"""Quantiles of the normal distribution: of a two-sided test at 5%, and of a power of 80%."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval (percentile bootstrap over questions).

    Attributes:
        mean, low, high: in the unit of the values.
        n: number of questions.
        p: two-sided p-value of the mean being zero, by the same draws; None where it was not asked for.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.interval}, n={self.n}"

    @property
    def interval(self) -> str:
        """Mean and bounds in words, with their signs; what rounds to zero has no minus."""
        return f"{self.mean:+z.3f} [{self.low:+z.3f}, {self.high:+z.3f}]"

    @property
    def detectable(self) -> float:
        """The mean that as many questions show four times in five, at 5%: 2.8 standard errors, read off the 95%
        interval."""
        return (Z_SIGNIFICANT + Z_POWER) * (self.high - self.low) / (2 * Z_SIGNIFICANT)

    def as_dict(self) -> dict[str, float | int | None]:
        """As it stands in `results.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Rate:
    """A share of answers with its 95% interval.

    Attributes:
        rate, low, high: between 0 and 1.
        hits, total: numbers of answers; `rate` is their quotient.
    """

    rate: float
    low: float
    high: float
    hits: int
    total: int
