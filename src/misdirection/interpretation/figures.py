"""What each part of a reading found in an organism's adapters, typed.

What is by layer or by feature stands in the order of the layers, whatever order a file has it in. A *feature* is the
short name of one component of an adapted module, such as `layer_15`.
"""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator

from misdirection.judging.correction import Corrected
from misdirection.judging.scoring import Change, Score
from misdirection.results import Figures
from misdirection.statistics.estimates import Estimate, Rate

T = TypeVar("T")

_FEATURE = re.compile(r"layer_(\d+)(.*)")


def _in_layer_order(by_layer: dict[int, T]) -> dict[int, T]:
    return dict(sorted(by_layer.items()))


def _in_feature_order(by_feature: dict[str, T]) -> dict[str, T]:
    return dict(sorted(by_feature.items(), key=lambda item: _position(item[0])))


def _position(feature: str) -> tuple[bool, int, str]:
    """Features of a block by its number, then what is outside of the blocks."""
    match = _FEATURE.fullmatch(feature)
    return (False, int(match[1]), match[2]) if match else (True, 0, feature)


ByLayer = Annotated[dict[int, T], AfterValidator(_in_layer_order)]
"""By decoder block, 0-based, in order."""

ByFeature = Annotated[dict[str, T], AfterValidator(_in_feature_order)]
"""By feature, in the order of the layers."""

BySet = dict[str, T]
"""By question set: `general`, and `in_domain` where the training domain has pairs."""

Curve = tuple[float | None, ...]
"""One value per layer of the model, or per step; None where it is not defined."""

RoleName = Literal["general", "domain", "neither"]
Split = Literal["question", "answer"]
Pooling = Literal["token", "max", "mean"]
ScaledAlignment = Literal["misaligned", "between", "aligned"]


# --- what is read ---------------------------------------------------------------------------------------------------


class ModuleFigures(Figures):
    """One adapted module."""

    module: str
    """Its path in the base model."""
    layer: int | None
    """Its decoder block; None outside of the blocks."""
    rank: int
    scaling: float
    norm_a: float
    norm_b: float
    features: tuple[str, ...]
    """Its components' names."""


class TextCounts(Figures):
    """Sizes of the texts that the adapters were read on."""

    answers: int
    questions: int
    tokens: int
    classes: dict[str, int]
    """Answers by domain and alignment."""


# --- probes and roles -----------------------------------------------------------------------------------------------


class Spread(Figures):
    """Mean over the random splits of a probe, with the 2.5th and 97.5th percentile of the splits.

    It is the spread of the splits, not an interval over new questions.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """As `mean [low, high]`; without the z, a coefficient just below zero reads -0.00."""
        return f"{self.mean:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


class ProbeScore(Spread):
    """Spread of a score on the test parts."""

    n: int
    """Number of splits."""


class Probe(Figures):
    """How well features tell two classes apart."""

    name: str
    """The two classes in words, for a table."""
    classes: tuple[str, str]
    """The class that a positive coefficient speaks for, and the other one."""
    split: Split
    """The unit that is never divided between the training and the test part."""
    pooling: Pooling
    """`token`, a row per token; `max` or `mean`, a row per answer."""
    features: str
    """`scalars`, or `residual` for a whole activation."""
    C: float
    """Inverse strength of the L1 penalty, per token (see `fit_probe`)."""
    splits: int
    answers: int
    questions: int
    """0 where they are not known."""
    tokens: int
    """Before pooling."""
    accuracy: ProbeScore
    """On the test parts."""
    auroc: ProbeScore
    null_auroc: ProbeScore
    """With the labels shuffled for each split."""
    baseline: float
    """Share of the larger class among the rows, which guessing it would reach."""
    coefficients: ByFeature[tuple[float, ...]]
    """Of each z-scored feature, one value per split; empty for `residual`."""

    @property
    def is_on_token_scalars(self) -> bool:
        """Whether its rows are the scalars of single tokens."""
        return self.features == "scalars" and self.pooling == "token"


class Coefficient(Spread):
    """A probe's coefficient of one feature."""

    feature: str
    split: Split

    @property
    def keeps_its_sign(self) -> bool:
        """Whether 0 is outside of the middle 95%."""
        return self.low > 0 or self.high < 0


