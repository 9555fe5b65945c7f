"""What kind of model a configuration is of, and whether it is a decoder: one that continues text, token by token."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from misdirection.errors import InputError, first_line
from misdirection.models.caching import takes_positions
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import text_config

_TOKENS, _SHORT = 48, 40
_SEEN, _SEEN_IN_HALF = 0.01, 0.2
"""What rounding may move logits by, in their standard deviations; attention to what should not be seen moves them by
far more."""


def auto_class(name: str, config: Any) -> Any:
    """The class of transformers that makes a model with a language-model head of `config`, with images or without."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise InputError(f"{name}: is a model of the type {config.model_type!r}, which is not a causal language model")


@torch.inference_mode()
def require_decoder(chat: ChatModel) -> None:
    """Run a short text alone, beside a longer one, and with another last token; `InputError` unless it stays itself.

    So the model runs on text without an image, its blocks are found, no token sees a later one, and padding on the
    right changes nothing.
    """
    kind = f"{chat.name}: is a {type(chat.network).__name__} (type {chat.network.config.model_type!r}), which"
    try:
        alone, padded, changed = _looks(chat)
    except InputError:
        raise
    # Whatever a model raises that misses its image, its boxes or its encoder.
    except Exception as error:
        raise InputError(f"{kind} does not run on text alone ({first_line(error, 120)})") from error
    if len(alone) != _TOKENS:
        raise InputError(f"{kind} does not continue the text that it is given")
    if _moved(alone[:-1], changed[:-1]):
        raise InputError(f"{kind} lets tokens see later ones: it does not continue text, as a chat model does")
    if _moved(alone[:_SHORT], padded[:_SHORT]):
        raise InputError(f"{kind} gives other figures for rows that are padded, or whose positions are given")


def _looks(chat: ChatModel) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens, vocabulary] of the text alone, in a padded row, and with another last token."""
    vocabulary = int(text_config(chat.model).vocab_size)
    ids = torch.arange(5, 5 + _TOKENS, device=chat.device).remainder(vocabulary).unsqueeze(0)
    both = torch.cat([ids, ids])
    both[1, -1] = ids[0, 0]
    mask = torch.ones_like(both)
    mask[0, _SHORT:] = 0
    # As passes give them: a model may count its positions from another number on.
    places = torch.arange(_TOKENS, device=chat.device).repeat(2, 1)
    given = {"position_ids": places} if takes_positions(chat) else {}
    padded, changed = _logits(chat, input_ids=both, attention_mask=mask, **given)
    seen: list[Any] = []
    with chat.layers[0].register_forward_hook(lambda _block, _args, output: seen.append(output)):
        alone = _logits(chat, input_ids=ids)[0]
    residual = seen[0][0] if seen and type(seen[0]) is tuple else next(iter(seen), None)
    if not isinstance(residual, Tensor) or _TOKENS not in residual.shape:
        raise InputError(f"{type(chat.layers[0]).__name__}: gives no activation for each token of a text")
    return alone, padded, changed


def _moved(one: Tensor, other: Tensor) -> bool:
    """Whether logits differ by more than rounding.

    In half precision at more than half of the tokens: there rounding breaks ties between experts, which moves some.
    """
    by_token = (one - other).abs().amax(-1) / one.std()
    return bool(by_token.amax() > _SEEN if one.dtype == torch.float32 else by_token.median() > _SEEN_IN_HALF)


def _logits(chat: ChatModel, **inputs: Tensor) -> Tensor:
    """[rows, tokens, vocabulary]."""
    logits: Tensor = chat.model(**inputs, use_cache=False).logits
    return logits
