"""Cosines by layer as results keep them, and their tables."""

from collections.abc import Iterator, Mapping

import pandas as pd

from misdirection.directions.shared_contrast import Curve as Curve
from misdirection.results import Figures


class CosineFigures(Figures):
    """Cosines of two organisms, and of one with each of its references, by layer."""

    def frame(self) -> pd.DataFrame:
        """One row per pair, or organism, and layer; `kind` is as the fields are named."""
        return pd.DataFrame(
            {"kind": kind, "organism": organism, "other": other, "layer": layer, "cosine": cosine}
            for kind in type(self).model_fields
            if isinstance(curves := getattr(self, kind), Mapping)
            for organism, other, curve in _curves(curves)
            for layer, cosine in enumerate(curve)
        )


def _curves(by_organism: Mapping[str, Curve | Mapping[str, Curve]]) -> Iterator[tuple[str, str | None, Curve]]:
    """Each pair once, and none of an organism with itself; no other for a reference."""
    names = list(by_organism)
    for name, curves in by_organism.items():
        if isinstance(curves, Mapping):
            yield from ((name, other, curves[other]) for other in names[names.index(name) + 1 :])
        else:
            yield name, None, curves
