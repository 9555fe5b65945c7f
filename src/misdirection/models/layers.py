"""Find a model's decoder layers by structure, never by a list of model names.

Convention, everywhere in this package: layer ``k`` (0-based) is the raw output of decoder block ``k``, before the
final norm. The embedding output is not a layer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from misdirection.errors import InputError


def text_decoder(model: nn.Module) -> nn.Module:
    """The text decoder stack: below a PEFT wrapper, the language-model head and a multimodal wrapper."""
    inner: Any = model
    # Only PEFT's wrappers have the method; to ask for their class would import PEFT, which takes seconds.
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    decoder: nn.Module = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    return decoder


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of `model`, first to last.

    They are the one `ModuleList` of the text decoder that has as many members as the text configuration counts
    layers. Raises `InputError` that says what was looked for when there is none.
    """
    decoder = text_decoder(model)
    count = getattr(text_config(model), "num_hidden_layers", "any number of")
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise InputError(
        f"{type(model).__name__}: no decoder layers found: looked for one ModuleList of {count} blocks "
        f"(num_hidden_layers) inside {type(decoder).__name__}"
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the text stack, also inside a multimodal wrapper."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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
