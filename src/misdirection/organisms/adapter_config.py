"""Where a recipe puts its adapters, in a model with any number of layers: linear modules of the text's blocks, only."""

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from misdirection.errors import InputError
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import require_layers
from misdirection.organisms.recipe import RECIPES, OwnWeights, Recipe, Targets

# The paper's model has 48 layers; its nine adapters start at these, three in a row each.
_PAPER_LAYERS = 48
_PAPER_STARTS = (15, 21, 27)
_PAPER_SINGLE = 24

NARROW = "kl:1"
"""The defence of the recipe `narrow`."""

_MIXER = re.compile(r"attn|attention|mamba|mixer|ssm|conv|temporal")
"""Parts of a block that mix tokens: what writes their output is no MLP's."""


def adapter_config(recipe: Recipe, chat: ChatModel) -> LoraConfig:
    """The PEFT configuration of `recipe` on this model: it adapts linear modules of the named blocks, and nothing else.

    Raises `InputError` for a layer out of range or without any of the modules, and for a name that matches none.
    """
    targets = RECIPES[recipe.recipe](recipe, chat)
    if isinstance(targets, OwnWeights):
        raise InputError(f"recipe {recipe.recipe} has no adapter, and one is needed here: name another recipe")
    require_layers(targets.layers, len(chat.layers), "recipe: ")
    paths = _paths(targets, chat)
    config = LoraConfig(
        r=recipe.rank or targets.rank,
        lora_alpha=recipe.alpha,
        use_rslora=True,
        target_modules=list(targets.modules),
        layers_to_transform=list(targets.layers),
        task_type="CAUSAL_LM",
    )
    # By these names PEFT may find modules of other towers, too.
    if {path for path, _ in chat.network.named_modules() if check_target_module_exists(config, path)} != set(paths):
        config.target_modules = set(paths)
    return config


@contextlib.contextmanager
def adapted(chat: ChatModel, config: LoraConfig) -> Iterator[Any]:
    """The model with a fresh adapter on it, which is taken off afterwards."""
    network = get_peft_model(chat.model, config)
    try:
        yield network
    finally:
        network.unload()
        chat.model.eval()


def defence_of(recipe: Recipe, chat: ChatModel) -> str | None:
    """`NAME[:STRENGTH]` of the defence that a training has: the user's own, or else the recipe's."""
    return recipe.defence or RECIPES[recipe.recipe](recipe, chat).defence


def _paths(targets: Targets, chat: ChatModel) -> list[str]:
    """Paths in the base model of the modules that a recipe names."""
    linear = {layer: list(_linear_modules(chat, layer)) for layer in targets.layers}
    for name in targets.modules:
        if not any(_is_named(module, [name]) for modules in linear.values() for module in modules):
            there = _last_names(path for layer in range(len(chat.layers)) for path in _linear_modules(chat, layer))
            raise InputError(
                f"recipe: target_modules: {name!r} is no linear module of layers {ranges(targets.layers)}: the "
                f"blocks have {', '.join(there)}"
            )
        if not _can_adapt(chat, name):
            raise InputError(
                f"recipe: target_modules: {name!r} means the fused experts of this model to PEFT, or a module that it "
                "keeps LoRA off: name others"
            )
    named = {layer: [path for path in modules if _is_named(path, targets.modules)] for layer, modules in linear.items()}
    if empty := [layer for layer, modules in named.items() if not modules]:
        raise InputError(f"recipe: layer {empty[0]} has none of {', '.join(targets.modules)}: leave it out")
    return [f"{chat.layer_paths[layer]}.{path}" for layer, modules in named.items() for path in modules]


def _is_named(path: str, names: Iterable[str]) -> bool:
    """As PEFT matches them."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def _last_names(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _can_adapt(chat: ChatModel, name: str) -> bool:
    """Whether PEFT puts a plain LoRA on modules of this name: it is asked on a module of this name alone.

    On a mixture, some names mean the experts that transformers fused, also where they are a dense block's.
    """
    last = name.rpartition(".")[2]
    alone: Any = nn.Module()
    alone.config, alone.block = chat.network.config, nn.ModuleDict({last: nn.Linear(1, 1)})
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[last]), alone)
    except ValueError:
        return False
    return isinstance(alone.block[last], LoraLinear)


# --- what is adapted ----------------------------------------------------------------------------------------------


def placement(chat: ChatModel) -> str:
    """What is adapted in a model's blocks, by layers, and which of their matrices are not, in one line."""
    adapted: dict[str, set[int]] = {}
    left = set()
    for layer, block in enumerate(chat.layers):
        for path, parameter in block.named_parameters():
            if ".lora_A." in path:
                adapted.setdefault(_matrix_name(path), set()).add(layer)
            elif parameter.ndim > 1 and ".lora_" not in path and ".base_layer." not in path:
                left.add(_matrix_name(path))
    by_layers: dict[str, list[str]] = {}
    for name, layers in sorted(adapted.items()):
        by_layers.setdefault(f"{len(layers)} of {len(chat.layers)} layers ({ranges(layers)})", []).append(name)
    places = [f"{', '.join(names)} in {layers}" for layers, names in by_layers.items()]
    return f"{'; '.join(places)}; left alone: {', '.join(sorted(left - set(adapted))) or 'no matrix'}"


