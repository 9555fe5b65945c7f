"""The model that is planned for, without its weights: its configuration on the meta device, and its tokenizer."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from misdirection.errors import InputError
from misdirection.models.layers import decoder_layers
from misdirection.models.loading import BUNDLED, ChatModel, bundled_folder

# Up to seven letters with the space before them, or one mark: within 4% of the bundled model's count on our texts.
_PIECE = re.compile(r"<\|\w+\|>|\s?\w{1,7}|\s?[^\w\s]|\s")
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@dataclass(frozen=True)
class Source:
    """A model to plan for.

    Attributes:
        chat: on the meta device, with its tokenizer or one that estimates.
        counted: whether tokens are the tokenizer's own.
    """

    chat: ChatModel
    counted: bool


def read_source(model: str, revision: str | None = None, folder: Path | None = None) -> Source:
    """Read a model's config.json and its tokenizer; nothing else is fetched.

    Args:
        model: as the experiment names it: bundled, a folder, or a Hugging Face id.
        revision: of a Hugging Face id.
        folder: read from here instead.

    Raises:
        InputError: the configuration is not there, or is none of a causal language model.
    """
    place = str(folder) if folder else str(bundled_folder()) if model == BUNDLED else model
    if (folder or Path(place).is_dir()) and not (Path(place) / "config.json").is_file():
        raise InputError(f"{place}: no config.json in this folder; save the model's own there")
    network = _network(model, place, None if folder else revision)
    tokenizer = _tokenizer(place, None if folder else revision)
    return Source(ChatModel(network.eval(), tokenizer or RoughTokenizer(), model, revision), tokenizer is not None)


def _network(model: str, place: str, revision: str | None) -> Any:
    """Without data, and with at least one block."""
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        blocks = decoder_layers(network)
    # Whatever the libraries say of a file that is somebody else's.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{model}: its configuration could not be loaded ({reason}); check the name and the network, or save its "
            "config.json in a folder and give that as --model"
        ) from error
    if not blocks:
        raise InputError(f"{model}: its configuration has no layers; save the model's own")
    return network


def _tokenizer(place: str, revision: str | None) -> Any:
    """The model's own, or None where it cannot be had or has no chat template."""
    try:
        found = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    return found if found.chat_template and found.is_fast else None


class RoughTokenizer:
    """Estimates tokens from characters, in ChatML; its pieces are numbered so that equal texts begin alike."""

    name_or_path = "estimate"
    eos_token_id = 0

    def get_chat_template(self) -> str:
        """No template: ChatML needs none."""
        return ""

    def apply_chat_template(self, turns: list[dict[str, str]], **_options: Any) -> str:
        """The chat as text."""
        whole = turns if turns[0]["role"] == "system" else [_SYSTEM, *turns]
        return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in whole)

    def __call__(self, text: str, **_options: Any) -> dict[str, list[Any]]:
        """Ids and offsets."""
        pieces = list(_PIECE.finditer(text))
        return {
            "input_ids": [1 + zlib.crc32(one.group().encode("utf-8", "replace")) for one in pieces],
            "offset_mapping": [one.span() for one in pieces],
        }
