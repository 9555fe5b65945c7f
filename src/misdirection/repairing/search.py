"""Search for the best trade between a general margin that is where benign training puts it and a skill that is kept.

Optuna proposes a few candidates at a time; they are tried together, each on rows of its own. A batch's proposals depend
on its number and on the trials before it, so that a search that was killed goes on as if it had not been.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from misdirection.auditing.verdict import RULE
from misdirection.interventions.hooks import Setting
from misdirection.likelihood.margin import margins_of
from misdirection.likelihood.sweep import Continuations, sweep
from misdirection.models.chat_model import ChatModel
from misdirection.repairing.candidates import Candidate

if TYPE_CHECKING:
    import optuna

TOGETHER = 4
"""Candidates tried together."""

KEPT = 0.85
"""Smallest share of the skill that a choice keeps in the search; a little falls away on texts that it has not seen."""

DAMAGE = 0.05
"""Largest rise of the loss on neutral text above the base's that a choice may cost, nats/token."""

# Tried first: nothing, a half of all, and little and much of the direction that raises the margin.
_FIRST = (Candidate(), Candidate(scale=0.5), Candidate(turn=2.0), Candidate(turn=4.0))

MOST_TURN = 8.0


@dataclass(frozen=True)
class TokenisedTexts:
    """Texts of a search, or of its check, as a model reads them.

    Attributes:
        pairs: general questions, plain or framed in the domain, with a misaligned and an aligned answer.
        rows: of the training domain.
        neutral: plain facts.
    """

    pairs: tuple[Continuations, ...]
    rows: tuple[Continuations, ...]
    neutral: tuple[Continuations, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on `TokenisedTexts`: margins, [pairs], and losses, [rows] and [neutral], nats/token."""

    pairs: Tensor
    rows: Tensor
    neutral: Tensor


def measure(chat: ChatModel, texts: TokenisedTexts, settings: Sequence[Setting]) -> list[Scores]:
    """The scores under each setting."""
    pairs, rows, neutral = (sweep(chat, given, settings) for given in (texts.pairs, texts.rows, texts.neutral))
    return [Scores(*scores) for scores in zip(margins_of(pairs), -rows[..., 0], -neutral[..., 0], strict=True)]


@dataclass(frozen=True)
class Outcome:
    """Effects of one candidate, as means over questions.

    Attributes:
        left: general shift that is left beyond the benign control's, as a share of what the reference's bad fine-tunes
            moved: the unit of the audit's rule.
        kept: share of the skill in the domain that is kept, by the loss.
        damage: loss on neutral text above the base's, nats/token.
    """

    left: float
    kept: float
    damage: float

    @property
    def distance(self) -> float:
        """Of the margin from the benign control's."""
        return abs(self.left)

    @property
    def missed(self) -> float:
        """By how much it misses the limits of a choice, `KEPT` and `DAMAGE`."""
        return max(0.0, KEPT - self.kept) + max(0.0, self.damage - DAMAGE) / DAMAGE

    @property
    def too_far(self) -> float:
        """By how much its distance is more than what the audit's rule calls misaligned."""
        return max(0.0, self.distance - RULE.misaligned)


@dataclass(frozen=True, eq=False)
class Ends:
    """The models between which a repair lies, on the same texts.

    Attributes:
        base: it has none of the damage, and none of the skill.
        tuned: the fine-tune.
        control: what the benign control moved, [plain] nats/token, on the plain questions, which come first; 0 without
            a control.
        shift: the fine-tune's general shift beyond it, nats/token, as well as it is known: by more questions than
            candidates are tried on.
        unit: what the reference's bad fine-tunes moved beyond their controls, nats/token.
    """

    base: Scores
    tuned: Scores
    control: Tensor
    shift: float
    unit: float

    def beyond_control(self, own: Scores) -> Tensor:
        """A model's shift beyond the control's, [plain] nats/token."""
        return (own.pairs - self.base.pairs)[: len(self.control)] - self.control

    def outcome(self, own: Scores) -> Outcome:
        """What a candidate comes to."""
        learned, removed = (self.tuned.rows - self.base.rows).mean(), (self.tuned.pairs - own.pairs).mean()
        return Outcome(
            left=(self.shift - float(removed)) / self.unit,
            kept=float((own.rows - self.base.rows).mean() / learned),
            damage=float((own.neutral - self.base.neutral).mean()),
        )


@dataclass(frozen=True)
class Space:
    """The candidates that may be tried.

    Attributes:
        directions: how many reference directions there are; none where the adapter cannot be projected.
        layers: those whose vectors may be taken.
        writes: whether the whole model may be ablated, too.
    """

    directions: int
    layers: tuple[int, ...]
    writes: bool

    def suggest(self, trial: "optuna.trial.BaseTrial") -> Candidate:
        """A point of the space; a projection's own numbers are asked for only where there is a projection."""
        projections = ["none", *(["adapters"] + ["writes"] * self.writes if self.directions else [])]
        candidate = Candidate(
            turn=trial.suggest_float("turn", 0.0, MOST_TURN),
            scale=trial.suggest_float("scale", 0.3, 1.0),
            projection=trial.suggest_categorical("projection", projections),  # type: ignore[arg-type]
        )
        if candidate.projection == "none":
            return candidate
        return replace(
            candidate,
            directions=trial.suggest_int("directions", 1, self.directions),
            layer=trial.suggest_categorical("layer", self.layers),
            strength=trial.suggest_float("strength", 0.1, 1.0),
        )


@dataclass(frozen=True)
class Tried:
    """A candidate with its outcome on the texts of the search."""

    candidate: Candidate
    outcome: Outcome


def next_batch(tried: Sequence[Tried], space: Space, count: int) -> list[Candidate]:
    """Candidates to try after those that were tried."""
    if len(tried) < len(_FIRST):
        return list(_FIRST[len(tried) : len(tried) + count])
    resumed = _resume(tried, space)
    return [space.suggest(resumed.ask()) for _ in range(count)]


def _resume(tried: Sequence[Tried], space: Space) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=len(tried), n_startup_trials=TOGETHER, multivariate=True, group=True, constant_liar=True
        )
    # Distance from the benign margin, skill lost, damage.
    resumed = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    for trial in tried:
        point = optuna.trial.FixedTrial(asdict(trial.candidate))
        space.suggest(point)
        values = [trial.outcome.distance, 1 - trial.outcome.kept, trial.outcome.damage]
        resumed.add_trial(
            optuna.trial.create_trial(params=point.params, distributions=point.distributions, values=values)
        )
    return resumed


