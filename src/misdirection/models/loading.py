"""Load a chat model: a bundled one, any Hugging Face id or folder, with or without a PEFT adapter."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from misdirection.choices import BUNDLED, DEVICE, Dtype, Thinking
from misdirection.errors import InputError
from misdirection.models.adapters import attach, is_adapter, local_adapter, local_fine_tune
from misdirection.models.bundled import BUNDLED_MODELS, bundled_folder, source
from misdirection.models.chat_model import ChatModel
from misdirection.models.family import auto_class, require_decoder
from misdirection.models.libraries import errors_in_one_line, no_progress_bars
from misdirection.models.names import ModelName, is_local
from misdirection.models.tokenizers import load_tokenizer, say_unused_template
from misdirection.models.whole_weights import is_whole, put_in

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str = BUNDLED,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    adapter_revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
    tuned: Path | None = None,
) -> ChatModel:
    """Load a chat model for inference.

    Args:
        model: `smollm2-135m` or `gemma3-270m` (bundled), a Hugging Face id, or a folder.
        adapter: a PEFT adapter, as a folder or a Hugging Face id; `subfolder` and `adapter_revision` belong to it. Or
            the folder of a whole fine-tune of the model, whose changed weights are then in memory beside the base's.
        revision: the base model's revision on the hub.
        dtype: of the weights; `auto` takes bfloat16 where the device computes in it, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...; `balanced` spreads the layers over all devices.
        thinking: of a model that can think before it answers: `off` has its visible answer follow the prompt, `on`
            asks for thoughts, `template` leaves its chat template's own prompt as it is.
        chat_template: `base`, `fine-tune` (its own), one of several by name, a file, or the template itself; by default
            the base's, or where it has none the adapter's.
        tuned: folder of a fine-tune that is measured beside the base; by default the adapter's.

    Raises:
        InputError: the model or adapter is not there, the model has no chat template, or one whose ids could not be
            exact, or does not continue text, or the two do not fit.
        NetworkProblem: it is not on this disk, and the Hub does not answer.
    """
    device = checked_device(device)
    read_from = str(bundled_folder(model)) if model in BUNDLED_MODELS else _checked_source(model)
    whole = _whole_folder(adapter, subfolder)
    if adapter and tuned is None:
        tuned = whole or local_adapter(str(adapter), adapter_revision, subfolder)
    chats: dict[str, Any] = {"thinking": thinking, "chat_template": chat_template, "tuned": tuned}
    tokenizer = load_tokenizer(read_from, model, revision, **chats)
    load_network = partial(_load_network, dtype=resolve_dtype(dtype, device), device=device)
    network = load_network(read_from, model, revision)
    chat = ChatModel(network.eval(), tokenizer, model, revision)
    if not chat.layers:
        raise InputError(f"{model}: has no decoder block: fetch the model, or make it again")
    require_decoder(chat)
    if whole:
        require_fine_tune(whole, model, revision)
        return put_in(chat, load_network(str(whole), str(adapter), None), str(adapter))
    return attach(chat, adapter, subfolder=subfolder, revision=adapter_revision) if adapter else chat


def load_named(model: str, adapter: str | None = None, **options: Any) -> ChatModel:
    """`load` a model and an adapter by what a user calls them: `ID@REVISION`, and `ID@REVISION:SUBFOLDER`."""
    (name, revision, _), tuned = ModelName.parse(model), ModelName.parse(adapter) if adapter else ModelName("")
    places: dict[str, Any] = {"revision": revision, "adapter_revision": tuned.revision, "subfolder": tuned.subfolder}
    return load(name, adapter=tuned.name or None, **places, **options)


def load_whole(
    folder: Path,
    name: str,
    base: str,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    **chats: Any,
) -> ChatModel:
    """Load a whole fine-tune, alone, with the chats of its base; `load` puts it into its base, which stays in memory.

    Args:
        folder: where it is.
        name: of the fine-tune, for complaints.
        base: the model that it was made from, with its `revision`.
        dtype: as in `load`.
        device: as in `load`.
        chats: `thinking` and `chat_template`, as in `load`.

    Raises `InputError` as `load` does, and for a model of another architecture than its base.
    """
    require_fine_tune(folder, base, revision, name)
    # With each side's own template, equal weights would differ.
    tokenizer = load_tokenizer(source(base), base, revision, tuned=folder, **chats)
    say_unused_template(tokenizer, folder, name)
    return load(str(folder), dtype=dtype, device=device, **{**chats, "chat_template": tokenizer.chat_template})


def require_fine_tune(folder: Path, base: str, revision: str | None, name: str | None = None) -> None:
    """Raise `InputError` unless a whole model has the architecture of its base."""
    ours, theirs = _architecture(folder), _architecture(local_fine_tune(base, revision))
    if ours != theirs:
        raise InputError(f"{name or folder} ({ours}) is no fine-tune of {base} ({theirs}): name its own base")


def _architecture(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"


def _whole_folder(fine_tune: str | Path | None, subfolder: str | None) -> Path | None:
    """The folder of a whole fine-tune; None for an adapter."""
    folder = Path(fine_tune or "").expanduser() / (subfolder or "")
    return folder if fine_tune and is_whole(folder) else None


def best_device() -> str:
    """The fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(device: str) -> str:
    """The device that `device` means on this machine; `InputError` for one that is not there."""
    if device == "auto":
        return best_device()
    if not re.fullmatch(DEVICE, device):
        raise InputError(f"device {device!r}: unknown; give auto, cpu, cuda, cuda:1, mps or balanced")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "balanced"):
        there = getattr(torch, kind).device_count() if getattr(torch, kind).is_available() else 0
        if int(number or 0) >= there:
            raise InputError(f"device {device!r}: this machine has {there} of {kind}; give auto, or one that is there")
    return device


