"""Find a model's decoder layers by structure, never by a list of model names.

Convention, everywhere in this package: layer ``k`` (0-based) is the raw output of decoder block ``k``, before the
final norm. The embedding output is not a layer.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misdirection.errors import InputError


def text_decoder(model: nn.Module) -> nn.Module:
    """The text decoder stack: below a PEFT wrapper, the language-model head and a multimodal wrapper."""
    inner: Any = model
    # Only PEFT's wrappers have the method; to ask for their class would import PEFT, which takes seconds.
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    decoder: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    # What a model calls its decoder may be the output matrix, or a language model with its own.
    if isinstance(decoder, nn.Linear) and decoder is not inner:
        decoder = inner.base_model
    elif getattr(decoder, "get_output_embeddings", lambda: None)() is not None:
        decoder = next(child for child in decoder.children() if any(True for _ in _lists(child)))
    found: nn.Module = decoder
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of `model`, first to last.

    They are the one `ModuleList` of the text decoder that has as many members as the text configuration counts
    layers. Raises `InputError` that says what was looked for when there is none.
    """
    decoder, config = text_decoder(model), text_config(model)
    # Two layers of attention in each block, or an encoder beside the decoder, are counted under other names.
    named = {name: getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "decoder_layers")}
    for count in (count for count in named.values() if count is not None):
        for blocks in _lists(decoder):
            if len(blocks) == count:
                return list(blocks)
    raise InputError(
        f"{type(model).__name__}: no decoder layers found: looked for one ModuleList of "
        f"{named['num_hidden_layers'] or 'any number of'} blocks (num_hidden_layers) inside {type(decoder).__name__}"
    )


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    return (part for part in module.modules() if isinstance(part, nn.ModuleList))


def require_layers(layers: Iterable[int], count: int, name: str = "", whose: str = "this model") -> None:
    """Raise `InputError`, which begins with `name`, for a layer that is none of so many."""
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"{name}layer {layer} is out of range: {whose} has layers 0 to {count - 1}")


def stream_of(output: Any) -> Any:
    """What a block gives to the residual stream: the first of what it returns."""
    return output[0] if isinstance(output, tuple) else output


def stream_output(block: nn.Module, output: Any, shape: Sequence[int | None]) -> Tensor:
    """`stream_of` a block's output, a tensor of `shape`, None for any size.

    Raises `InputError` where it is none: for several streams side by side there is no one activation.
    """
    residual = stream_of(output)
    given = list(residual.shape) if isinstance(residual, Tensor) else [type(residual).__name__]
    if len(given) != len(shape) or any(size not in (None, own) for size, own in zip(shape, given, strict=True)):
        raise InputError(
            f"{type(block).__name__}: gives {given}, which is not one residual stream, [rows, tokens, {shape[-1]}]: no "
            "direction can be read or changed in it"
        )
    return residual


def text_config(model: nn.Module) -> Any:
    """The configuration of the text stack, also inside a multimodal wrapper."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextlib.contextmanager
def replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block compute with `forward` for the length of the context, inside of its hooks."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def is_hooked(module: nn.Module) -> bool:
    """Whether anything listens to a module's passes, which torch itself tells by no public name."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextlib.contextmanager
def hook_handles() -> Iterator[contextlib.ExitStack]:
    """What takes hooks off a model at the end, and lets every pass until then run uncompiled.

    A pass that was compiled before a hook came does not call it, and gives its figures without a word. Raises
    `InputError` inside of a function that is being compiled itself.
    """
    with contextlib.ExitStack() as handles:
        handles.enter_context(_uncompiled())
        yield handles


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
def _uncompiled() -> contextlib.AbstractContextManager[None]:
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise InputError(
            "an intervention or another hook inside of a function under torch.compile: call that function uncompiled"
        ) from error