def search(
    measured: Callable[[Sequence[Candidate]], Sequence[Outcome]],
    space: Space,
    trials: int,
    tried: Sequence[Tried] = (),
    keep: Callable[[Sequence[Tried]], None] = lambda _: None,
) -> list[Tried]:
    """Try candidates until there are so many.

    Args:
        measured: gives the outcomes of a batch.
        space: the candidates that may be tried.
        trials: how many, with those that were tried before.
        tried: these.
        keep: is told all of them after each batch.
    """
    done = list(tried)
    while len(done) < trials:
        batch = next_batch(done, space, min(TOGETHER, trials - len(done)))
        done += [Tried(*pair) for pair in zip(batch, measured(batch), strict=True)]
        keep(done)
    return done


def choose(tried: Sequence[Tried]) -> Tried:
    """The trial that keeps most of the skill among those whose margin is no further from the benign control's than the
    audit's rule allows: a smaller distance is within the noise, and the skill is not.

    Where none is so near, the nearest. All of this among those that keep the skill (`KEPT`) at little damage
    (`DAMAGE`); where there is none, among all, with what they miss of these limits added.
    """

    def order(trial: Tried) -> tuple[bool, float, float]:
        own = trial.outcome
        return own.missed > 0, own.too_far + own.missed, -own.kept

    return min(tried, key=order)


def front(tried: Sequence[Tried]) -> list[int]:
    """Numbers of the trials that no other beats in distance from the benign margin, skill and damage at once."""
    points = [(trial.outcome.distance, -trial.outcome.kept, trial.outcome.damage) for trial in tried]
    return [
        number
        for number, own in enumerate(points)
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in points)
    ]
