"""Run a model with interventions: plain forward hooks under one context manager that always undoes itself.

One context carries one list of interventions for every row, or one list for each row, so that a whole sweep runs as a
stream of full batches. Rows that carry the same kind share one batched operation.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.interventions.kinds import Ablate, Intervention, ProjectAdapters, ScaleAdapters, Steer, check
from misdirection.interventions.positions import Place, Rule
from misdirection.interventions.program import Compiler, Devices, Step
from misdirection.interventions.writers import post_norms, role, sublayers
from misdirection.models.chat_model import ChatModel

Setting = Sequence[Intervention]
"""What is done to one row: interventions in the order in which they act; empty for nothing."""


@contextlib.contextmanager
def intervene(chat: ChatModel, interventions: Setting, *, answer_starts: Sequence[int] | None = None) -> Iterator[None]:
    """Run `chat` with `interventions` for the length of the context; always undone, also after an exception.

    Contexts nest: the inner one acts after the outer one on a shared layer. Works with padding on either side, in
    generation, in training (call `backward()` inside the context if activations are checkpointed), on a model with
    adapters, and on one spread over devices.

    Args:
        chat: the model; `chat.model` and `chat.decoder` are both affected.
        interventions: in the order in which they act on a shared layer.
        answer_starts: tokens before each row's answer, for the position rules `prompt` and `answer`.

    Raises:
        InputError: a layer out of range, an unusable vector, no adapter to scale.
    """
    with _hooked(chat, [interventions], Place(answer_starts)):
        yield


@contextlib.contextmanager
def intervene_rows(
    chat: ChatModel, rows: Sequence[Setting], *, answer_starts: Sequence[int] | None = None
) -> Iterator[None]:
    """Like `intervene`, with a list of interventions for each row of the passes inside of the context.

    Raises `InputError` also when a pass has another number of rows.
    """
    alike = all(row is rows[0] for row in rows)
    with _hooked(chat, rows[:1] if alike else rows, Place(answer_starts, len(rows))):
        yield


def steer(chat: ChatModel, vector: Tensor, layer: int, scale: float = 1.0, positions: Rule = "not_first") -> Any:
    """`with steer(chat, direction[15], 15): ...` is `intervene` with one `Steer`."""
    return intervene(chat, [Steer(vector, layer, scale, positions)])


def ablate(
    chat: ChatModel, vector: Tensor, layers: tuple[int, ...] | None = None, positions: Rule = "not_first"
) -> Any:
    """`with ablate(chat, direction[15]): ...` is `intervene` with one `Ablate`."""
    return intervene(chat, [Ablate(vector, layers, positions=positions)])


@dataclass(frozen=True)
class Site:
    """Where interventions act: what a module gives, or what it takes.

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


@contextlib.contextmanager
def _hooked(chat: ChatModel, rows: Sequence[Setting], place: Place) -> Iterator[None]:
    compiler, devices = Compiler(), Devices()
    with contextlib.ExitStack() as handles:
        handles.callback(place.close)
        sites = gather(chat, rows)
        if sites:
            for whole in _wholes(chat):
                handles.callback(whole.register_forward_pre_hook(place.note_outer, with_kwargs=True).remove)
            handles.callback(chat.decoder.register_forward_pre_hook(place.note, with_kwargs=True).remove)
        for layer in {site.layer for site in sites}:
            handles.callback(chat.layers[layer].register_forward_hook(_remember(place)).remove)
        for site, here in sites.items():
            handles.callback(
                _register(site, _Hook(compiler.steps(here, site.path or site.layer), place, devices)).remove
            )
        yield


def _wholes(chat: ChatModel) -> list[nn.Module]:
    """The modules that are called with a whole pass: PEFT's wrapper in a forward pass, the one inside to generate."""
    inside = getattr(chat.model, "get_base_model", None)
    return [chat.model, inside()] if inside else [chat.model]


def _remember(place: Place) -> Callable[..., None]:
    """A forward hook of a block: where this pass stood is restored before the block runs again.

    A checkpointed block runs again, with the hooks inside of it, while gradients flow, when a later pass may already
    have been noted.
    """

    def remember(module: nn.Module, _args: Any, output: Any) -> None:
        residual = output[0] if isinstance(output, tuple) else output
        if not (residual.requires_grad and getattr(module, "gradient_checkpointing", False)):
            return
        snapshot = place.snapshot()

        def restore(_gradient: Tensor) -> None:
            if not place.active:
                raise InputError(
                    "backward() ran after the interventions were undone, while activations are checkpointed: call it "
                    "inside of the context"
                )
            place.restore(snapshot)

        residual.register_hook(restore)

    return remember


def gather(chat: ChatModel, rows: Sequence[Setting]) -> dict[Site, list[list[Intervention]]]:
    """For every place of the model where something acts, what acts there on each row."""
    distinct = {id(one): one for row in rows for one in row}
    sites = {key: _sites(chat, one) for key, one in distinct.items()}
    gathered: dict[Site, list[list[Intervention]]] = {}
    for number, row in enumerate(rows):
        for one in row:
            for site in sites[id(one)]:
                gathered.setdefault(site, [[] for _ in rows])[number].append(one)
    return gathered