class Evidence(Figures):
    """Figures that a layer's role rests on, or stands beside."""

    general: Estimate | None
    """Shapley value for the general margin, nats/token; None where none was measured."""
    domain: Estimate | None
    """Likewise for the in-domain margin."""
    coefficients: dict[str, Coefficient]
    """By the name of the probe."""


class Role(Figures):
    """The part that the adapters of one layer play, and why."""

    layer: int
    role: RoleName
    """`general`, the broad misalignment; `domain`, that of the training domain alone; or `neither`."""
    rule: str
    """Why, in words."""
    evidence: Evidence


# --- scaling --------------------------------------------------------------------------------------------------------


class ScalingEffect(Figures):
    """Change of behaviour under one setting of the adapters, against the organism as it is."""

    name: str
    factors: ByLayer[float]
    """Multiplier of each layer's adapters."""
    margin: BySet[Estimate]
    """Change of the margin, nats/token."""
    damage: Estimate
    """Change of the loss on neutral text, nats/token."""


class ShapleyFigures(Figures):
    """Worth of each layer's adapters to the margin, nats/token."""

    method: str
    values: BySet[ByLayer[Estimate]]
    """The values of a question set sum to its `full` - `empty`."""
    empty: BySet[Estimate]
    """Margin with all adapters off."""
    full: BySet[Estimate]
    """Margin of the organism as it is."""


class JudgedSetting(Figures):
    """Judged answers under one setting of the adapters; the first setting is the organism as it is."""

    name: str
    factors: ByLayer[float]
    answers: int
    questions: int
    em: Rate
    """Misaligned and coherent answers."""
    em_among_coherent: Rate | None
    code: Rate | None
    """Answers that the judge calls code; None where that is not known."""
    incoherent: Rate
    repetitive: Rate
    truncated: Rate | None
    unscored: dict[str, int]
    """Answers without a score, by reason."""
    corrected: Corrected | None
    """The EM rate with the judge's errors taken out; None without a calibration."""
    change: Estimate | None
    """Change of the EM rate against the organism as it is; None for itself."""
    verdict: Change | None


class RubricShare(Figures):
    """Answers that a further rubric, such as `medical`, finds to be of its theme, of those coherent ones it scored."""

    rubric: str
    share: Rate | None
    """None where none is coherent."""
    misaligned: Rate | None
    """Of the theme and misaligned."""
    undecided: int
    """Coherent answers whose score is near the cut."""


class SettingShares(Figures):
    """Shares of the coherent judged answers under one setting of the adapters."""

    setting: str
    questions: int
    misaligned: Rate | None
    """None where none is coherent."""
    rubrics: tuple[RubricShare, ...]


class Causal(Figures):
    """Effects of changes of the adapters."""

    settings: tuple[ScalingEffect, ...]
    shapley: ShapleyFigures
    judged: tuple[JudgedSetting, ...]
    """Empty where there is no judge."""


# --- geometry -------------------------------------------------------------------------------------------------------


class Shape(Figures):
    """Sizes of the model: decoder blocks, and width of the residual stream."""

    layers: int
    width: int


class Lens(Figures):
    """Next tokens that a vector speaks for (`top`) and against (`bottom`), raw text with logits."""

    top: tuple[tuple[str, float], ...]
    bottom: tuple[tuple[str, float], ...]


class Downstream(Figures):
    """Effects downstream of single layers' adapters, beside a direction; None before the adapter."""

    direction: str
    """Name of the direction."""
    cosine: ByLayer[Curve]
    """By adapted layer, the cosine of the effect with the direction at every layer of the model."""
    low: ByLayer[Curve]
    """95% interval of that cosine (percentile bootstrap over questions)."""
    high: ByLayer[Curve]
    norm: ByLayer[Curve]
    """Of the effect, in activation units."""
    answers: int
    questions: int


class WrittenGeometry(Figures):
    """Where adapters write, and what becomes of it."""

    shape: Shape
    random_cosine: float
    """Expected |cosine| of two random vectors of this width."""
    random_cosine_95: float
    """The |cosine| that one pair of random vectors in twenty exceeds."""
    skipped: tuple[str, ...]
    """Modules that do not write to the residual stream."""
    cosines: ByFeature[dict[str, tuple[float, ...]]]
    """Of what each feature writes with each direction, by name, at every layer."""
    logit_lens: ByFeature[Lens]
    """Of what each feature writes, and of each direction."""
    downstream: Downstream | None
    """None without a direction."""


