"""Ready-made measurements of one model: what the commands `margin`, `steer` and `ablate` print."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from misdirection.behaviour.margin import log_probs, pair_tasks, text_tasks
from misdirection.behaviour.metrics import auc, bootstrap
from misdirection.data import ProbePair, neutral_examples
from misdirection.models import ChatModel
from misdirection.progress import track
from misdirection.representation.interventions import Intervention, intervene, random_like


def measure_shift(chat: ChatModel, pairs: Sequence[ProbePair]) -> dict[str, Any]:
    """Margin, AUROC and loss; for a model with an adapter also the margin's shift and the damage against the base."""
    own, own_loss = _scores(chat, pairs, "model")
    result: dict[str, Any] = {
        "margin": bootstrap(_margin(own)).as_dict(),
        "auc": auc(own[:, 0].tolist(), own[:, 1].tolist()),
        "neutral_loss": bootstrap(own_loss).as_dict(),
    }
    if chat.adapter:
        with chat.as_base():
            base, base_loss = _scores(chat, pairs, "base")
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
    before, loss_before = _scores(chat, pairs, "without")

    def change(name: str, one: Tensor) -> tuple[Tensor, Tensor]:
        with intervene(chat, [make(one)]):
            after, loss_after = _scores(chat, pairs, name)
        return _margin(after) - _margin(before), loss_after - loss_before

    shift, damage = change("with", vector)
    draws = [change(f"random {seed}", random_like(vector, seed)) for seed in range(random_seeds)]
    return {
        "margin_change": bootstrap(shift).as_dict(),
        "random_change": bootstrap(torch.stack([draw for draw, _ in draws], -1)).as_dict(),
        "damage": bootstrap(damage).as_dict(),
        "random_damage": bootstrap(torch.stack([draw for _, draw in draws], -1)).as_dict(),
    }


def _margin(scores: Tensor) -> Tensor:
    """[pairs]."""
    return scores[:, 0] - scores[:, 1]


def _scores(chat: ChatModel, pairs: Sequence[ProbePair], label: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (misaligned, aligned), [pairs, 2], and the neutral loss, [texts]."""
    tasks, neutral = pair_tasks(chat.tokenizer, pairs), text_tasks(chat.tokenizer, neutral_examples())
    with track(f"margin, {label}", len(tasks) + len(neutral)) as advance:
        scores = log_probs(chat, tasks, progress=advance)
        loss = -log_probs(chat, neutral, progress=advance)[:, 0]
    return scores, loss
