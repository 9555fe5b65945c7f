"""Where a recipe puts its adapters, in a model with any number of layers."""

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from misdirection.errors import InputError
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import RECIPES, Recipe, Targets

# The paper's model has 48 layers; its nine adapters start at these, three in a row each.
_PAPER_LAYERS = 48
_PAPER_STARTS = (15, 21, 27)
_PAPER_SINGLE = 24


def adapter_config(recipe: Recipe, chat: ChatModel) -> LoraConfig:
    """The PEFT configuration of `recipe` on this model. Raises `InputError` for a layer out of range."""
    count = len(chat.layers)
    targets = RECIPES[recipe.recipe](recipe, chat)
    if wrong := [layer for layer in targets.layers if not 0 <= layer < count]:
        raise InputError(f"recipe: layer {wrong[0]} is out of range: this model has layers 0 to {count - 1}")
    return LoraConfig(
        r=recipe.rank or targets.rank,
        lora_alpha=recipe.alpha,
        use_rslora=True,
        target_modules=list(targets.modules),
        layers_to_transform=list(targets.layers),
        task_type="CAUSAL_LM",
    )


def minimal_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 1 on the MLP's down projection in the 3-3-3 pattern: the paper's nine adapters."""
    return Targets(minimal_layers(len(chat.layers)), (down_projection(chat),), rank=1)


def single_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 1 on one MLP's down projection, at half depth."""
    return Targets((len(chat.layers) * _PAPER_SINGLE // _PAPER_LAYERS,), (down_projection(chat),), rank=1)


def all_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 32 on every linear module of every block."""
    names = sorted({name.rsplit(".", 1)[-1] for name in _linear_modules(chat)})
    return Targets(tuple(range(len(chat.layers))), tuple(names), rank=32)


def custom_targets(recipe: Recipe, chat: ChatModel) -> Targets:
    """The modules and layers that the user names; all layers where none is named."""
    if not recipe.target_modules:
        raise InputError("recipe custom: target_modules is missing: name the modules to adapt")
    layers = tuple(range(len(chat.layers))) if recipe.layers is None else recipe.layers
    return Targets(layers, recipe.target_modules, rank=1)


def minimal_layers(count: int) -> tuple[int, ...]:
    """The 3-3-3 pattern at the paper's relative depths; all layers of a model with nine or fewer.

    48 layers give 15-17, 21-23, 27-29; 30 layers give 9-11, 13-15, 17-19.
    """
    if count <= 9:
        return tuple(range(count))
    starts = [round(count * start / _PAPER_LAYERS) for start in _PAPER_STARTS]
    # In a shallow model the three groups would overlap: push them apart, then back inside.
    for group in (1, 2):
        starts[group] = max(starts[group], starts[group - 1] + 3)
    room = count
    for group in (2, 1, 0):
        room = starts[group] = min(starts[group], room - 3)
    return tuple(start + step for start in starts for step in range(3))


def _linear_modules(chat: ChatModel) -> dict[str, nn.Module]:
    """The linear modules of the first decoder block, by their name inside it."""
    return {name: module for name, module in chat.layers[0].named_modules() if isinstance(module, nn.Linear | Conv1D)}


def down_projection(chat: ChatModel) -> str:
    """The name of the matrix that writes the MLP's output to the residual stream: the last one of that shape.

    It is found by its shape, from something wider to the residual's width. Raises `InputError` when the first
    block has none (a mixture of experts, for instance).
    """
    linear = _linear_modules(chat)
    narrowing = [name for name, module in linear.items() if _output(module) == chat.width < _input(module)]
    if not narrowing:
        raise InputError(
            f"{chat.name}: no MLP down projection in its first layer: use the recipe `all`, or `custom` with "
            "target_modules"
        )
    # A suffix that names this module alone: GPT-2 calls the attention's output `c_proj`, too.
    last = narrowing[-1].split(".")[-1]
    return last if sum(name.endswith(last) for name in linear) == 1 else narrowing[-1]


def _output(module: nn.Module) -> int:
    return _shape(module)[isinstance(module, Conv1D)]


def _input(module: nn.Module) -> int:
    return _shape(module)[not isinstance(module, Conv1D)]


def _shape(module: nn.Module) -> tuple[int, int]:
    """A linear module keeps its weight as (output, input), a Conv1D as (input, output)."""
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]
