"""Where an intervention acts: what a module of the model gives, or what it takes."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Site:
    """One tensor of a running model.

    Attributes:
        module: the hooked module.
        part: `output` or `input`.
        layer: the block that the module is, or belongs to.
        path: of the adapted module in the base model, where an intervention differs by module.
    """

    module: nn.Module
    part: Literal["output", "input"]
    layer: int
    path: str = ""