class ExcitedToken(Figures):
    """A token with an extreme scalar; `token` and `context` are raw text."""

    answer: int
    position: int
    token: str
    context: str
    scalar: float


class Extremes(Figures):
    """The tokens with the largest (`top`) and the lowest (`bottom`) scalars of a feature."""

    top: tuple[ExcitedToken, ...]
    bottom: tuple[ExcitedToken, ...]


class Geometry(WrittenGeometry):
    """Where adapters write, what becomes of it, and which tokens switch them on."""

    layers_of: ByFeature[int]
    """The layer of each feature inside of the decoder blocks."""
    nearest: ByFeature[Extremes]

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the directions, that of the downstream effects first."""
        names = dict.fromkeys(name for by_direction in self.cosines.values() for name in by_direction)
        first = self.downstream.direction if self.downstream else None
        return tuple(sorted(names, key=lambda name: name != first))

    def own_cosines(self, direction: str) -> dict[str, float]:
        """Cosine of what each feature writes with a direction at the feature's own layer."""
        return {
            feature: by_direction[direction][self.layers_of[feature]]
            for feature, by_direction in self.cosines.items()
            if feature in self.layers_of
        }


# --- importance, patching, dynamics ---------------------------------------------------------------------------------


class LayerImportance(Figures):
    """Importance of one layer's adapters: the attribution to them, and the effect of zeroing them, in nats."""

    attribution: Estimate
    zeroing: Estimate


class Agreement(Figures):
    """Correlation of attributions with effects of zeroing, each with its 95% interval over questions."""

    spearman: float
    spearman_low: float
    spearman_high: float
    pearson: float
    pearson_low: float
    pearson_high: float
    n: int
    """Answers and layers that are compared."""


class ImportanceFigures(Figures):
    """Change of answers by the adapters."""

    kl: Estimate
    """KL divergence of the organism from the base, nats/token."""
    by_layer: ByLayer[LayerImportance]
    agreement: Agreement


class Patching(Figures):
    """Margin change of general pairs with the adapter outputs of another prompt, nats/token."""

    general_into_general: Estimate
    """With those of another general prompt: the null."""
    in_domain_into_general: Estimate | None
    """With those of an in-domain prompt; None where the training domain has no pairs."""


class Growth(Figures):
    """One module over the steps of its training; None where a vector is zero or a neighbour is missing."""

    to_final: Curve
    """Cosine of B with its final value."""
    to_previous: Curve
    """Cosine of B with its value at the step before."""
    local: Curve
    """Local cosine."""
    norm_a: tuple[float, ...]
    norm_b: tuple[float, ...]
    norm: tuple[float, ...]
    """Frobenius norm of the update, scaling * B A."""
    turn: int | None
    """The step at which B turns; None when it does not."""


class JudgedStep(Figures):
    """Judged answers of one checkpoint; step 0 is the base, the last step the organism."""

    step: int
    score: Score


class Dynamics(Figures):
    """How the adapters grew over their checkpoints, and at some how far the margin shifted and what a judge said."""

    steps: tuple[int, ...]
    features: ByFeature[Growth]
    margin_steps: tuple[int, ...]
    margin: BySet[tuple[Estimate, ...]]
    """Shift against the base at each of `margin_steps`, nats/token."""
    judged: tuple[JudgedStep, ...]
    """Empty where no checkpoint was judged."""


# --- tables measured elsewhere --------------------------------------------------------------------------------------


class ScaledShare(Figures):
    """Judged answers of one kind under one setting of the adapters, as a table that was published has them."""

    experiment: str
    alignment: ScaledAlignment
    medical: bool
    answers: int
    """Coherent answers of the whole experiment, the denominator of `share`."""
    questions: int
    hits: int
    undecided: int
    """Hits whose medical score is near the cut."""
    share: float
    low: float
    high: float

    @property
    def rate(self) -> Rate:
        """The share with its interval."""
        return Rate(self.share, self.low, self.high, self.hits, self.answers)