def _sites(chat: ChatModel, one: Intervention) -> list[Site]:
    check(one, len(chat.layers), chat.width)
    if isinstance(one, ScaleAdapters):
        return [Site(module, "output", layer) for layer in one.layers for module in adapter_outputs(chat, layer)]
    if isinstance(one, ProjectAdapters):
        return _module_sites(chat, one)
    if isinstance(one, Ablate) and one.at == "adapters":
        return _adapter_writes(chat)
    if isinstance(one, Ablate) and one.at == "writes":
        written = [Site(part, "output", layer) for layer, block in enumerate(chat.layers) for part in sublayers(block)]
        return [Site(chat.layers[0], "input", 0), *written]
    layers = range(len(chat.layers)) if one.layers is None else one.layers
    return [Site(chat.layers[layer], "output", layer) for layer in layers]


def _module_sites(chat: ChatModel, one: ProjectAdapters) -> list[Site]:
    """What B gives in every named module."""
    found = {
        path: Site(module.lora_B[adapter], "output", layer, path)
        for path, (layer, module, adapter) in adapted_modules(chat).items()
    }
    if strange := [name for name in one.bases if name not in found]:
        raise InputError(f"ProjectAdapters: {strange[0]} has no LoRA adapter inside of the decoder blocks")
    return [found[name] for name in one.bases]


def adapted_modules(chat: ChatModel) -> dict[str, tuple[int, Any, str]]:
    """Layer, PEFT layer and active adapter of every adapted module inside of the blocks, by its path in the base model.

    Raises `InputError` for adapters that are not plain LoRA.
    """
    network = chat.model.get_base_model() if hasattr(chat.model, "get_base_model") else chat.model
    paths = {id(module): name for name, module in network.named_modules()}
    return {
        paths[id(module)]: (layer, module, adapter)
        for layer in range(len(chat.layers))
        for _, module, adapter in _plain_lora(chat, layer)
    }


def _adapter_writes(chat: ChatModel) -> list[Site]:
    """What the adapters of the matrices that write to the stream add."""
    if any(post_norms(block) for block in chat.layers):
        raise InputError("Ablate: at='adapters': norms stand between this model's matrices and its stream")
    found = [
        Site(module.lora_B[adapter], "output", layer)
        for layer in range(len(chat.layers))
        for name, module, adapter in _plain_lora(chat, layer)
        if role(f"{name}.weight") == "writer"
    ]
    if not found:
        raise InputError("Ablate: at='adapters': no adapter of this model writes to the residual stream")
    return found


def adapter_outputs(chat: ChatModel, layer: int) -> list[nn.Module]:
    """The `lora_B` modules of the active adapters in one block: what they give is what the adapters add, unscaled.

    Raises `InputError` when there is none, and for adapters whose contribution is not that output alone.
    """
    found: list[nn.Module] = [module.lora_B[adapter] for _, module, adapter in _plain_lora(chat, layer)]
    if not found:
        raise InputError(f"ScaleAdapters: layer {layer} has no LoRA adapter to scale: load one, or name its layers")
    return found


def _plain_lora(chat: ChatModel, layer: int) -> Iterator[tuple[str, Any, str]]:
    """Name inside of one block, PEFT layer and adapter of every active adapter in it."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in chat.layers[layer].named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.merged:
            raise InputError(f"ScaleAdapters: the adapter is merged into {name}: load it unmerged")
        for adapter in module.active_adapters:
            if adapter in module.lora_variant or isinstance(module, ParamWrapper):
                kind = type(module.lora_variant.get(adapter, module)).__name__
                raise InputError(
                    f"ScaleAdapters: {name} is not plain LoRA ({kind}): no one matrix gives what its adapter adds"
                )
            if adapter in module.lora_B:
                yield name, module, adapter


class _Hook:
    """Changes one tensor that passes; works as a forward hook and as a forward pre-hook."""

    def __init__(self, steps: list[Step], place: Place, devices: Devices) -> None:
        self._steps = steps
        self._place = place
        self._devices = devices

    def output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        residual = self._change(output[0] if isinstance(output, tuple) else output)
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    def input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._change(kwargs["hidden_states"])}

    def _change(self, x: Tensor) -> Tensor:
        # The shared expert of a mixture sees its tokens without rows.
        shaped = x.view(*self._place.shape, -1) if x.ndim == 2 else x
        for step in self._steps:
            shaped = step.run(shaped, self._place, self._devices)
        return shaped.view(x.shape)


def _register(site: Site, hook: _Hook) -> Any:
    if site.part == "input":
        return site.module.register_forward_pre_hook(hook.input, with_kwargs=True)
    return site.module.register_forward_hook(hook.output)
