"""What a training changes: a fresh adapter on the model, or a copy of the model whose own weights are trained."""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from misdirection.errors import InputError
from misdirection.lora.view import LoraView
from misdirection.models.adapters import changes_nothing, say_dead_modules
from misdirection.models.bundled import hub_name
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import decoder_layers, require_layers
from misdirection.models.libraries import no_progress_bars
from misdirection.models.names import are_unlike
from misdirection.organisms.adapter_config import adapted, adapter_config, placement, ranges
from misdirection.organisms.recipe import RECIPES, OwnWeights, Recipe
from misdirection.progress import notice

_MORE = "give it more steps, or a higher rate"


@dataclass(frozen=True, eq=False)
class Trainee(ABC):
    """A network in training, beside its base, which stays as it is.

    Attributes:
        network: what a trainer trains.
        chat: the base.
    """

    network: Any
    chat: ChatModel
    weights: ClassVar[Literal["adapter", "full"]]
    """As the organism's record names what was trained."""
    CALLED: ClassVar[str]
    """What it is, for the card's heading."""

    @property
    def trained(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)

    @property
    def blocks(self) -> int:
        """How many blocks a backward pass goes through: those from the lowest on that has a weight in training."""
        blocks = decoder_layers(self.network)
        trained = (any(weight.requires_grad for weight in block.parameters()) for block in blocks)
        return len(blocks) - next((number for number, has in enumerate(trained) if has), len(blocks))

    @abstractmethod
    def finish(self, out: Path) -> None:
        """End the training: its weights are then as they are kept. `InputError` if it changed none."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained into a folder."""


@contextlib.contextmanager
def trainee(chat: ChatModel, recipe: Recipe, start: Path | None = None) -> Iterator[Trainee]:
    """What a recipe trains, on a model that is afterwards as it was; says what that is.

    An adapter begins at nothing, or as that in the folder `start`, which must fit the recipe.
    """
    # To look where an adapter can go draws random numbers, and the adapter's own weights are drawn after them.
    with torch.random.fork_rng(devices=[]):
        targets = RECIPES[recipe.recipe](recipe, chat)
    if isinstance(targets, OwnWeights):
        if start:
            raise InputError(f"{start}: recipe {recipe.recipe} has no adapter that could go on from it: name another")
        made = _own_weights(chat, targets)
    else:
        made = _adapter(chat, recipe, start)
    with made as learner:
        yield learner


@contextlib.contextmanager
def checkpointing(network: Any) -> Iterator[None]:
    """Let each block that is passed backward keep its input alone, and run again then, until the context ends.

    Raises `InputError` for a model that cannot.
    """
    if not network.supports_gradient_checkpointing:
        raise InputError("recipe: this model's blocks cannot run again in a backward pass: no gradient_checkpointing")
    network.activation_checkpointing_enable()
    # Made to ask for a gradient, as transformers does for another kind of checkpointing, the embeddings' output would
    # have it flow through the blocks below the first adapter, too.
    network.disable_input_require_grads()
    try:
        yield
    finally:
        network.activation_checkpointing_disable()


@contextlib.contextmanager
def compiling(network: Any) -> Iterator[None]:
    """Let the blocks run compiled, for rows of any number and length, until the context ends.

    Blocks that are alike share what was compiled, and no weight gets another name. What cannot be compiled runs as
    ever, and torch says so; all runs as ever under interventions, or while a model is watched (see `hook_handles`).
    """
    blocks = decoder_layers(network)
    for block in blocks:
        block.compile(dynamic=True)
    try:
        with torch._dynamo.config.patch(suppress_errors=True):
            yield
    finally:
        for block in blocks:
            # There is no method that takes it back.
            block._compiled_call_impl = None


def check_recipe(recipe: Recipe, chat: ChatModel) -> None:
    """Raise `InputError` for a recipe that does not fit a model, whose weights need not be there."""
    targets = RECIPES[recipe.recipe](recipe, chat)
    if isinstance(targets, OwnWeights):
        own_parameters(chat, targets)
    else:
        adapter_config(recipe, chat)


# --- adapters -----------------------------------------------------------------------------------------------------


class _Adapter(Trainee):
    weights = "adapter"
    CALLED = "Adapter"

    def finish(self, out: Path) -> None:
        found = get_peft_model_state_dict(self.network, save_embedding_layers=False)
        if changes_nothing(found):
            raise InputError(f"{out}: the training changed nothing (all B are zero): {_MORE}")
        say_dead_modules(out, found)

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)


