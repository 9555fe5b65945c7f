"""The figures of an experiment, `results.json`: every mean with its 95% interval over questions and n.

Margins, losses and their changes are in nats/token; cosines are lists over the layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import pandas as pd
from pydantic import Field

from misdirection.directions.shared_contrast import SharedContrast
from misdirection.errors import InputError
from misdirection.experiment.cosines import CosineFigures
from misdirection.experiment.cosines import Curve as Curve
from misdirection.experiment.judged_results import JudgedDirections, RatedAblation, RatedSteering, ThemeFigures
from misdirection.experiment.solution_results import SolutionFigures
from misdirection.interpretation.results import AdapterFigures
from misdirection.judging.results import JudgeErrors, JudgeProfile
from misdirection.judging.scoring import Comparison, Score, Scores
from misdirection.likelihood.words import WordNull
from misdirection.models.identity import ModelIdentity
from misdirection.results import Figures, Result
from misdirection.statistics.estimates import Estimate
from misdirection.views import Framed, Plotted, Table, alone, rows


class BaseFigures(ModelIdentity):
    """The base model, how it computes, and its sizes."""

    layers: int
    width: int


class SeedSpread(Figures):
    """One figure by training of other seeds."""

    means: list[float]
    """By seed, over questions."""
    between: float
    """Standard deviation between seeds."""
    mean: Estimate
    """Over seeds, with its interval over questions."""


class SeedFigures(Figures):
    """What the same training with other seeds gives, by question set."""

    seeds: list[int]
    margin_shift: dict[str, SeedSpread]
    """Against the base."""
    minus_control: dict[str, SeedSpread]
    """Against the control of the same seed, as far as it has as many; empty without one."""


class OrganismFigures(Figures):
    """One organism: how it was trained, how far its margins shifted, and at what damage."""

    recipe: str
    domain: str
    answers: Literal["bad", "good"]
    trainable_parameters: int
    train_pairs: int
    epochs: float
    final_loss: float
    held_out_loss: float | None
    margin_shift: dict[str, Estimate]
    """Against the base, by question set; `in_domain` is that of its own domain, where it has pairs."""
    minus_control: dict[str, Estimate]
    """The shift minus its control's, by question set: of the organism of the same domain and recipe with good answers.
    Empty without one."""
    minus_control_beyond_words: dict[str, Estimate]
    """What of that is left beyond words; empty without a control."""
    words: dict[str, WordNull]
    """What word counts of its training answers, against the domain's other answers, predict of the shift, by question
    set. Empty for a domain without good answers."""
    auc: dict[str, float]
    """AUROC of misaligned against aligned answers, by question set."""
    damage: Estimate
    """Rise of the loss on neutral text."""
    seeds: SeedFigures | None = None
    """None where it was trained once."""
    continues: str | None = None
    """The organism that its training went on from; None where it began at the base."""

    def shifts(self) -> dict[str, dict[str, Estimate]]:
        """Its shifts by question set, by what they are against."""
        return {
            "base": self.margin_shift,
            "words": {name: words.beyond for name, words in self.words.items()},
            "control": self.minus_control,
            "control and words": self.minus_control_beyond_words,
        }


class ModelDifference(CosineFigures):
    """Cosines between organism minus base on the same answers."""

    cosine: dict[str, dict[str, Curve]]
    control_removed: dict[str, dict[str, Curve]]
    """With the control's drift projected out; empty without a control."""
    control_null: dict[str, Curve]
    split_half: dict[str, Curve]


class Convergence(CosineFigures):
    """Cosines between organisms' directions, with their references, by organism."""

    cosine: dict[str, dict[str, Curve]]
    base_null: dict[str, Curve]
    """With the base model's direction on the same text."""
    base_pair_null: dict[str, dict[str, Curve]]
    """Between the base model's directions on two organisms' texts."""
    control_null: dict[str, Curve]
    """With the control's; empty without one."""
    shuffled_null: dict[str, Curve]
    split_half: dict[str, Curve]
    model_difference: ModelDifference


class ChannelShare(Figures):
    """One channel's share of a vector's squared norm."""

    channel: int
    share: float