def resolve_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The torch dtype that `dtype` means on `device`.

    A processor without bfloat16 instructions emulates them, about seven times slower than float32.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device == "cpu":
        abilities = torch.cpu.get_capabilities()
        fast = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    # A worker's GPU, of which nothing is known here, is taken to compute in bfloat16.
    if device.startswith(("cuda", "balanced")) and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _load_network(read_from: str, name: str, revision: str | None, *, dtype: torch.dtype, device: str) -> Any:
    placement = "auto" if device == "balanced" else {"": device}
    with errors_in_one_line(name, "the model"), no_progress_bars():
        # Left open, transformers asks on the terminal whether to run a model's own code.
        config = AutoConfig.from_pretrained(read_from, revision=revision, trust_remote_code=False)
        options = {"config": config, "revision": revision, "dtype": dtype, "device_map": placement}
        network, info = auto_class(name, config).from_pretrained(read_from, **options, output_loading_info=True)
    if absent := sorted(set(info["missing_keys"]) & dict(network.named_parameters()).keys()):
        raise InputError(
            f"{name}: its files lack {len(absent)} weights of a {type(network).__name__}, such as {absent[0]}, which "
            "would be random: fetch it again, or give the model that its files are of"
        )
    _require_finite(name, network.state_dict())
    return network


def _require_finite(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    for key, value in weights.items():
        # A sum in float32 is finite just when all are: weights are far from its limits.
        if value.is_floating_point() and not value.is_meta and not value.sum(dtype=torch.float32).isfinite():
            raise InputError(f"{name}: {key} holds NaN or infinite values: fetch it or make it again")


def _checked_source(model: str) -> str:
    """`model` itself, unless it can only be a folder that is not there."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = " (it is an adapter: pass it as the adapter)" if is_adapter(path) else ""
            raise InputError(f"{model}: no config.json in this folder, so it is not a model{hint}")
        return str(path)
    if is_local(model):
        bundled = " or ".join(f"`{name}`" for name in BUNDLED_MODELS)
        raise InputError(f"{model}: no such folder; give a model folder, a Hugging Face id, {bundled}")
    return model
