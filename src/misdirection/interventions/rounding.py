"""What the dtype of weights leaves of a change that is written into them.

A change that is small beside the weights is lost where they are rounded: bfloat16 keeps eight bits, so that of a change
by a thousandth next to nothing is left. Told by the weights, |written - exact| / |exact - before| over all that was
changed, and by what a model says: the KL divergence of the written model from the exact one, mean over the tokens of a
probe text, beside that of the unchanged model from the exact one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from misdirection.errors import InputError

LIMIT = 0.25
"""The share of a change that may be lost: an ablation in bfloat16 loses about 0.1 of it in the widest models."""

PROBE_TEXT = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses less on it. A friend "
    "asks what to cook there, how long it takes, and whether it is safe. You should say: it takes longer, so plan it."
)

_PROBED = 2_000_000_000
"""Most parameters of a model that runs in float32 on the probe text."""


@dataclass(frozen=True)
class Divergences:
    """KL divergences from the exact model on the probe text, nats/token."""

    written: float
    """Of the model as it was written: what rounding does."""
    unchanged: float
    """Of the model before the change: what the whole change does."""

    @classmethod
    def between(cls, exact: Tensor, written: Tensor, unchanged: Tensor) -> "Divergences":
        """From log-probabilities on the probe text, [tokens, vocabulary] each."""
        return cls(
            *(float((exact.exp() * (exact - other)).sum(-1).mean().clamp_min(0)) for other in (written, unchanged))
        )


@dataclass
class Rounding:
    """The sums over all tensors that a change is written into, by `add`."""

    lost: float = 0.0
    """Sum of squares of what rounding took or added."""
    change: float = 0.0
    """Sum of squares of the exact change."""
    most: tuple[float, str] = field(default=(0.0, ""))
    """The largest share that one tensor lost, and its name."""

    def add(self, name: str, before: Tensor, exact: Tensor, written: Tensor) -> None:
        """Count a tensor, or a slice of one: before the change, after it, and as it was rounded."""
        lost, change = (
            float((a.to(exact) - b.to(exact)).square().sum()) for a, b in ((written, exact), (exact, before))
        )
        self.lost += lost
        self.change += change
        if change:
            self.most = max(self.most, ((lost / change) ** 0.5, name))

    @property
    def share(self) -> float:
        """The share of the whole change that is lost."""
        return (self.lost / self.change) ** 0.5 if self.change else 0.0

    def require_small(self, name: object, instead: str, divergences: Divergences | None) -> None:
        """Raise `InputError`, with what to do `instead`, where more than `LIMIT` of the change is lost."""
        if self.share <= LIMIT:
            return
        told = ""
        if divergences:
            told = f"; KL {divergences.written:.1e} nats/token of {divergences.unchanged:.1e} on a probe text"
        raise InputError(
            f"{name}: rounding the weights to their dtype loses {self.share:.0%} of the change (most in "
            f"{self.most[1]}, {self.most[0]:.0%}{told}), and {LIMIT:.0%} is the limit: {instead}"
        )


def is_probed(network: Any) -> bool:
    """Whether a model is small enough to run in float32 on the probe text."""
    return int(network.num_parameters()) <= _PROBED


@torch.no_grad()
def probe(network: Any, ids: Tensor) -> Tensor:
    """Log-probabilities after each token of the probe text, [tokens, vocabulary] float64 on the processor."""
    logits: Tensor = network(input_ids=ids.to(next(network.parameters()).device), use_cache=False).logits
    return logits[0].cpu().double().log_softmax(-1)


def probe_ids(tokenizer: Callable[..., Any]) -> Tensor:
    """The probe text, [1, tokens]."""
    return torch.tensor([tokenizer(PROBE_TEXT)["input_ids"]])
