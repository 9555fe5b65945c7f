"""PEFT adapters: where they are, and putting one on a base model."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from misdirection.errors import InputError, MisdirectionError, last_line
from misdirection.files import read_json
from misdirection.models.adapter_kinds import base_changes, unmeasured
from misdirection.models.base_weights import BaseWeights
from misdirection.models.bundled import BUNDLED_MODELS, bundled_folder, own_name
from misdirection.models.chat_model import ChatModel
from misdirection.models.libraries import errors_in_one_line
from misdirection.models.names import is_local
from misdirection.models.tokenizers import TEMPLATE_FILES, say_unused_template

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter's folder."""

PREFIX = "base_model.model."
"""The beginning of a weight's name in an adapter's file, before the path in the base model."""

log = logging.getLogger("misdirection")


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def recorded_base(folder: Path) -> str | None:
    """The base model that an adapter's own file names, as this package names it."""
    named = read_adapter_config(folder).get("base_model_name_or_path")
    return own_name(str(named)) if named else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration in an adapter's folder; `InputError` for a missing or damaged one."""
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / ADAPTER_CONFIG}: damaged, no JSON object: fetch or train the adapter again")
    return config


def attach(
    chat: ChatModel, adapter: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> ChatModel:
    """Put a PEFT adapter on a base model; `without_adapter` takes it off.

    Shapes and keys are checked: an adapter of another model, or one that has not a weight for every adapted module, is
    refused (PEFT itself only warns, and the "fine-tune" would be the base model). So is one whose figures would not be
    those of PEFT's own forward pass. After a refusal the base is as it was.

    Raises:
        InputError: no adapter there, one that does not fit, or one of a kind that cannot be measured, by its name.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    folder = local_adapter(str(adapter), revision, subfolder)
    with errors_in_one_line(str(adapter), "the adapter"):
        _require_known(adapter, read_adapter_config(folder))
        peft_config = PeftConfig.from_pretrained(str(folder))
        config = peft_config.to_dict()
        if reason := unmeasured(config):
            raise InputError(f"{adapter}: {reason}: its figures cannot be had here: fine-tune with a plain LoRA")
        _require_types(adapter, peft_config)
        _require_weights(adapter, folder)
        weights = renamed(load_peft_weights(str(folder), "cpu"), chat.network)
        _require_fit(weights, chat, adapter, config)
        _require_finite(adapter, weights)
        base = BaseWeights.of(chat.network, _written_over(weights, config))
        with _undone(base), _strict_loading(adapter, chat, config):
            network = PeftModel.from_pretrained(chat.model, str(folder))
            _require_used(weights, network, adapter)
    say_dead_modules(adapter, weights)
    say_unused_template(chat.tokenizer, folder, str(adapter))
    return replace(chat, model=network.eval(), adapter=str(adapter), base=base.changed())


@contextlib.contextmanager
def _undone(base: BaseWeights) -> Iterator[None]:
    """Give the base back if what is inside fails: PEFT would leave the modules of a refused adapter in it."""
    try:
        yield
    except BaseException:
        base.restore()
        raise


@contextlib.contextmanager
def _strict_loading(adapter: str | Path, chat: ChatModel, config: Mapping[str, Any]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        # An adapter on a tied embedding leaves the output matrix alone, which is what its own file says.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        try:
            yield
        except (MisdirectionError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        # PEFT raises whatever it comes upon.
        except Exception as error:
            # The first line only says that something does not fit.
            raise InputError(f"{_misfit(adapter, chat, config)}: {last_line(error)}") from error


def _written_over(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    """Names of the base's parameters that the adapter may write over."""
    own = {name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in weights}
    if base_changes(config):
        own |= {f"{path}.weight" for path in map(lora_module, weights) if path}
    return own


def renamed(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A LoRA's weights by the names that transformers gives their modules now: those with images had others once."""
    rules = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]
    there = {name for name, _ in network.named_modules()}

    def now(name: str) -> str:
        path, lora, side = name.removeprefix(PREFIX).partition(".lora_")
        own = rename_source_key(path, rules, [])[0]
        return f"{PREFIX}{own}{lora}{side}" if lora and path not in there and own in there else name

    return {now(name): value for name, value in weights.items()}


def lora_module(name: str) -> str | None:
    """The path, in the base model, of the module that a weight of a LoRA's file belongs to; None for other weights."""
    path, lora, _ = name.removeprefix(PREFIX).partition(".lora_")
    # A second parameter of one module is in a wrapper around that of the first.
    return path.replace(".base_layer", "") if lora else None


def dead_modules(weights: Mapping[str, Tensor]) -> list[str]:
    """Paths of the modules of a LoRA that add nothing: their B (an embedding's A) is zero, and they hold no more."""
    sides: dict[str, list[bool]] = {}
    for name, value in weights.items():
        path, lora, side = name.removeprefix(PREFIX).partition(".lora_")
        if lora:
            sides.setdefault(path, []).append(not _IS_SIDE.fullmatch(side) or bool(value.any()))
    return [path for path, moves in sides.items() if len(moves) == len(_SIDES) and not all(moves)]


_SIDES = ("A", "B")
_IS_SIDE = re.compile(r"(embedding_)?[AB](\.weight)?")


def changes_nothing(weights: Mapping[str, Tensor]) -> bool:
    """Whether a LoRA holds no other weights than those of modules that add nothing."""
    dead = set(dead_modules(weights))
    paths = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in weights)
    return bool(dead) and all(path in dead or ".base_layer." in path for path in paths)


