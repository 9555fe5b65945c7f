"""Noise beside a LoRA: random updates of the same modules and the same rank, orthogonal to its own.

In each adapted module, with standard normal A' and B' of the shapes of A and B,

    N = c (B' A' - <B' A', B A> / |B A|^2  B A),     <N, B A> = 0,     |N| = |B A|          (Frobenius)

so that `scaling * (B A + size N)` is the update with noise of `size` times its norm, spread over modules as the update
is. It depends on the product B A alone, not on how a training shared it between A and B, and has a meaning at any rank.
Noise in all entries of the weights would be as large as the model.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from misdirection.lora.components import LoraModule, inner
from misdirection.lora.view import LoraSite, LoraView
from misdirection.models.chat_model import ChatModel


def orthogonal(module: LoraModule, generator: torch.Generator) -> LoraModule:
    """A random adapter of the same module, orthogonal to a given one and of its norm; that one must add something."""
    a, b = (torch.randn(side.shape, generator=generator) for side in (module.a, module.b))
    drawn = replace(module, a=a, b=b)
    share = inner(drawn, module) / inner(module, module)
    rest = replace(module, a=torch.cat([a, module.a]), b=torch.cat([b, -share * module.b], 1))
    return replace(rest, b=module.norm / rest.norm * rest.b)


class OrthogonalNoise:
    """Noise that can be put beside the adapter of a loaded model.

    Args:
        chat: a model with one plain LoRA on linear modules; `InputError` for another one.
        seed: of the noise, which is the same on all devices.
    """

    def __init__(self, chat: ChatModel, seed: int) -> None:
        view, generator = LoraView.of(chat), torch.Generator().manual_seed(seed)
        self._noise = [(view.linear_sites[each.module], orthogonal(each, generator)) for each in view.modules]

    @contextlib.contextmanager
    def added(self, size: float) -> Iterator[None]:
        """Add it, `size` times as long as the adapter's own update, for the length of the context."""
        with contextlib.ExitStack() as stack:
            for site, noise in self._noise:
                stack.enter_context(_beside(site, noise.a, size * noise.b))
            yield


@contextlib.contextmanager
def _beside(site: LoraSite, a: Tensor, b: Tensor) -> Iterator[None]:
    """More rows of A and columns of B."""
    sides = site.module.lora_A[site.adapter], site.module.lora_B[site.adapter]
    own = [side.weight for side in sides]
    wider = [
        torch.cat([weight, more.to(weight)], dim) for dim, (weight, more) in enumerate(zip(own, (a, b), strict=True))
    ]
    try:
        for side, weight in zip(sides, wider, strict=True):
            side.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for side, weight in zip(sides, own, strict=True):
            side.weight = weight
