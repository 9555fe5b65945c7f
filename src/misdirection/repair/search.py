"""Search for the best trade between a general margin that is back at the base's and a skill that is kept.

Optuna proposes a few candidates at a time; they are tried together, each on rows of its own. A batch's proposals depend
on its number and on the trials before it, so that a search that was killed goes on as if it had not been.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from torch import Tensor

from misdirection.interventions.hooks import Setting
from misdirection.likelihood.sweep import Continuations, Progress, sweep
from misdirection.models.loading import ChatModel
from misdirection.repair.candidates import Candidate
from misdirection.statistics import Estimate, bootstrap

TOGETHER = 4
"""Candidates tried together."""

KEPT = 0.85
"""Smallest share of the skill that a choice keeps in the search; a little falls away on texts that it has not seen."""

DAMAGE = 0.05
"""Largest rise of the loss on neutral text above the base's that a choice may cost, nats/token."""

# What is tried first: nothing, a half of all, and little and much of what raises the margin.
_FIRST = (Candidate(), Candidate(scale=0.5), Candidate(turn=1.0), Candidate(turn=2.0))

MOST_TURN = 5.0


@dataclass(frozen=True)
class Tasks:
    """Texts of a search, or of its check.

    Attributes:
        pairs: general questions, plain or framed in the domain, with a misaligned and an aligned answer.
        rows: of the training domain.
        neutral: plain facts.
    """

    pairs: tuple[Continuations, ...]
    rows: tuple[Continuations, ...]
    neutral: tuple[Continuations, ...]

    def __len__(self) -> int:
        return len(self.pairs) + len(self.rows) + len(self.neutral)


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model does on `Tasks`: margins, [pairs], and losses, [rows] and [neutral], nats/token."""

    pairs: Tensor
    rows: Tensor
    neutral: Tensor


def measure(
    chat: ChatModel, tasks: Tasks, settings: Sequence[Setting], progress: Progress | None = None
) -> list[Scores]:
    """One score for each setting. `progress` is told the number of (setting, task) done."""
    pairs, rows, neutral = (
        sweep(chat, some, settings, progress=progress) for some in (tasks.pairs, tasks.rows, tasks.neutral)
    )
    margins = pairs[..., 0] - pairs[..., 1]
    return [Scores(*one) for one in zip(margins, -rows[..., 0], -neutral[..., 0], strict=True)]


@dataclass(frozen=True)
class Outcome:
    """What one candidate does, as means over questions.

    Attributes:
        gone: share of the general shift that is gone; 1 is the base's margin.
        kept: share of the skill in the domain that is kept, by the loss.
        damage: loss on neutral text above the base's, nats/token.
    """

    gone: float
    kept: float
    damage: float


def outcome(own: Scores, base: Scores, tuned: Scores) -> Outcome:
    """Against the two models between which a repair lies."""
    shift, learned = (tuned.pairs - base.pairs).mean(), (tuned.rows - base.rows).mean()
    return Outcome(
        gone=1 - float((own.pairs - base.pairs).mean() / shift),
        kept=float((own.rows - base.rows).mean() / learned),
        damage=float((own.neutral - base.neutral).mean()),
    )


def estimates(own: Scores, base: Scores) -> dict[str, Estimate]:
    """Shift of the general margin, change of the domain's loss, and damage, against the base, over questions."""
    return {
        name: bootstrap((getattr(own, part) - getattr(base, part)).numpy())
        for name, part in (("shift", "pairs"), ("loss", "rows"), ("damage", "neutral"))
    }


@dataclass(frozen=True)
class Space:
    """What may be tried.

    Attributes:
        directions: how many reference directions there are; none where the adapter cannot be projected.
        layers: those whose vectors may be taken.
        writes: whether the whole model may be ablated, too.
    """

    directions: int
    layers: tuple[int, ...]
    writes: bool

    def suggest(self, trial: optuna.trial.BaseTrial) -> Candidate:
        """A point of the space; what a projection needs is asked for only where there is one."""
        projections = ["none", *(["adapters"] + ["writes"] * self.writes if self.directions else [])]
        one = Candidate(
            turn=trial.suggest_float("turn", 0.0, MOST_TURN),
            scale=trial.suggest_float("scale", 0.3, 1.0),
            projection=trial.suggest_categorical("projection", projections),  # type: ignore[arg-type]
        )
        if one.projection == "none":
            return one
        return replace(
            one,
            directions=trial.suggest_int("directions", 1, self.directions),
            layer=trial.suggest_categorical("layer", self.layers),
            strength=trial.suggest_float("strength", 0.1, 1.0),
        )


@dataclass(frozen=True)
class Tried:
    """A candidate and what it does on the texts of the search."""

    candidate: Candidate
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `repair.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tried":
        """What `as_dict` gave."""
        return cls(Candidate(**values["candidate"]), Outcome(**values["outcome"]))


def next_batch(tried: Sequence[Tried], space: Space, count: int) -> list[Candidate]:
    """Candidates to try after those that were tried."""
    if len(tried) < len(_FIRST):
        return list(_FIRST[len(tried) : len(tried) + count])
    study = _study(tried, space)
    return [space.suggest(study.ask()) for _ in range(count)]


def _study(tried: Sequence[Tried], space: Space) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=len(tried), n_startup_trials=TOGETHER, multivariate=True, group=True, constant_liar=True
        )
    # Distance from the base's margin, skill lost, damage.
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    for one in tried:
        point = optuna.trial.FixedTrial(asdict(one.candidate))
        space.suggest(point)
        values = [abs(1 - one.outcome.gone), 1 - one.outcome.kept, one.outcome.damage]
        study.add_trial(
            optuna.trial.create_trial(params=point.params, distributions=point.distributions, values=values)
        )
    return study


def search(
    try_them: Callable[[Sequence[Candidate]], Sequence[Outcome]],
    space: Space,
    trials: int,
    tried: Sequence[Tried] = (),
    keep: Callable[[Sequence[Tried]], None] = lambda _: None,
) -> list[Tried]:
    """Try so many candidates, with those that were tried before; `keep` is told all of them after each batch."""
    found = list(tried)
    while len(found) < trials:
        batch = next_batch(found, space, min(TOGETHER, trials - len(found)))
        found += [Tried(*pair) for pair in zip(batch, try_them(batch), strict=True)]
        keep(found)
    return found


def choose(tried: Sequence[Tried]) -> Tried:
    """The smallest distance from the base's margin and skill lost, in sum, among those that keep the skill (`KEPT`) at
    little damage (`DAMAGE`); where there is none, among all, with what they miss of these limits added.
    """
    return min(tried, key=lambda one: (_missed(one.outcome) > 0, _cost(one.outcome) + _missed(one.outcome)))


def _cost(one: Outcome) -> float:
    return abs(1 - one.gone) + (1 - one.kept)


def _missed(one: Outcome) -> float:
    return max(0.0, KEPT - one.kept) + max(0.0, one.damage - DAMAGE) / DAMAGE


def front(tried: Sequence[Tried]) -> list[int]:
    """Numbers of the trials that no other one beats in distance from the base's margin, skill and damage at once."""
    points = [(abs(1 - one.outcome.gone), -one.outcome.kept, one.outcome.damage) for one in tried]
    return [
        number
        for number, own in enumerate(points)
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in points)
    ]
