"""The result of a check of one vector, as `check.json` holds it."""

import html
from collections.abc import Mapping
from typing import ClassVar

from misdirection.choices import Operation
from misdirection.directions.verdict import Effect, Rule, Word
from misdirection.results import Figures, Result
from misdirection.views import Framed, Plotted, Table, rows


class DirectionFacts(Figures):
    """The direction that was checked."""

    name: str
    """Its file, or what it is of."""
    kind: str
    operation: Operation
    """What it says that it is for."""
    made_for: str
    """The base model that it names."""
    digest: str
    """SHA-256 of its vectors in float32."""


class ModelFacts(Figures):
    """The model that it was checked on."""

    model: str
    revision: str | None
    adapter: str | None
    dtype: str


class LayerSize(Figures):
    """The vector of one layer beside the model's residual stream there."""

    layer: int
    norm: float
    """Activation units."""
    residual: float
    """Mean norm of an activation on neutral text, the first token left out."""
    ratio: float
    """Of the two: what scale 1 adds, as a share of what is there."""
    first_token_cosine: float
    """Cosine with the activation of the first token, an attention sink."""


class GiantChannels(Figures):
    """The largest channels of a vector."""

    channels: list[int]
    """The largest first."""
    share: float
    """What they hold of its squared norm."""
    random_share: float
    """What the largest as many hold of a random vector's, in one of twenty at most."""
    of_model: list[int]
    """Those of them that are giants of the model's residual stream, too."""


class CheckResult(Framed, Plotted, Result):
    """One check: the verdict, what the vector is like, and what it does."""

    KIND: ClassVar[str] = "check"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "check.json"
    COMMAND: ClassVar[str] = "misdirection check DIRECTION --json"

    verdict: Word
    because: tuple[str, ...]
    """Sentences."""
    notes: tuple[str, ...]
    """Further sentences, which have no part in the verdict."""
    rule: Rule
    direction: DirectionFacts
    model: ModelFacts
    layer: int
    """The one whose vector was added there and ablated everywhere, 0-based."""
    sizes: list[LayerSize]
    """Every layer's."""
    channels: GiantChannels
    """Of the vector of `layer`."""
    pairs: str
    """Hash of the probe pairs."""
    steering: list[Effect]
    """By scale; empty for a direction for ablation that was not asked to be added."""
    ablation: Effect

    @property
    def size(self) -> LayerSize:
        """That of the layer that was checked."""
        return self.sizes[self.layer]

    @property
    def effects(self) -> list[Effect]:
        """Of every use of the vector, the ablation last."""
        return [*self.steering, self.ablation]

    def _tables(self) -> Mapping[str, Table]:
        return {"effects": lambda: rows(self.effects), "sizes": lambda: rows(self.sizes)}

    def __repr__(self) -> str:
        return f"CheckResult({self.direction.name!r} at layer {self.layer}: {self.verdict})"

    def _repr_html_(self) -> str:
        """A notebook's view: the verdict, and why."""
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*self.because, *self.notes))
        return f"<p><b>{html.escape(self.direction.name)}: {self.verdict}</b></p><ul>{lines}</ul>"
