"""A model without its weights: what an engine that holds them elsewhere must know of it."""

import contextlib

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from misdirection.errors import InputError
from misdirection.models.loading import BUNDLED, ChatModel, bundled_folder


def source(model: str) -> str:
    """The folder or the Hugging Face id of a model."""
    return str(bundled_folder()) if model == BUNDLED else model


def skeleton(model: str, revision: str | None = None) -> ChatModel:
    """A model's structure, end tokens and tokenizer; its parameters are on the device `meta`.

    Raises `InputError` when the model is not there or has no chat template.
    """
    place = source(model)
    try:
        config = AutoConfig.from_pretrained(place, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{model}: the model could not be read ({first_line(error)}); check the name and the revision"
        ) from error
    # Not every model has one.
    with contextlib.suppress(OSError):
        network.generation_config = GenerationConfig.from_pretrained(place, revision=revision)
    if not tokenizer.chat_template:
        raise InputError(f"{model}: its tokenizer has no chat template: use the model's chat (instruct) version")
    return ChatModel(network, tokenizer, model, revision)


def first_line(error: Exception) -> str:
    """What a library's error says first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
