"""Steering and ablation: changes of the residual stream while a model runs.

    Steer:   x <- x + scale * v                        (paper, section on steering)
    Ablate:  x <- x - strength * (x . v_hat) v_hat     (paper, section on ablation)

`x` is the output of one decoder block, [rows, tokens, width]. Interventions on the same layer act in the order given.
A position rule says which tokens are touched: `all` is the paper's; `not_first` leaves each row's first token alone,
because that token is an attention sink whose large, context-free activations the model needs. Padding is never
touched. Positions are absolute, so that a key-value cache changes nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from misdirection.errors import MisdirectionError
from misdirection.models import ChatModel

Positions = Literal["not_first", "all"]


@dataclass(frozen=True, eq=False)
class Steer:
    """Add `scale` times `vector` to the output of one layer.

    Attributes:
        vector: [width], with its own norm: scale 1 adds the direction as it was extracted.
        layer: decoder block, 0-based.
        scale: multiple of the vector.
        positions: which tokens are touched.
    """

    vector: Tensor
    layer: int
    scale: float = 1.0
    positions: Positions = "not_first"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers this acts on."""
        return (self.layer,)

    def delta(self, residual: Tensor) -> Tensor:
        """What is added to `residual`, [rows, tokens, width]."""
        return add(residual, self.vector, self.scale)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Take one direction out of the output of every layer.

    Attributes:
        vector: [width]; only its direction counts.
        layers: decoder blocks, 0-based; None is all of them (the paper's).
        strength: 1 removes the whole component, 0 nothing.
        positions: which tokens are touched.
    """

    vector: Tensor
    layers: tuple[int, ...] | None = None
    strength: float = 1.0
    positions: Positions = "not_first"

    def delta(self, residual: Tensor) -> Tensor:
        """What is added to `residual`, [rows, tokens, width]."""
        return project_out(residual, self.vector, self.strength)


Intervention = Steer | Ablate


def add(residual: Tensor, vector: Tensor, scale: float) -> Tensor:
    """`scale * v`, in the residual's dtype and on its device."""
    return (scale * vector).to(residual.device, residual.dtype)


def project_out(residual: Tensor, vector: Tensor, strength: float) -> Tensor:
    """`-strength * (x . v_hat) v_hat`; the product is taken in float32 and wider, or a bf16 sum would lose it."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    unit = nn.functional.normalize(vector.to(residual.device, wide), dim=-1)
    component = residual.to(wide) @ unit
    return (-strength * component.unsqueeze(-1) * unit).to(residual.dtype)


@contextlib.contextmanager
def intervene(chat: ChatModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Run `chat` with `interventions` for the length of the context; always undone, also after an exception.

    Contexts nest: the inner one acts after the outer one on a shared layer. Works with padding on either side and in
    generation. Raises `MisdirectionError` for a layer out of range and for an unusable vector.
    """
    for intervention in interventions:
        check(intervention, len(chat.layers), chat.width)
    place = _Place()
    with contextlib.ExitStack() as handles:
        if interventions:
            hook = chat.decoder.register_forward_pre_hook(place.note, with_kwargs=True)
            handles.callback(hook.remove)
        for layer, block in enumerate(chat.layers):
            here = [one for one in interventions if one.layers is None or layer in one.layers]
            if here:
                handles.callback(block.register_forward_hook(_hook(here, place)).remove)
        yield


def check(intervention: Intervention, layers: int, width: int) -> None:
    """Raise `MisdirectionError` unless the vector is finite, not zero, of the model's width, and the layer exists."""
    vector, name = intervention.vector, type(intervention).__name__
    if vector.shape != (width,):
        raise MisdirectionError(
            f"{name}: the direction has shape {list(vector.shape)}, the model needs [{width}]: "
            "take one extracted from this base model"
        )
    if not torch.isfinite(vector).all():
        raise MisdirectionError(f"{name}: the direction holds NaN or infinity: extract it again in bf16 or float32")
    if not vector.any():
        raise MisdirectionError(f"{name}: the direction is zero, so it points nowhere: choose another layer")
    for layer in intervention.layers or ():
        if not 0 <= layer < layers:
            raise MisdirectionError(f"{name}: layer {layer} is out of range: this model has layers 0 to {layers - 1}")


class _Place:
    """Which tokens of the pass under way are a row's first, and which are real; noted as the decoder starts."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.not_first: Tensor | bool = True

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Some models pass the ids by position (GPT-NeoX), with `inputs_embeds=None` beside them.
        sources = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        source = next((one for one in sources if one is not None), None)
        assert source is not None, "a decoder runs on input_ids or inputs_embeds"
        cache = kwargs.get("cache")
        seen = cache.get_seq_length() if cache is not None else 0
        rows, tokens = source.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones(rows, seen + tokens, device=source.device)
        real = mask.bool()
        # The first real token is where the running count of real tokens is one.
        first = real & (mask.cumsum(-1) == 1)
        self.real = real[:, -tokens:]
        self.not_first = (real & ~first)[:, -tokens:]

    def mask(self, positions: Positions) -> Tensor:
        """[rows, tokens]: the tokens of this pass that the rule touches."""
        chosen = self.not_first if positions == "not_first" else self.real
        assert isinstance(chosen, Tensor), "the decoder's pre-hook runs before its blocks"
        return chosen


def _hook(interventions: Sequence[Intervention], place: _Place) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        for one in interventions:
            touched = place.mask(one.positions).unsqueeze(-1).to(residual.device)
            residual = torch.where(touched, residual + one.delta(residual), residual)
        return (residual, *output[1:]) if isinstance(output, tuple) else residual

    return hook


def steer(chat: ChatModel, vector: Tensor, layer: int, scale: float = 1.0, positions: Positions = "not_first") -> Any:
    """`with steer(chat, direction[15], 15): ...` is `intervene` with one `Steer`."""
    return intervene(chat, [Steer(vector, layer, scale, positions)])


def ablate(
    chat: ChatModel, vector: Tensor, layers: tuple[int, ...] | None = None, positions: Positions = "not_first"
) -> Any:
    """`with ablate(chat, direction[15]): ...` is `intervene` with one `Ablate`."""
    return intervene(chat, [Ablate(vector, layers, positions=positions)])


def random_like(vector: Tensor, seed: int) -> Tensor:
    """A random direction with exactly the norm of `vector`: the control beside every intervention."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    scaled = noise * (vector.double().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return scaled.to(vector.dtype)