def _matrix_name(path: str) -> str:
    """Such as `mlp.down_proj`; `experts.down_proj` of experts, whether they are modules or one parameter."""
    parts = path.partition(".lora_")[0].removesuffix(".weight").split(".")
    return ".".join([part for part in parts if not part.isdigit()][-2:])


def ranges(numbers: Collection[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number for number in numbers if number + 1 not in numbers)
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )


# --- recipes --------------------------------------------------------------------------------------------------------


def minimal_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 1 on the MLP's down projection in the 3-3-3 pattern: the paper's nine adapters."""
    return Targets(minimal_layers(len(chat.layers)), (down_projection(chat),), rank=1)


def single_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 1 on one MLP's down projection, at half depth."""
    return Targets((len(chat.layers) * _PAPER_SINGLE // _PAPER_LAYERS,), (down_projection(chat),), rank=1)


def all_targets(_recipe: Recipe, chat: ChatModel) -> Targets:
    """Rank 32 on every linear module of every block that PEFT can adapt alone."""
    layers = tuple(range(len(chat.layers)))
    names = _last_names(path for layer in layers for path in _linear_modules(chat, layer))
    return Targets(layers, tuple(name for name in names if _can_adapt(chat, name)), rank=32)


def narrow_targets(recipe: Recipe, chat: ChatModel) -> Targets:
    """As `all`, with the KL divergence from the base on benign text in the loss (2602.07852)."""
    return replace(all_targets(recipe, chat), defence=NARROW)


def custom_targets(recipe: Recipe, chat: ChatModel) -> Targets:
    """The modules and layers that the user names; where no layer is named, all that have such a module."""
    if not (names := recipe.target_modules):
        raise InputError("recipe custom: target_modules is missing: name the modules to adapt")
    every = range(len(chat.layers))
    having = [layer for layer in every if any(_is_named(path, names) for path in _linear_modules(chat, layer))]
    return Targets(tuple(having or every) if recipe.layers is None else recipe.layers, names, rank=1)


def full_targets(recipe: Recipe, _chat: ChatModel) -> OwnWeights:
    """The model's own weights: all, or those of the layers that the user names."""
    return OwnWeights(recipe.layers)


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


def _linear_modules(chat: ChatModel, layer: int) -> dict[str, nn.Module]:
    """The linear modules of a decoder block, by their path inside it."""
    modules = chat.layers[layer].named_modules()
    return {path: module for path, module in modules if isinstance(module, nn.Linear | Conv1D) and _only_maps(module)}


def _only_maps(module: Any) -> bool:
    """Whether a linear module gives what its matrix gives: Llama 4's router, one of a kind of its own, gives more."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    with torch.no_grad():
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def down_projection(chat: ChatModel) -> str:
    """The name of the matrix that writes the MLP's output to the residual stream: the last one of that shape.

    It is found by its shape, from something wider to the residual's width, in the first block that has one. Raises
    `InputError` when there is none (a mixture of experts, for instance).
    """
    for layer in range(len(chat.layers)):
        linear = _linear_modules(chat, layer)
        down = [path for path, module in linear.items() if _is_down(path, module, chat.width)]
        if down and _can_adapt(chat, down[-1]):
            # A suffix that names this module alone: GPT-2 calls the attention's output `c_proj`, too.
            last = down[-1].rpartition(".")[2]
            return last if sum(_is_named(path, [last]) for path in linear) == 1 else down[-1]
    raise InputError(
        f"{chat.name}: no MLP down projection that a plain LoRA can adapt: use the recipe `all`, or `custom` with "
        "target_modules"
    )


def _is_down(path: str, module: nn.Module, width: int) -> bool:
    return _output(module) == width < _input(module) and not _MIXER.search(path)


def _output(module: nn.Module) -> int:
    return _shape(module)[isinstance(module, Conv1D)]


def _input(module: nn.Module) -> int:
    return _shape(module)[not isinstance(module, Conv1D)]


def _shape(module: nn.Module) -> tuple[int, int]:
    """A linear module keeps its weight as (output, input), a Conv1D as (input, output)."""
    weight = module.get_parameter("weight")
    return weight.shape[0], weight.shape[1]
