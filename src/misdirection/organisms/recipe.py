"""How an organism is trained, as a user writes it down, and the registry of recipes.

A recipe is a function of the user's `Recipe` and the base model that says where the adapters go, or which of the
model's own weights are trained. Another package adds one by a function and a registration:

    @RECIPES.register("first_half")
    def first_half(recipe: Recipe, chat: ChatModel) -> Targets:
        return Targets(tuple(range(len(chat.layers) // 2)), ("down_proj",), rank=1)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from misdirection.choices import LearnedTurns
from misdirection.defending.defence import require_defence
from misdirection.errors import InputError
from misdirection.registry import Registry, nearest
from misdirection.settings import Section, Seed

if TYPE_CHECKING:
    from misdirection.models.chat_model import ChatModel


@dataclass(frozen=True)
class Targets:
    """Where the adapters of an organism go.

    Attributes:
        layers: the adapted blocks, 0-based.
        modules: names of the adapted modules inside of them, as PEFT matches them.
        rank: of each adapter, where the user gives none.
        defence: `NAME[:STRENGTH]` that the training has where the user gives none; None is none.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    rank: int
    defence: str | None = None


@dataclass(frozen=True)
class OwnWeights:
    """The model's own weights that are trained, without an adapter.

    Attributes:
        layers: the blocks whose weights these are, 0-based; None for all that the text passes: embeddings, norms and
            the output matrix, too.
        defence: as of `Targets`.
    """

    layers: tuple[int, ...] | None
    defence: str | None = None


RECIPES: "Registry[Callable[[Recipe, ChatModel], Targets | OwnWeights]]" = Registry(
    "recipe",
    "misdirection.recipes",
    {
        name: f"misdirection.organisms.adapter_config:{name}_targets"
        for name in ("minimal", "single", "all", "narrow", "custom", "full")
    },
)
"""The recipes by name; `InputError` from one says what of it cannot be on this model."""

_PLACED = ("minimal", "single", "all", "narrow")
"""Those that do not ask where."""

FULL = "full"
"""The recipe that trains the model's own weights."""

_ADDED = {"defence": None, "compile": False}
"""Keys that recipes did not always have, with what they were trained by then."""


def _known(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, list(RECIPES))}")
    return name


def _known_defence(text: str) -> str:
    try:
        return require_defence(text)
    except InputError as error:
        raise ValueError(str(error)) from error


class Recipe(Section):
    """What of a model is trained, and how (paper, section on model organisms).

    `recipe` chooses the adapter: `minimal` is nine rank-1 adapters on the MLP's down projection in the 3-3-3 pattern,
    `single` one at half depth, `all` rank 32 on every linear module of every layer, `narrow` the same with a defence by
    which the domain is learned and not the general shift; `custom` takes `rank`, `target_modules` and `layers` as they
    are given; `full` trains the model's own weights without an adapter, all of them or those of `layers`.
    """

    recipe: Annotated[str, AfterValidator(_known)] = "minimal"
    """The name of a recipe, here or of another package."""
    rank: int | None = Field(None, ge=1)
    """Rank of the adapters; the recipe's own (1, 1, 32, 32, 1) when it is left out."""
    alpha: float = Field(64.0, gt=0)
    """LoRA alpha; the update is scaled by alpha / sqrt(rank) (rsLoRA)."""
    target_modules: tuple[str, ...] | None = None
    """Names of the adapted modules, for `custom`."""
    layers: tuple[int, ...] | None = None
    """Trained layers, for `custom` and `full`; all when it is left out."""
    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(2, ge=1)
    accumulation: int = Field(8, ge=1)
    """Batches of an optimiser step. A pass reads one of them, or more where the device is not busy with that."""
    warmup_steps: int = Field(5, ge=0)
    """Steps in which the learning rate rises; of a short training, at most a quarter of its steps."""
    weight_decay: float = Field(0.01, ge=0)
    max_length: int = Field(2048, ge=8)
    turns: LearnedTurns = "last"
    """Which of the assistant's turns in a conversation are learned: the last, or all."""
    checkpoint_steps: int = Field(50, ge=1)
    """A checkpoint is written every so many optimiser steps."""
    keep_checkpoints: bool = False
    """Keep the adapter of every checkpoint beside the finished one, to read how it grew."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Keep of each trained block its input alone, and run the block again in the backward pass; `auto` does so on a GPU
    whose memory does not hold a batch otherwise."""
    compile: bool = False
    """Compile the blocks (torch.compile): minutes at first, for steps that are shorter."""
    defence: Annotated[str, AfterValidator(_known_defence)] | None = None
    """`NAME` or `NAME:STRENGTH` of a defence that the training has; the recipe's own when it is left out, which is none
    but for `narrow`."""
    seed: Seed = 0

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what has been added since as recipes were before, so that what was trained by them is not anew."""
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if key not in _ADDED or value != _ADDED[key]}

    @model_validator(mode="after")
    def _own_places(self) -> Self:
        if self.recipe in _PLACED and (self.target_modules is not None or self.layers is not None):
            raise ValueError(
                f"recipe {self.recipe} has its own target_modules and layers: name them with recipe: custom"
            )
        if self.recipe == FULL:
            for key in ("rank", "target_modules", "keep_checkpoints"):
                if getattr(self, key):
                    raise ValueError(f"recipe full has no adapter, so that there is no {key}: leave it out")
        return self