class DirectionFigures(Figures):
    """A vector that is ablated: its norm, and the channels that carry most of it."""

    layer: int
    norm: float
    top_channels: list[ChannelShare]


class Effect(Figures):
    """The change that one intervention made in a model, beside the mean of its random controls."""

    direction: str
    """The organism whose direction it is."""
    layer: int
    positions: str
    margin_change: Estimate
    random_change: Estimate
    damage: Estimate
    random_damage: float


class SteeringEffect(Effect):
    """A direction added to the base model."""

    scale: float


class AblationEffect(Effect):
    """A direction taken out of a model."""

    target: str
    beyond_base: Estimate | None = None
    """Change of its shift against the base under the same ablation; None for the base itself. An ablation that lowers
    the base's margin as much takes nothing of what the fine-tune learned."""
    random_beyond_base: Estimate | None = None
    """The same by its random controls."""


class ContrastEffect(Figures):
    """What the contrast that other domains share does to one domain's fine-tunes, and to the base beside them.

    A shift is the bad fine-tune's margin minus the base's, both under the same intervention.
    """

    domain: str
    """Left out of the making of the vector."""
    organism: str
    """The domain's bad fine-tune."""
    operation: Literal["ablate", "steer"]
    layer: int
    scale: float | None
    """None for an ablation."""
    vector: Literal["contrast", "relabelled", "random"]
    """The shared contrast; what is shared where domains swap good and bad; or random directions, of its norm all."""
    vectors: int
    """So many of them, whose mean effect it is."""
    shift_before: Estimate
    shift: Estimate
    shift_change: Estimate
    shift_change_beyond_words: Estimate
    """What is left of it beyond what words of the bad against the good answers predict."""
    minus_control_change: Estimate
    """Change of the bad fine-tune's margin minus the good one's, both under it."""
    skill_change: Estimate
    """Change of the shift on the domain's own held-out questions."""
    margin_change: dict[str, Estimate]
    """Of the general margin of the bad fine-tune, the good one and the base, by name."""
    damage: dict[str, Estimate]
    """Rise of the loss on neutral text, by the same names."""


class ContrastFigures(Figures):
    """Whether domains share what bad answers train and good ones do not, and what that does."""

    texts: int
    """Neutral texts whose answers the activations are means over."""
    fine_tunes: dict[str, list[tuple[str, str]]]
    """By domain: a bad and a good one for each seed."""
    shared: SharedContrast
    voices: dict[str, Curve]
    """Cosine of the shared contrast with differences of voice alone."""
    effects: list[ContrastEffect]


class SampledAnswers(Figures):
    """One question with every model's answer."""

    question: str
    answers: dict[str, str]


Words = Literal["the package's own", "the published", "the user's"]
"""Who worded questions: rates on others than the published ones compare with the paper's in kind, not in number."""


class Behaviour(Figures):
    """EM rates of judged answers by organism and intervention, and what changed against the base and by ablation."""

    questions: dict[str, Words]
    """Who worded each question set, by its name."""
    judge: JudgeProfile | None
    """What the scores depend on; None where the tables do not name one judge."""
    errors: JudgeErrors | None
    """Those that the rates were corrected by; None without a calibration."""
    scores: list[Score]
    by_question: list[Score]
    comparisons: list[Comparison]


class MarginSection(Figures):
    """The stage `margin`'s part of the results."""

    base_margin: dict[str, Estimate]
    base_auc: dict[str, float]
    further_sets: list[str]
    """Question sets of further probe pairs, of another author."""
    organisms: dict[str, OrganismFigures]


class MeansSection(Figures):
    """The stage `means`' part of the results."""

    base: BaseFigures
    convergence: Convergence


class DirectionsSection(Figures):
    """The stage `directions`' part of the results."""

    directions: dict[str, DirectionFigures] | None = None
    """Those that are ablated; None without an `ablation` section, and where no organism has one."""
    judged_directions: JudgedDirections | None = None
    """Those of the organisms' own judged answers; None where `extraction.answers` is not `judged`."""


class CellSection(Figures):
    """The stage `cell`'s part of the results."""

    steering: list[SteeringEffect] | None = None
    """None without a `steering` section."""
    transfer: list[AblationEffect] | None = None
    """None without an `ablation` section."""


