"""The engine that `sample` samples with: `--engine`, `--server`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misdirection.choices import Dtype, Engine
from misdirection.cli.shared import load_chat, reference
from misdirection.errors import InputError


@dataclass(frozen=True)
class Sampler:
    """What samples.

    Attributes:
        chat: the model, or its skeleton.
        start: gives the engine.
        how: what answers depend on, beyond the model and the settings.
    """

    chat: Any
    start: Callable[[], Any]
    how: dict[str, str]


def sampler_of(
    engine: Engine, server: str | None, name: str, model: str, adapter: str | None, dtype: Dtype, device: str
) -> Sampler:
    """What the options name; `name` is that of what answers."""
    if engine == "transformers":
        if server is not None:
            raise InputError("--server goes with --engine vllm: name that engine")
        from misdirection.sampling.transformers_engine import TransformersEngine

        chat = load_chat(model, adapter, dtype, device)
        return Sampler(chat, lambda: TransformersEngine(chat), {})
    if device != "auto":
        raise InputError("--device: vLLM takes the devices that it finds: leave it out")
    return _vllm(server, name, model, adapter, dtype)


def _vllm(server: str | None, name: str, model: str, adapter: str | None, dtype: Dtype) -> Sampler:
    from misdirection.models.loading import local_adapter
    from misdirection.models.weightless import skeleton
    from misdirection.sampling.vllm.adapters import BASE, served_folder
    from misdirection.sampling.vllm.engine import VllmModel
    from misdirection.sampling.vllm.server import ServerEngine

    base, revision, _ = reference(model)
    chat = skeleton(base, revision)
    folders: dict[str, Path] = {}
    if adapter:
        folder, adapter_revision, subfolder = reference(adapter)
        folders[name] = served_folder(local_adapter(folder, adapter_revision, subfolder), chat)
    who = name if adapter else BASE

    def on_server() -> Any:
        assert server is not None, "it was asked for"
        return ServerEngine(server, base, who, folders.get(name), revision=revision)

    def in_process() -> Any:
        return VllmModel(base, adapters=folders, revision=revision, dtype=dtype).engine(who)

    if server is not None:
        return Sampler(chat, on_server, {"engine": "vllm server"})
    return Sampler(chat, in_process, {"engine": "vllm"})
