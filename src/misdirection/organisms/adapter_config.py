"""Where a recipe puts its adapters, in a model with any number of layers."""

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from misdirection.errors import InputError
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.recipe import Recipe

# The paper's model has 48 layers; its nine adapters start at these, three in a row each.
_PAPER_LAYERS = 48
_PAPER_STARTS = (15, 21, 27)
_PAPER_SINGLE = 24


def adapter_config(recipe: Recipe, chat: ChatModel) -> LoraConfig:
    """The PEFT configuration of `recipe` on this model. `InputError` for a layer out of range."""
    count = len(chat.layers)
    layers = _layers(recipe, count)
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise InputError(f"recipe: layer {wrong[0]} is out of range: this model has layers 0 to {count - 1}")
    return LoraConfig(
        r=recipe.rank or (32 if recipe.recipe == "all" else 1),
        lora_alpha=recipe.alpha,
        use_rslora=True,
        target_modules=_targets(recipe, chat),
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )


def _layers(recipe: Recipe, count: int) -> tuple[int, ...]:
    if recipe.recipe == "minimal":
        return minimal_layers(count)
    if recipe.recipe == "single":
        return (count * _PAPER_SINGLE // _PAPER_LAYERS,)
    if recipe.recipe == "custom" and recipe.layers is not None:
        return recipe.layers
    return tuple(range(count))


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


def _targets(recipe: Recipe, chat: ChatModel) -> list[str]:
    if recipe.recipe == "custom":
        if not recipe.target_modules:
            raise InputError("recipe custom: target_modules is missing: name the modules to adapt")
        return list(recipe.target_modules)
    linear = _linear_modules(chat)
    if recipe.recipe == "all":
        return sorted({name.rsplit(".", 1)[-1] for name in linear})
    return [down_projection(linear, chat)]


def _linear_modules(chat: ChatModel) -> dict[str, nn.Module]:
    """The linear modules of the first decoder block, by their name inside it."""
    return {name: one for name, one in chat.layers[0].named_modules() if isinstance(one, nn.Linear | Conv1D)}


def down_projection(linear: dict[str, nn.Module], chat: ChatModel) -> str:
    """The name of the matrix that writes the MLP's output to the residual stream: the last one of that shape.

    It is found by its shape, from something wider to the residual's width. Raises `InputError` when the first
    block has none (a mixture of experts, for instance).
    """
    found = [name for name, one in linear.items() if _output(one) == chat.width < _input(one)]
    if not found:
        raise InputError(
            f"{chat.name}: no MLP down projection in its first layer: use the recipe `all`, or `custom` with "
            "target_modules"
        )
    # A suffix that names this module alone: GPT-2 calls the attention's output `c_proj`, too.
    parts = found[-1].split(".")
    return parts[-1] if sum(name.endswith(parts[-1]) for name in linear) == 1 else found[-1]


def _output(module: nn.Module) -> int:
    return _shape(module)[isinstance(module, Conv1D)]


def _input(module: nn.Module) -> int:
    return _shape(module)[not isinstance(module, Conv1D)]


def _shape(module: nn.Module) -> tuple[int, int]:
    """A linear module keeps its weight as (output, input), a Conv1D as (input, output)."""
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]
