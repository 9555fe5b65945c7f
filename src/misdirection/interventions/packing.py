"""Interventions as bytes, for another process: safetensors, with the settings as JSON in its header."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from misdirection.interventions.intervention import KINDS, Intervention

_LENGTH = 8
"""Bytes before the header that hold its length (the format of safetensors)."""


def packed(setting: Sequence[Intervention]) -> bytes:
    """The interventions, in their order, as bytes; their settings are tensors and what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    settings = []
    for number, intervention in enumerate(setting):
        values = vars(intervention)
        names = {name: f"{number}.{name}" for name, value in values.items() if isinstance(value, Tensor)}
        tensors |= {key: values[name].detach().cpu().clone() for name, key in names.items()}
        plain = {name: value for name, value in values.items() if name not in names}
        settings.append({"kind": type(intervention).__name__, "tensors": names, "plain": plain})
    return save(tensors, {"setting": json.dumps(settings)})


def unpacked(data: bytes) -> list[Intervention]:
    """The interventions that `packed` was given. Raises `InputError` for a kind that is not registered here."""
    tensors = load(data)
    return [_built(described, tensors) for described in json.loads(_metadata(data)["setting"])]


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:_LENGTH], "little")
    metadata: dict[str, str] = json.loads(data[_LENGTH : _LENGTH + length])["__metadata__"]
    return metadata


def _built(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in described["plain"].items()}
    values |= {name: tensors[key] for name, key in described["tensors"].items()}
    return KINDS[described["kind"]](**values)
