"""Ready-made measurements of one model: what the commands `margin`, `steer` and `ablate` print."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from misdirection.data import ProbePair, neutral_examples
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import Intervention, random_like
from misdirection.likelihood.margin import pair_continuations, text_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.models.loading import ChatModel
from misdirection.progress import track
from misdirection.statistics import auc, bootstrap


def measure_shift(chat: ChatModel, pairs: Sequence[ProbePair]) -> dict[str, Any]:
    """Margin, AUROC and loss; for a model with an adapter also the margin's shift and the damage against the base."""
    (own,), (own_loss,) = _scores(chat, pairs, "model")
    result: dict[str, Any] = {
        "margin": bootstrap(_margin(own)).as_dict(),
        "auc": auc(own[:, 0].tolist(), own[:, 1].tolist()),
        "neutral_loss": bootstrap(own_loss).as_dict(),
    }
    if chat.adapter:
        with chat.as_base():
            (base,), (base_loss,) = _scores(chat, pairs, "base")
        result["margin_shift"] = bootstrap(_margin(own) - _margin(base)).as_dict()
        result["damage"] = bootstrap(own_loss - base_loss).as_dict()
    return result


def measure_intervention(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    vector: Tensor,
    make: Callable[[Tensor], Intervention],
    random_seeds: int,
) -> dict[str, Any]:
    """Margin change and damage of an intervention, and of the same one with random vectors of the same norm.

    Args:
        vector: [width], the direction.
        make: gives the intervention for a vector.
        random_seeds: number of random vectors.
    """
    randoms = [random_like(vector, seed) for seed in range(random_seeds)]
    settings = [(), *([make(one)] for one in [vector, *randoms])]
    scores, losses = _scores(chat, pairs, "with and without", settings)
    changes, damages = _margin(scores[1:]) - _margin(scores[0]), losses[1:] - losses[0]
    return {
        "margin_change": bootstrap(changes[0]).as_dict(),
        "random_change": bootstrap(changes[1:].T).as_dict(),
        "damage": bootstrap(damages[0]).as_dict(),
        "random_damage": bootstrap(damages[1:].T).as_dict(),
    }


def _margin(scores: Tensor) -> Tensor:
    """[..., pairs]."""
    return scores[..., 0] - scores[..., 1]


def _scores(
    chat: ChatModel, pairs: Sequence[ProbePair], label: str, settings: Sequence[Setting] = ((),)
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (misaligned, aligned), [settings, pairs, 2], and the neutral loss, [settings, texts]."""
    tasks, neutral = pair_continuations(chat.tokenizer, pairs), text_continuations(chat.tokenizer, neutral_examples())
    with track(f"margin, {label}", len(settings) * (len(tasks) + len(neutral))) as advance:
        scores = sweep(chat, tasks, settings, progress=advance)
        loss = -sweep(chat, neutral, settings, progress=advance)[..., 0]
    return scores, loss
