"""A direction for a model inside of a trainer, which need not say under which name it was loaded."""

from typing import Any

from torch import Tensor

from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.models.layers import decoder_layers, text_config
from misdirection.models.names import is_hub_id


def fitting_vectors(direction: Direction | Tensor, network: Any) -> Tensor:
    """The vectors of a direction, [layers, width]; `InputError` unless they are of this network's base model."""
    vectors = direction if isinstance(direction, Tensor) else direction.vectors
    shape = len(decoder_layers(network)), text_config(network).hidden_size
    if vectors.shape != shape:
        raise InputError(
            f"the direction has shape {list(vectors.shape)}, the model in training needs {list(shape)}: extract one "
            "from its base model"
        )
    if isinstance(direction, Direction):
        _require_base(direction, network.config.name_or_path)
    return vectors.detach()


def _require_base(direction: Direction, name: str) -> None:
    """Refuse a direction of another model of the hub; the name of a folder does not tell whose copy it holds."""
    if is_hub_id(name) and is_hub_id(direction.origin.model):
        direction.require_base(name, direction.origin.revision)