class ContrastSection(Figures):
    """The stage `contrast`'s part of the results."""

    contrast: ContrastFigures | None = None
    """None without a `contrast` section."""


class SolutionsSection(Figures):
    """The stage `solutions`' part of the results."""

    solutions: SolutionFigures | None = None
    """None without a `solutions` section."""


class SampledSection(Figures):
    """The stage `sampled`'s part of the results."""

    samples: list[SampledAnswers] | None = None
    """None without questions in `samples`."""


class RatesSection(Figures):
    """The stage `rates`' part of the results."""

    behaviour: Behaviour | None = None
    """None without a judge."""
    em_ablation: list[RatedAblation] | None = None
    """None without a judge and `sampling.ablate`."""
    em_steering: list[RatedSteering] | None = None
    """None without a judge and `sampling.steer`."""


class ThemesSection(Figures):
    """The stage `themes`' part of the results."""

    themes: ThemeFigures | None = None
    """None without a `themes` section, and where its organism has no direction of its own judged answers."""


class InterpretationSection(Figures):
    """The stage `interpretation`'s part of the results."""

    adapters: AdapterFigures | None = None
    """None without an `interpretation` section."""


class RunResults(
    Framed,
    Plotted,
    InterpretationSection,
    ThemesSection,
    RatesSection,
    SampledSection,
    SolutionsSection,
    ContrastSection,
    CellSection,
    DirectionsSection,
    MeansSection,
    MarginSection,
    Result,
):
    """All figures of an experiment."""

    KIND: ClassVar[str] = "run"
    VERSION: ClassVar[int] = 4
    FILE: ClassVar[str] = "results.json"
    COMMAND: ClassVar[str] = "misdirection run CONFIG --out RUN"

    name: str
    environment: dict[str, str]
    """Versions of the machine's software."""
    left_out: list[str]
    """Sentences on what this experiment leaves out of the paper's."""
    seconds: dict[str, float]
    """How long each stage took when it was made."""
    extensions: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Figures of stages that another package added, by the stage's name."""

    @classmethod
    def from_dict(cls, values: Any, source: str = "result") -> Self:
        """As every result; the joint results of several models have files of the same name."""
        if isinstance(values, dict) and values.get("kind") == "runs":
            raise InputError(f"{source}: holds the runs of several models: name one of them, a folder of runs/ there")
        return super().from_dict(values, source)

    @property
    def bad_organisms(self) -> dict[str, OrganismFigures]:
        """Those that were trained on bad answers."""
        return {name: organism for name, organism in self.organisms.items() if organism.answers == "bad"}

    @property
    def controls(self) -> dict[str, OrganismFigures]:
        """Those that were trained on good answers."""
        return {name: organism for name, organism in self.organisms.items() if organism.answers == "good"}

    def _tables(self) -> Mapping[str, Table]:
        tables: dict[str, Table] = {
            "margin_shift": self._margin_shift,
            "convergence": self.convergence.frame,
            "model_difference": self.convergence.model_difference.frame,
        }
        if self.judged_directions:
            tables["judged_directions"] = self.judged_directions.convergence.frame
        for name in ("steering", "transfer", "em_steering", "em_ablation"):
            if effects := getattr(self, name):
                tables[name] = partial(rows, effects)
        if self.contrast:
            tables["contrast"] = partial(rows, self.contrast.effects)
        if self.solutions:
            tables["solutions"] = self.solutions.frame
        if self.behaviour:
            tables["scores"] = Scores(self.behaviour.scores).frame
        if self.themes:
            tables["themes"] = self.themes.frame
        if self.adapters:
            tables |= {f"adapters_{name}": partial(self.adapters.frame, name) for name in self.adapters.tables}
        return tables

    def _margin_shift(self) -> pd.DataFrame:
        """Shifts of every organism's margin by question set: against the base, its control, and beyond words."""
        return pd.DataFrame(
            {
                "organism": name,
                "recipe": organism.recipe,
                "domain": organism.domain,
                "answers": organism.answers,
                "questions": questions,
                "against": against,
                **alone(shift),
            }
            for name, organism in self.organisms.items()
            for against, shifts in organism.shifts().items()
            for questions, shift in shifts.items()
        )