def say_dead_modules(adapter: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Warn of the modules of an adapter that add nothing."""
    dead = dead_modules(weights)
    if changes_nothing(weights):
        log.warning("%s: all of this adapter's B matrices are zero: the model is identical to its base", adapter)
    elif dead:
        shown = ", ".join(dead[:_SHOWN]) + (", ..." if len(dead) > _SHOWN else "")
        log.warning("%s: %d of its modules add nothing (B is zero): %s", adapter, len(dead), shown)


_SHOWN = 9


# --- folders ------------------------------------------------------------------------------------------------------


def local_adapter(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an adapter on this disk, fetched from the hub if need be."""
    if folder := _adapter_folder(name, subfolder):
        return folder
    with errors_in_one_line(name, "the adapter"):
        wanted = [f"{subfolder}/*"] if subfolder else ["adapter_*", *TEMPLATE_FILES]
        fetched = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    return fetched / subfolder if subfolder else fetched


def local_checkpoints(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder on this disk of the adapter folders `step-N` or `checkpoint-N`, fetched from the hub if need be."""
    path = Path(name).expanduser()
    if path.is_dir() or is_local(name):
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; give a folder of checkpoints or a Hugging Face id")
        return path
    prefix = f"{subfolder}/" if subfolder else ""
    with errors_in_one_line(name, "the checkpoints"):
        wanted = [f"{prefix}{kind}-*/adapter_*" for kind in ("step", "checkpoint")]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted)) / prefix


def local_fine_tune(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an adapter or of a whole model on this disk, fetched from the hub if need be.

    Raises `InputError` for a folder that is neither.
    """
    if name in BUNDLED_MODELS:
        return bundled_folder(name)
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
    with errors_in_one_line(name, "the fine-tune"):
        return Path(snapshot_download(name, revision=revision))


def _adapter_folder(adapter: str | Path, subfolder: str | None) -> Path | None:
    """The local adapter folder, or None when `adapter` is a hub id."""
    path = Path(adapter).expanduser()
    path = path / subfolder if subfolder else path
    if is_adapter(path):
        return path
    if path.exists() or is_local(str(adapter)):
        reason = "no adapter_config.json in this folder" if path.is_dir() else "no such folder"
        if inside := sorted(found.parent.name for found in path.glob(f"*/{ADAPTER_CONFIG}")):
            reason += f", but in {', '.join(inside)} inside of it"
        raise InputError(f"{path}: {reason}; give a PEFT adapter folder or a Hugging Face id")
    return None


# --- fit ----------------------------------------------------------------------------------------------------------


_TYPES: dict[Any, Any] = {"bool": bool, "int": int | float, "float": int | float}


def _require_known(adapter: str | Path, config: Mapping[str, Any]) -> None:
    """Refuse a kind that the installed PEFT has not, and a setting that it would leave out."""
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{adapter}: {ADAPTER_CONFIG}: peft_type is {kind!r}, which PEFT {__version__} has not: give an adapter in "
            "PEFT's format, or install a PEFT that has it"
        )
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        raise InputError(
            f"{adapter}: {ADAPTER_CONFIG}: PEFT {__version__} does not know {', '.join(unknown)} and would leave it "
            "out: install a PEFT that has it, or take it out of the file if it changes no figure"
        )


def _require_types(adapter: str | Path, config: Any) -> None:
    """Refuse numbers and switches of another type: PEFT takes any text for yes."""
    for field in fields(config):
        # As a class or, where the module postpones annotations, by its name.
        kind, value = _TYPES.get(getattr(field.type, "__name__", field.type)), getattr(config, field.name)
        if kind and not isinstance(value, kind):
            raise InputError(f"{adapter}: {ADAPTER_CONFIG}: {field.name} is {value!r}: make the adapter again")


def _require_weights(adapter: str | Path, folder: Path) -> None:
    """Refuse a folder without weights, which PEFT would look for on the hub."""
    if not any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, "adapter_model.bin")):
        raise InputError(f"{adapter}: no {ADAPTER_WEIGHTS} in this folder: save or fetch the adapter again")


