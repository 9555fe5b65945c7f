"""The worker of an experiment: its models, and vLLM where its answers are sampled with that."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from misdirection.experiment.config import ExperimentConfig
from misdirection.models.loading import load
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.vllm.serving import VllmServing


def open_worker(config: ExperimentConfig, working: Callable[[str], Path]) -> Worker:
    """A worker for an experiment's tasks; nothing is loaded yet. `working` gives a working folder for a stage."""
    chats: dict[str, Any] = {"thinking": config.thinking, "chat_template": config.chat_template}
    load_base = partial(load, config.model, revision=config.revision, dtype=config.dtype, device=config.device, **chats)
    sampling = config.sampling
    if sampling is None or sampling.engine.vllm is None:
        return Worker(Models(load_base), working)
    engine = sampling.engine.vllm
    serve = partial(VllmServing, config.model, config.revision, config.dtype, engine, config.intervenes, chats)
    return Worker(Models(load_base), working, serve)
