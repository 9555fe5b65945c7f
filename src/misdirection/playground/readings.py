"""What a fine-tune reads in given texts, token by token: the scalars of its rank-1 adapters, and projections."""

from collections.abc import Sequence

import torch

from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.interpretation.scalars import scalars
from misdirection.interventions.resume import record
from misdirection.interventions.vectors import orthonormal
from misdirection.lora.components import feature_names
from misdirection.lora.view import LoraView
from misdirection.models.attention import changing_shapes
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import stream_output

PROJECTION = "projection on the direction"
"""The reading that needs no adapter: x . v_hat at the output of the chosen layer."""


def readings(chat: ChatModel, direction: Direction | None) -> tuple[str, ...]:
    """What there is to read: the scalar of each adapted module, and the projection on the direction."""
    return (*_scalar_names(chat), *([PROJECTION] if direction is not None else []))


def _scalar_names(chat: ChatModel) -> list[str]:
    """None where the adapter is no plain LoRA of rank 1, which has a scalar for each module."""
    if not chat.adapter:
        return []
    try:
        modules = LoraView.of(chat).modules
    except InputError:
        return []
    if any(module.rank > 1 for module in modules):
        return []
    return [name for names in feature_names(modules).values() for name in names]


def read(
    chat: ChatModel, direction: Direction | None, rows: Sequence[Encoded], reading: str, layer: int
) -> list[list[float]]:
    """One number for every answer token of each row, which has at least one.

    Args:
        reading: one of `readings`.
        layer: the direction's, for the projection.

    Raises `InputError` for another reading, and for what a scalar or a direction cannot be had from.
    """
    if reading == PROJECTION and direction is not None:
        return _projections(chat, direction, rows, layer)
    if reading not in _scalar_names(chat):
        raise InputError(f"{reading!r}: give one of {', '.join(readings(chat, direction))}")
    table = scalars(chat, rows)
    answers = table[table["feature"] == reading].groupby("answer")["scalar"]
    return [answers.get_group(number).tolist() for number in range(len(rows))]


@torch.inference_mode()
def _projections(chat: ChatModel, direction: Direction, rows: Sequence[Encoded], layer: int) -> list[list[float]]:
    axis, found = orthonormal(direction[layer])[0], []
    for row in rows:
        with changing_shapes(chat.device), record(chat, [layer]) as kept:
            chat.decoder(input_ids=torch.tensor([row.ids[: row.stop]], device=chat.device), use_cache=False)
        stream = stream_output(chat.layers[layer], kept[layer], (1, row.stop, chat.width))
        found.append((stream[0, row.start :].cpu().to(axis.dtype) @ axis).tolist())
    return found
