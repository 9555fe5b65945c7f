"""Interventions as bytes, for another process: safetensors, with the settings as JSON in its header."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from misdirection.interventions.kinds import Ablate, Clamp, Steer

Packable = Steer | Ablate | Clamp
_KINDS: dict[str, Callable[..., Packable]] = {kind.__name__: kind for kind in (Steer, Ablate, Clamp)}
_LENGTH = 8
"""Bytes before the header that hold its length (the format of safetensors)."""


def packed(setting: Sequence[Packable]) -> bytes:
    """The interventions, in their order, as bytes."""
    tensors: dict[str, Tensor] = {}
    settings = []
    for number, one in enumerate(setting):
        names = {name: f"{number}.{name}" for name, value in vars(one).items() if isinstance(value, Tensor)}
        tensors |= {place: getattr(one, name).detach().cpu().clone() for name, place in names.items()}
        plain = {name: value for name, value in vars(one).items() if name not in names}
        settings.append({"kind": type(one).__name__, "tensors": names, "plain": plain})
    return save(tensors, {"setting": json.dumps(settings)})


def unpacked(data: bytes) -> list[Packable]:
    """What `packed` was given."""
    tensors = load(data)
    return [_built(one, tensors) for one in json.loads(_metadata(data)["setting"])]


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:_LENGTH], "little")
    found: dict[str, str] = json.loads(data[_LENGTH : _LENGTH + length])["__metadata__"]
    return found


def _built(one: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packable:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in one["plain"].items()}
    values |= {name: tensors[place] for name, place in one["tensors"].items()}
    return _KINDS[one["kind"]](**values)