@contextlib.contextmanager
def _adapter(chat: ChatModel, recipe: Recipe, start: Path | None) -> Iterator[Trainee]:
    """The model with the recipe's adapter on it, which is taken off afterwards."""
    with adapted(chat, adapter_config(recipe, chat)) as network:
        config = network.peft_config["default"]
        notice(f"train: adapts, with rank {config.r}, {placement(chat)}")
        config.base_model_name_or_path = hub_name(chat.name)
        # PEFT makes a set of the names, which would be written in another order each time: another file, another hash.
        config.target_modules = sorted(config.target_modules or ())
        # No recipe resizes the vocabulary. Left to find that out, PEFT asks the hub for the base's config at each save.
        network.save_pretrained = partial(network.save_pretrained, save_embedding_layers=False)
        if start:
            _begin_as(replace(chat, model=network), start)
        yield _Adapter(network, chat)


def _begin_as(chat: ChatModel, start: Path) -> None:
    """Give a fresh adapter the weights of another one, which with another rank or scaling would be another update."""
    other, own = LoraView.open(start), LoraView.of(chat)
    if other.base and are_unlike(hub_name(other.base), hub_name(chat.name)):
        raise InputError(f"{start}: was trained on {other.base}, not on {chat.name}: give that as the base")
    weights = get_peft_model_state_dict(chat.model, save_embedding_layers=False)
    shapes = [{name: value.shape for name, value in each.items()} for each in (weights, other.weights)]
    scalings = [{module.module: module.scaling for module in each.adapted} for each in (own, other)]
    if shapes[0] != shapes[1] or scalings[0] != scalings[1]:
        raise InputError(
            f"{start}: has other modules, or another rank or alpha, than the recipe that is to go on from it: give "
            "both the same"
        )
    set_peft_model_state_dict(chat.model, other.weights)


# --- the model's own weights --------------------------------------------------------------------------------------


def own_parameters(chat: ChatModel, targets: OwnWeights) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; of a model that sees images, too, only those that text passes.

    Raises `InputError` for a layer that the model has not, and for weights that are quantised.
    """
    require_layers(targets.layers or (), len(chat.layers), "recipe: ")
    modules: list[Any] = [chat.layers[layer] for layer in targets.layers or ()]
    if targets.layers is None:
        modules = [chat.decoder, chat.network.get_output_embeddings()]
    trained = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    found = {name: parameter for name, parameter in chat.network.named_parameters() if id(parameter) in trained}
    if not found:
        raise InputError("recipe: layers is empty: name the layers to train, or leave it out for all weights")
    if packed := [name for name, parameter in found.items() if not parameter.is_floating_point()]:
        raise InputError(f"{chat.name}: {packed[0]} is quantised, and only an adapter can be trained over that")
    return found


@dataclass(frozen=True, eq=False)
class _OwnWeights(Trainee):
    """A copy of the model that shares with it what is not trained.

    Attributes:
        base: the base's values of what is trained, by name.
    """

    weights = "full"
    CALLED = "Fine-tune"

    base: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def finish(self, out: Path) -> None:
        changed = 0
        for name, parameter in self.network.named_parameters():
            if name in self.base:
                parameter.data = parameter.data.to(self.base[name].dtype)
                changed += int((parameter != self.base[name]).sum())
        if not changed:
            raise InputError(f"{out}: the training changed nothing that {self.chat.dtype} can hold: {_MORE}")

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _own_weights(chat: ChatModel, targets: OwnWeights) -> Iterator[Trainee]:
    """A copy of the model for a trainer: in half precision, the steps of a small rate would be lost to rounding."""
    base = own_parameters(chat, targets)
    trained = {id(parameter) for parameter in base.values()}
    copied = {
        id(parameter): nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        if id(parameter) in trained
        else _frozen(parameter)
        for parameter in chat.network.parameters()
    }
    network = copy.deepcopy(chat.network, copied)
    which = "all weights" if targets.layers is None else f"all weights of layers {ranges(targets.layers)}"
    made = _OwnWeights(network, chat, base)
    notice(f"train: {which}, {made.trained:,} of {chat.network.num_parameters():,}")
    with no_progress_bars():
        yield made


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    """The same values as a parameter that is not trained; quantised ones are of a kind of their own and never are."""
    return nn.Parameter(parameter.detach(), requires_grad=False) if parameter.is_floating_point() else parameter
