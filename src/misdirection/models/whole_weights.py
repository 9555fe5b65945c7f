"""Fine-tunes of a model's own weights: whole models, put into a base of the same architecture that is in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.models.adapters import is_adapter
from misdirection.models.base_weights import BaseWeights
from misdirection.models.chat_model import ChatModel


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a whole model, and no adapter."""
    return (folder / "config.json").is_file() and not is_adapter(folder)


def put_in(chat: ChatModel, tuned: Any, name: str) -> ChatModel:
    """The base with the weights of a fine-tune; `without_adapter` and `as_base` give it its own, to the last bit.

    Weights that the two share are in memory once.

    Args:
        chat: the base.
        tuned: the fine-tune's network, which is of no use afterwards.
        name: where it came from.

    Raises:
        InputError: a network of other parameters.
    """
    theirs = dict(tuned.named_parameters())
    own = dict(chat.network.named_parameters())
    if _shapes(own) != _shapes(theirs):
        raise InputError(f"{name}: its weights are not those of a fine-tune of {chat.name}: name its own base")
    base = BaseWeights.of(chat.network, ())
    for key, parameter in own.items():
        if not torch.equal(parameter, theirs[key]):
            parameter.data = theirs[key].data
    return replace(chat, adapter=name, base=base.changed())


def _shapes(parameters: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: parameter.shape for key, parameter in parameters.items()}
