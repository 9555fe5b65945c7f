"""The worker of an experiment: its models, and vLLM where its answers are sampled with that."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from misdirection.experiment.config import ExperimentConfig
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load, load_whole
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.vllm.serving import VllmServing


def open_worker(config: ExperimentConfig, working: Callable[[str], Path]) -> Worker:
    """A worker for an experiment's tasks; nothing is loaded yet. `working` gives a working folder for a stage."""
    chats: dict[str, Any] = {"thinking": config.thinking, "chat_template": config.chat_template}
    load_base = partial(load, config.model, revision=config.revision, dtype=config.dtype, device=config.device, **chats)
    models = Models(load_base, load_whole=partial(_organism, config, chats))
    sampling = config.sampling
    if sampling is None or sampling.engine.vllm is None:
        return Worker(models, working)
    engine = sampling.engine.vllm
    serve = partial(VllmServing, config.model, config.revision, config.dtype, engine, config.intervenes, chats)
    return Worker(models, working, serve)


def _organism(config: ExperimentConfig, chats: Mapping[str, Any], folder: Path) -> ChatModel:
    """An organism of full weights under its base's name: as with an adapter, figures name the base that they are of."""
    where: dict[str, Any] = {"revision": config.revision, "dtype": config.dtype, "device": config.device}
    chat = load_whole(folder, str(folder), config.model, **where, **chats)
    return replace(chat, name=config.model, revision=config.revision, adapter=str(folder))
