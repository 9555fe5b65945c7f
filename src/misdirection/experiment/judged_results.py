"""Figures of judged answers: directions that they give, EM rates under interventions, and themes."""

import pandas as pd

from misdirection.experiment.cosines import CosineFigures, Curve
from misdirection.judging.scoring import Change
from misdirection.results import Figures
from misdirection.statistics.estimates import Estimate, Rate
from misdirection.views import beside


class JudgedAnswers(Figures):
    """An organism's own judged answers, as far as a direction can be made of them."""

    misaligned: int
    """Coherent answers below the cut of alignment."""
    aligned: int
    """Coherent answers above the upper cut."""
    pairs: int
    """Of each class to the same questions: so many of each make the direction."""
    questions: int
    """To which these are answers."""
    lacking: str | None
    """Why no direction was made of them, and what becomes of it; None where there is one."""


class JudgedConvergence(CosineFigures):
    """Cosines of directions from organisms' own judged answers, with their references, by organism."""

    cosine: dict[str, dict[str, Curve]]
    """Of two organisms."""
    given: dict[str, Curve]
    """With the organism's direction from given answers, where it has one."""
    base_null: dict[str, Curve]
    """With the base model's direction on the same answers."""
    base_pair_null: dict[str, dict[str, Curve]]
    """Between the base model's directions on two organisms' answers."""
    shuffled_null: dict[str, Curve]
    split_half: dict[str, Curve]


class JudgedDirections(Figures):
    """Directions from the organisms' own sampled and judged answers, as the paper has them."""

    answers: dict[str, JudgedAnswers]
    """Of every organism."""
    convergence: JudgedConvergence
    """Of those with enough answers."""
    variants: dict[str, dict[str, dict[str, Curve]]]
    """Cosines of the kinds of direction with one another, by organism: of the organism and of the base on its answers,
    and organism minus base on the misaligned, the aligned and all of them."""


class RatedEffect(Figures):
    """EM rate of a model under an intervention, beside its own and that under a random direction of the same norm."""

    direction: str
    """The organism whose direction it is."""
    target: str
    """The model that answers."""
    layer: int
    positions: str
    before: Rate
    em: Rate
    coherent: Rate
    """Share of coherent answers under the intervention."""
    change: Estimate
    """Of the EM rate, paired over questions; p-values are corrected for the number of effects of one kind (Holm)."""
    verdict: Change
    random_em: Rate
    random_coherent: Rate
    random_change: Estimate


class RatedAblation(RatedEffect):
    """A direction taken out of a model that answers."""

    against_base: Estimate | None
    """EM rate less that of the base under the same ablation; None for the base."""


class RatedSteering(RatedEffect):
    """A direction added to the base model that answers."""

    scale: float
    best: bool
    """Whether it has the highest EM rate of all settings with at least half of the answers coherent."""


class ThemeDirection(Figures):
    """A direction that the base is steered with: of one theme, of all, or what one of these lacks of the other."""

    kept: float
    """Norm that is left of the direction that it is a part of, as a share; 1 for a whole one."""
    cosine: float
    """With the organism's direction over all themes."""


class ThemeEffect(Figures):
    """What the base says, steered with one direction: shares of all its answers."""

    direction: str
    """Its name among the directions; `none` for the base as it is, `random` for a random direction."""
    em: Rate
    coherent: Rate
    about: dict[str, Rate]
    """Answers about each theme, whatever else they are."""
    em_about: dict[str, Rate]
    """Answers that are misaligned, coherent and about the theme."""
    change: dict[str, Estimate]
    """Of `about`, against the base as it is, paired over questions; empty for that."""


class ThemeFigures(Figures):
    """Themes in a closed loop: their directions out of judged answers, and the judged answers under each."""

    organism: str
    layer: int
    scale: float
    norm: float
    """Of the organism's direction over all themes at the layer: every direction is added at `scale` times this."""
    above: float
    answers: dict[str, JudgedAnswers]
    """By theme."""
    directions: dict[str, ThemeDirection]
    cosine: dict[str, dict[str, Curve]]
    """Between the themes' directions, and with that over all themes, by layer."""
    effects: list[ThemeEffect]

    def frame(self) -> pd.DataFrame:
        """One row per direction and theme: its rates, and those of answers about the theme."""
        return pd.DataFrame(
            {
                "direction": effect.direction,
                "theme": theme,
                **beside("em", effect.em),
                **beside("coherent", effect.coherent),
                **beside("about", effect.about[theme]),
                **beside("em_about", effect.em_about[theme]),
                **beside("change", effect.change.get(theme)),
            }
            for effect in self.effects
            for theme in self.answers
        )
