"""Which adapters vLLM can load as a LoRA, read off their files before any engine starts.

Interventions on adapters are adapters here: each is one more of the engine's, without a hook.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from misdirection.errors import InputError
from misdirection.interventions.adapter_weights import changed_weights
from misdirection.interventions.intervention import Intervention, rule_text
from misdirection.lora.variants import no_sum
from misdirection.lora.view import LoraFiles, LoraView, write_adapter
from misdirection.models.adapters import ADAPTER_WEIGHTS, local_adapter, lora_module
from misdirection.models.chat_model import ChatModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that a vLLM engine can be built for."""

BASE = "base"
"""The name of the model without an adapter."""

INSTEAD = "sample it with engine: transformers"
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")


def require_served(folder: str | Path) -> int:
    """The largest rank of an adapter that vLLM can serve.

    Raises `InputError` for one that it cannot, from its files alone, with what to do instead.
    """
    view = LoraView.open(folder)
    if reason := _unserved(view):
        raise InputError(f"{folder}: vLLM cannot serve this adapter, {reason}: {INSTEAD}")
    rank = view.largest_rank
    if rank > RANKS[-1]:
        raise InputError(f"{folder}: vLLM serves ranks up to {RANKS[-1]}, and this is {rank}: {INSTEAD}")
    if not (view.folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder}: no {ADAPTER_WEIGHTS} here: save the adapter as safetensors first")
    return rank


def _unserved(view: LoraFiles) -> str | None:
    """The part of an adapter's configuration that vLLM does not do, as the end of a message."""
    if view.beside:
        return f"an adapter that holds more than LoRA matrices ({', '.join(view.beside)})"
    return no_sum(view.config) or _embeddings(view.config.get("target_modules"))


def _embeddings(targets: Any) -> str | None:
    names = [targets] if isinstance(targets, str) else list(targets or ())
    embeddings = [name for name in _EMBEDDINGS if any(target.endswith(name) for target in names)]
    return f"a LoRA on embeddings ({', '.join(embeddings)})" if embeddings else None


def smallest_limit(ranks: Iterable[int]) -> int:
    """The smallest rank that an engine can be built for and that takes all of these."""
    largest = max(ranks, default=1)
    return next(limit for limit in RANKS if limit >= largest)


def require_fit(folder: str | Path, chat: ChatModel) -> None:
    """Raise `InputError` unless every matrix of an adapter has a module of its size in the base model.

    vLLM itself copies a smaller matrix into the corner of a larger one.
    """
    modules = dict(chat.model.named_modules())
    with safe_open(Path(folder) / ADAPTER_WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            path, which = lora_module(key), key.partition(".lora_")[2]
            shape = file.get_slice(key).get_shape()
            if path is None or len(shape) != 2:
                raise InputError(f"{folder}: vLLM cannot serve {key}, which is no matrix of a LoRA: {INSTEAD}")
            weight = getattr(modules.get(path), "weight", None)
            if weight is None or shape[1 if which.startswith("A") else 0] not in weight.shape:
                raise InputError(f"{folder}: {key} has no place in {chat.name!r}: the adapter is another model's")


def served_folder(adapter: str | Path, chat: ChatModel) -> Path:
    """The folder of an adapter that vLLM can serve on this model; else `InputError`."""
    folder = local_adapter(str(adapter))
    require_served(folder)
    require_fit(folder, chat)
    return folder


# --- interventions on adapters ------------------------------------------------------------------------------------


def write_changed(source: str | Path, chat: ChatModel, changes: Sequence[Intervention], folder: Path) -> None:
    """Write the adapter in `source` as the interventions leave it.

    Args:
        source: the adapter's folder.
        chat: the base model; its weights are not needed.
        changes: all of them on every token.
        folder: where to write.

    Raises:
        InputError: a position rule, a layer or module without an adapter, nothing that writes to the stream.
    """
    view = LoraView.open(source)
    for intervention in changes:
        if not intervention.acts_everywhere:
            raise InputError(
                f"{type(intervention).__name__}: vLLM adds an adapter on every token, so that positions "
                f"{rule_text(intervention.positions)} cannot be: give positions='all', or {INSTEAD}"
            )
    write_adapter(folder, view.config, changed_weights(view.weights, chat, changes))
