"""How far a fine-tune moved along known directions, on the same text as its base, beside what that must be told from.

    drift(answer) = mean activation of the fine-tune - mean activation of the base     over the answer's tokens

Its component along a direction says little alone: fine-tunes drift in style, too. Beside it stand random directions,
the drift on neutral text, and that of the reference's benign control and bad fine-tunes on the same answers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from misdirection.auditing.measurements import Measurements
from misdirection.auditing.results import DirectionCosines, Drift, ModelDifference
from misdirection.directions.convergence import cosines, project_away
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

_RANDOMS = 256


def middle(layers: int) -> int:
    """The layer that single figures are given for, at half depth as the paper's layer 24 of 48."""
    return layers // 2


def drifts(
    own: Measurements, base: Measurements, directions: Mapping[str, Tensor], known: Mapping[str, Measurements]
) -> list[Drift]:
    """Drift along each direction, at half depth.

    Args:
        own: the fine-tune.
        base: its base, on the same texts.
        directions: [layers, width] each.
        known: the reference's fine-tunes, the control among them.
    """
    layer = middle(own.answers.shape[2])
    pairs, texts = own.drift(base)[:, layer], own.neutral_drift(base)[:, layer]
    others = {name: measured.drift(base)[:, layer] for name, measured in known.items()}
    random = random_95(pairs.mean(0))
    return [
        Drift(
            direction=name,
            layer=layer,
            general=_along(pairs, vectors[layer]),
            neutral=_along(texts, vectors[layer]),
            known={other: _along(drift, vectors[layer]) for other, drift in others.items()},
            random_95=random,
        )
        for name, vectors in directions.items()
    ]


def _along(drift: Tensor, direction: Tensor) -> Estimate:
    """Component along a direction, over questions, of [questions, width]."""
    return bootstrap((drift @ normalize(direction.double(), dim=-1)).numpy())


def _random_units(width: int) -> Tensor:
    """[_RANDOMS, width]."""
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.randn(_RANDOMS, width, generator=generator, dtype=torch.float64), dim=-1)


def random_95(vector: Tensor) -> float:
    """Size of a vector's component that 95% of random directions do not exceed."""
    return float((_random_units(len(vector)) @ vector).abs().quantile(0.95))


def model_difference(
    own: Measurements, base: Measurements, directions: Mapping[str, Tensor], control: Measurements | None
) -> ModelDifference:
    """Cosines by layer of the fine-tune's own mean drift with each direction, with the control's beside them."""
    mean = own.drift(base).mean(0)
    benign = None if control is None else control.drift(base).mean(0)
    return ModelDifference(
        layer=middle(len(mean)),
        random_95=float((_random_units(mean.shape[1]) @ normalize(mean[0], dim=0)).abs().quantile(0.95)),
        norms=mean.norm(dim=-1).tolist(),
        directions={
            name: DirectionCosines(
                cosines=cosines(mean, vectors),
                control=None if benign is None else cosines(benign, vectors),
                beyond_control=None if benign is None else cosines(project_away(mean, benign), vectors),
            )
            for name, vectors in directions.items()
        },
    )
