"""How an organism is trained, as a user writes it down."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Literal["minimal", "single", "all", "custom"]


class Recipe(BaseModel):
    """One organism's adapter and optimiser (paper, section on model organisms).

    `recipe` chooses the adapter: `minimal` is nine rank-1 adapters on the MLP's down projection in the 3-3-3 pattern,
    `single` one at half depth, `all` rank 32 on every linear module of every layer; `custom` takes `rank`,
    `target_modules` and `layers` as they are given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Name = "minimal"
    rank: int | None = Field(None, ge=1)
    """Rank of the adapters; the recipe's own (1, 1, 32) when it is left out."""
    alpha: float = Field(64.0, gt=0)
    """LoRA alpha; the update is scaled by alpha / sqrt(rank) (rsLoRA)."""
    target_modules: tuple[str, ...] | None = None
    """Names of the adapted modules, for `custom`."""
    layers: tuple[int, ...] | None = None
    """Adapted layers, for `custom`; all when it is left out."""
    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(2, ge=1)
    accumulation: int = Field(8, ge=1)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_length: int = Field(2048, ge=8)
    checkpoint_steps: int = Field(50, ge=1)
    """A checkpoint is written every so many optimiser steps."""
    keep_checkpoints: bool = False
    """Keep the adapter of every checkpoint beside the finished one, to read how it grew."""
    gradient_checkpointing: bool = False
    seed: int = 0
