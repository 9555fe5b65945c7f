"""The engine that a user's words name: a model and an adapter, by transformers, by vLLM, or on a server."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misdirection.choices import Dtype, Thinking
from misdirection.choices import Engine as EngineName
from misdirection.errors import InputError
from misdirection.files import sha256_tree
from misdirection.models.adapters import local_adapter
from misdirection.models.chat import how_written
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load_named
from misdirection.models.names import ModelName
from misdirection.models.weightless import weightless
from misdirection.sampling.engine import Engine
from misdirection.sampling.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class Sampler:
    """A model that can be sampled, before its engine is started.

    Attributes:
        chat: the model; with vLLM one without weights, whose layers and tokenizer are right.
        start: gives the engine.
        how: all that answers depend on besides the sampling parameters, as JSON has it.
    """

    chat: ChatModel
    start: Callable[[], Engine]
    how: Mapping[str, str | None]


def open_sampler(
    model: str,
    adapter: str | None = None,
    *,
    name: str = "base",
    engine: EngineName = "transformers",
    server: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
    compile: bool = False,
) -> Sampler:
    """Gives the sampler of a model, named as `ID@REVISION`, with an adapter, `ID@REVISION:SUBFOLDER`.

    Args:
        name: under which vLLM serves the adapter.
        server: URL, with /v1, of a running vLLM server.
        thinking, chat_template: as in `load`.
        compile: see `TransformersEngine`.

    Raises:
        InputError: a model or an adapter that cannot be loaded, or a choice that its engine does not have.
    """
    how = {"model": model, "adapter": adapter, "adapter_files": _digest(adapter)}
    chats = {"thinking": thinking, "chat_template": chat_template}
    if engine == "vllm":
        if device != "auto":
            raise InputError("--device: vLLM takes the devices that it finds: leave it out")
        if compile:
            raise InputError("--compile: vLLM compiles by itself: leave it out")
        return _vllm(ModelName.parse(model), adapter, name, server, dtype, chats, how)
    if server is not None:
        raise InputError("--server goes with --engine vllm: name that engine")
    chat = load_named(model, adapter, dtype=dtype, device=device, **chats)
    return Sampler(chat, lambda: TransformersEngine(chat, compile=compile), how | how_written(chat.tokenizer))


def _digest(adapter: str | None) -> str | None:
    """The hash of an adapter on this disk, which may be trained anew under its path."""
    return sha256_tree(Path(adapter)) if adapter and Path(adapter).exists() else None


def _vllm(
    base: ModelName,
    adapter: str | None,
    name: str,
    server: str | None,
    dtype: Dtype,
    chats: dict[str, Any],
    how: Mapping[str, str | None],
) -> Sampler:
    # vLLM is an extra.
    from misdirection.sampling.vllm.adapters import BASE, served_folder
    from misdirection.sampling.vllm.engine import VllmModel
    from misdirection.sampling.vllm.server import ServerEngine

    tuned = local_adapter(*ModelName.parse(adapter)) if adapter else None
    chat = weightless(base.name, base.revision, tuned=tuned, **chats)
    folders = {name: served_folder(tuned, chat)} if tuned else {}
    how = {**how, **how_written(chat.tokenizer)}
    served = name if adapter else BASE

    def on_server() -> Engine:
        assert server is not None, "it was asked for"
        return ServerEngine(server, base.name, served, folders.get(name), revision=base.revision, chat=chat)

    def in_process() -> Engine:
        return VllmModel(base.name, adapters=folders, revision=base.revision, dtype=dtype, chat=chat).engine(served)

    if server is not None:
        return Sampler(chat, on_server, {**how, "engine": "vllm server"})
    return Sampler(chat, in_process, {**how, "engine": "vllm"})
