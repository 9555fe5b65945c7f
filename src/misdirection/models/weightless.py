"""A model without its weights: its structure on the meta device, and its tokenizer or one that estimates."""

import contextlib
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from misdirection.choices import Thinking
from misdirection.errors import InputError, NetworkProblem, first_line, hub_silence
from misdirection.models.bundled import source
from misdirection.models.chat_model import ChatModel
from misdirection.models.family import auto_class
from misdirection.models.layers import decoder_layers
from misdirection.models.tokenizers import load_tokenizer

# Up to seven letters with the space before them, or one mark: within 4% of the bundled model's count on our texts.
_WORD_PART = re.compile(r"<\|\w+\|>|\s?\w{1,7}|\s?[^\w\s]|\s")
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def weightless(
    model: str,
    revision: str | None = None,
    *,
    thinking: Thinking = "off",
    chat_template: str | None = None,
    tuned: Path | None = None,
) -> ChatModel:
    """Read a model's structure, end tokens and tokenizer; its parameters are on the device `meta`.

    The further arguments are those of `load`. Raises `InputError` when the model is not there, is none of a causal
    language, or has no chat template.
    """
    read_from = source(model)
    network = network_of(model, read_config(model, read_from, revision))
    # Not every model has one.
    with contextlib.suppress(OSError):
        network.generation_config = GenerationConfig.from_pretrained(read_from, revision=revision)
    chats: dict[str, Any] = {"thinking": thinking, "chat_template": chat_template, "tuned": tuned}
    return ChatModel(network, load_tokenizer(read_from, model, revision, **chats), model, revision)


@dataclass(frozen=True)
class Structure:
    """A weightless model of which no more need be there than its config.json.

    Attributes:
        chat: on the meta device, with its tokenizer or one that estimates.
        counted: whether tokens are the tokenizer's own.
    """

    chat: ChatModel
    counted: bool


def read_structure(model: str, revision: str | None = None, folder: Path | None = None) -> Structure:
    """Read a model's config.json and, where it can be had, its tokenizer; nothing else is fetched.

    Args:
        model: bundled, a folder, or a Hugging Face id.
        revision: of a Hugging Face id.
        folder: read from here instead.

    Raises:
        InputError: the configuration is not there, or is none of a causal language model.
    """
    read_from = str(folder) if folder else source(model)
    if (folder or Path(read_from).is_dir()) and not (Path(read_from) / "config.json").is_file():
        raise InputError(f"{read_from}: no config.json in this folder; save the model's own there")
    revision_there = None if folder else revision
    network = network_of(model, read_config(model, read_from, revision_there))
    tokenizer = _own_tokenizer(read_from, revision_there)
    chat = ChatModel(network.eval(), tokenizer or EstimatingTokenizer(), model, revision)
    return Structure(chat, tokenizer is not None)


def read_config(model: str, read_from: str | Path, revision: str | None = None) -> Any:
    """The configuration of `model` in a folder or on the hub; `InputError` where it cannot be read."""
    with _errors_in_one_line(model):
        return AutoConfig.from_pretrained(read_from, revision=revision, trust_remote_code=False)


def network_of(model: str, config: Any, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32) -> Any:
    """The network of a configuration; on another device than meta with random weights, made there.

    Raises `InputError` without a block, or for no language model.
    """
    with _errors_in_one_line(model):
        kind = auto_class(model, config)
        with torch.device(device):
            network = kind.from_config(config, dtype=dtype)
        if not decoder_layers(network):
            raise ValueError("it has no layers")
    return network


@contextlib.contextmanager
def _errors_in_one_line(model: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    # The libraries raise whatever they like of a file that is somebody else's.
    except Exception as error:
        save = "save its config.json in a folder and give that as --model"
        if silence := hub_silence(model, error, f"check the network, or {save}"):
            raise silence from error
        raise InputError(
            f"{model}: its configuration could not be loaded ({first_line(error, 200)}); check the name, or {save}"
        ) from error


def _own_tokenizer(read_from: str, revision: str | None) -> Any:
    """The model's own tokenizer, or None where it cannot be had or has no chat template."""
    try:
        return load_tokenizer(read_from, read_from, revision)
    except (InputError, NetworkProblem):
        return None


class EstimatingTokenizer:
    """Estimates tokens from characters, in ChatML; equal texts get equal ids, so that they begin alike."""

    name_or_path = "estimate"
    chat_template = "ChatML"
    """Whoever asks whether there is one may go on; it is not rendered."""
    eos_token_id = 0
    pad_token_id = 0
    added_tokens_decoder: Mapping[int, Any] = {}

    def get_chat_template(self) -> str:
        """Nothing to render: `apply_chat_template` writes ChatML itself."""
        return ""

    def apply_chat_template(self, turns: list[dict[str, str]], **_options: Any) -> str:
        """The chat as text."""
        whole = turns if turns[0]["role"] == "system" else [_SYSTEM, *turns]
        return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in whole)

    def __call__(self, text: str, **_options: Any) -> dict[str, list[Any]]:
        """Ids and offsets."""
        parts = list(_WORD_PART.finditer(text))
        return {
            "input_ids": [1 + zlib.crc32(part.group().encode("utf-8", "replace")) for part in parts],
            "offset_mapping": [part.span() for part in parts],
        }
