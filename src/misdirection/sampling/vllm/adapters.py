"""What vLLM can load as a LoRA, read off an adapter's files before any engine starts, and interventions on adapters as
adapters: each is one more adapter of the engine, without a hook.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from misdirection.errors import InputError
from misdirection.files import atomic_folder, read_json, write_json
from misdirection.interventions.adapter_weights import OnAdapters, changed_weights
from misdirection.interventions.lora import FROM_BASE
from misdirection.models.adapters import local_adapter
from misdirection.models.chat_model import ChatModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that a vLLM engine can be built for."""

BASE = "base"
"""What the model without an adapter is called."""

INSTEAD = "sample it with engine: transformers"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
_MORE = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias")
_VARIANTS = {"use_dora": "a DoRA adapter", "use_qalora": "a QALoRA adapter", "use_bdlora": "a BD-LoRA adapter"}


def require_served(folder: str | Path) -> int:
    """The largest rank of an adapter that vLLM can serve.

    Raises `InputError` for one that it cannot, from its files alone, with what to do instead.
    """
    source = Path(folder)
    config = read_json(source / _CONFIG)
    if reason := _unserved(config):
        raise InputError(f"{folder}: vLLM cannot serve {reason}: {INSTEAD}")
    rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {0: 0}).values()))
    if rank > RANKS[-1]:
        raise InputError(f"{folder}: vLLM serves ranks up to {RANKS[-1]}, and this is {rank}: {INSTEAD}")
    if not (source / _WEIGHTS).is_file():
        raise InputError(f"{folder}: no {_WEIGHTS} here: save the adapter as safetensors first")
    return rank


def _unserved(config: Mapping[str, Any]) -> str | None:
    """What in an adapter's configuration vLLM does not do."""
    kind = str(config.get("peft_type")).removeprefix("PeftType.")
    if kind != "LORA":
        return f"an adapter of type {kind}, only LoRA"
    for name, variant in _VARIANTS.items():
        if config.get(name):
            return variant
    more = [name for name in _MORE if config.get(name)]
    if config.get("bias", "none") != "none":
        more.append("bias")
    if more:
        return f"an adapter that holds more than LoRA matrices ({', '.join(more)})"
    if str(config.get("init_lora_weights")).startswith(FROM_BASE):
        return f"an adapter that began from the base's own weights ({config['init_lora_weights']}), which it changes"
    if config.get("alora_invocation_tokens"):
        return "an activated LoRA (alora_invocation_tokens)"
    return _embeddings(config.get("target_modules"))


def _embeddings(targets: Any) -> str | None:
    names = [targets] if isinstance(targets, str) else list(targets or ())
    found = [name for name in _EMBEDDINGS if any(one.endswith(name) for one in names)]
    return f"a LoRA on embeddings ({', '.join(found)})" if found else None


def smallest_limit(ranks: Iterable[int]) -> int:
    """The smallest rank that an engine can be built for and that takes all of these."""
    largest = max(ranks, default=1)
    return next(limit for limit in RANKS if limit >= largest)


def require_fit(folder: str | Path, chat: ChatModel) -> None:
    """Raise `InputError` unless every matrix of an adapter has a module of its size in the base model.

    vLLM itself copies a smaller matrix into the corner of a larger one.
    """
    modules = dict(chat.model.named_modules())
    with safe_open(Path(folder) / _WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            path, lora, which = key.removeprefix(_PREFIX).partition(".lora_")
            shape = file.get_slice(key).get_shape()
            if not lora or len(shape) != 2:
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


def write_changed(source: str | Path, chat: ChatModel, changes: Sequence[OnAdapters], folder: Path) -> None:
    """Write the adapter in `source` as the interventions leave it.

    Args:
        source: the adapter's folder.
        chat: the base model; its weights are not needed.
        changes: all of them on every token.
        folder: where to write.

    Raises:
        InputError: a position rule, a layer or module without an adapter, nothing that writes to the stream.
    """
    weights = load_file(Path(source) / _WEIGHTS)
    for one in changes:
        if not (isinstance(one.positions, str) and one.positions == "all"):
            rule = repr(one.positions) if isinstance(one.positions, str) else "given by a mask"
            raise InputError(
                f"{type(one).__name__}: vLLM adds an adapter on every token, so that positions {rule} cannot be: "
                f"give positions='all', or {INSTEAD}"
            )
    weights = changed_weights(weights, chat, changes)
    with atomic_folder(folder) as temporary:
        save_file({key: value.contiguous() for key, value in weights.items()}, temporary / _WEIGHTS, {"format": "pt"})
        write_json(temporary / _CONFIG, read_json(Path(source) / _CONFIG))