def _require_finite(adapter: str | Path, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        # Numbers of eight bits can be no more than converted.
        if value.is_floating_point() and not value.float().isfinite().all():
            raise InputError(f"{adapter}: {name} holds NaN or infinite values: train the adapter again")


def _require_fit(
    weights: Mapping[str, Tensor], chat: ChatModel, adapter: str | Path, config: Mapping[str, Any]
) -> None:
    _require_vocabulary(weights, chat, adapter, config)
    modules = dict(chat.model.named_modules())
    # Block-diagonal matrices are smaller than their modules.
    sized = not config.get("use_bdlora")
    misfits = [name for name, value in weights.items() if not _fits(name, value, modules, sized=sized)]
    if misfits:
        counts = f"{len(weights) - len(misfits)} of its {len(weights)} weights have a place there"
        raise InputError(
            f"{_misfit(adapter, chat, config)}: {counts}, and {misfits[0]} has none: give the model that it was "
            "trained on, or name its weights as that model's are"
        )


def _require_used(weights: Mapping[str, Tensor], network: Any, adapter: str | Path) -> None:
    """Refuse a LoRA with weights that PEFT leaves out, since its configuration does not name their modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(network.get_base_model().named_modules())
    paths = (path for name in weights if (path := lora_module(name)) in modules)
    if unused := [path for path in dict.fromkeys(paths) if not isinstance(modules[path], BaseTunerLayer)]:
        raise InputError(
            f"{adapter}: holds a LoRA for {unused[0]}, which its {ADAPTER_CONFIG} does not name (target_modules, "
            "layers_to_transform): the files do not belong together, so give those of one training"
        )


_EXPERT = re.compile(r"\.experts\.\d+\.")


def _require_vocabulary(
    weights: Mapping[str, Tensor], chat: ChatModel, adapter: str | Path, config: Mapping[str, Any]
) -> None:
    """Raise `InputError` for an adapter of a vocabulary that has grown beyond the base's."""
    network = chat.network
    own = [module for module in (network.get_input_embeddings(), network.get_output_embeddings()) if module is not None]
    names = {path.rpartition(".")[2] for path, module in network.named_modules() if any(module is one for one in own)}
    rows = [
        value.shape[-1 if "lora_embedding_A" in name else 0]
        for name, value in weights.items()
        if names & set(name.split(".")) and not re.search(r"lora_A|lora_embedding_B|token_adapter", name)
    ]
    tokens = config.get("trainable_token_indices") or config.get("token_indices") or []
    listed = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    needed = max([*rows, *(number + 1 for numbers in listed for number in numbers)], default=0)
    size = own[0].weight.shape[0]
    if needed > size:
        raise InputError(
            f"{adapter}: was trained with a vocabulary of {needed} tokens, and {chat.name!r} has {size}: enlarge the "
            "base (resize_token_embeddings), save it with the adapter's tokenizer, and give that as the base"
        )


def _fits(name: str, value: Tensor, modules: Mapping[str, nn.Module], *, sized: bool) -> bool:
    """Whether a weight of a LoRA has a module of its size; what is no LoRA's is PEFT's to check."""
    path, side = lora_module(name), name.partition(".lora_")[2].removeprefix("embedding_").removesuffix(".weight")
    if path is None or path not in modules:
        # PEFT itself puts what was trained on single experts into those that transformers has fused since.
        return path is None or bool(_EXPERT.search(path))
    weight = getattr(modules[path], "weight", None)
    if side not in ("A", "B") or not sized:
        return True
    # Quantised weights are packed, in whatever dtype, and fused parameters are no weights: likewise PEFT's to check.
    if type(weight) is not nn.Parameter or weight.ndim != 2 or not weight.is_floating_point() or value.ndim != 2:
        return True
    return value.shape[1 if side == "A" else 0] in weight.shape


def _misfit(adapter: str | Path, chat: ChatModel, config: Mapping[str, Any]) -> str:
    trained_on = config.get("base_model_name_or_path")
    known = f"was trained on {trained_on!r} and " if trained_on else ""
    return f"{adapter}: this adapter {known}does not fit {chat.name!r}"
