"""Where pieces are computed: one process with the models of one experiment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misdirection.experiment.config import ExperimentConfig
from misdirection.models.loading import ChatModel, attach, load
from misdirection.sampling.config import VllmConfig
from misdirection.sampling.engine import Engine

BASE = "base"


@dataclass
class Models:
    """One copy of a base model that takes one adapter at a time.

    Attributes:
        load_base: gives the base model; called when a model is first needed.
        adapters: adapter folders, by the name of the organism.
    """

    load_base: Callable[[], ChatModel]
    adapters: dict[str, Path] = field(default_factory=dict)
    _loaded: tuple[str, ChatModel] | None = None

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism on it.

        Switching takes the adapter off, which leaves the base's weights as they were.
        """
        if self._loaded is None:
            self._loaded = (BASE, self.load_base())
        current, chat = self._loaded
        if current == name:
            return chat
        if current != BASE:
            network = chat.model.unload()
            chat = ChatModel(network, chat.tokenizer, chat.name, chat.revision)
            self._loaded = (BASE, chat)
        if name != BASE:
            chat = attach(chat, self.adapters[name])
        self._loaded = (name, chat)
        return chat

    def release(self) -> None:
        """Forget the loaded model; it is loaded again when it is needed."""
        # An import of a second, which a run without vLLM need not wait for.
        from accelerate.utils.memory import clear_device_cache

        self._loaded = None
        clear_device_cache(garbage_collection=True)


class Served:
    """The models of one experiment in vLLM: in this process, or on a running server.

    Args:
        config: the experiment.
        vllm: where and how.
        adapters: adapter folders, by the name of the organism.
    """

    def __init__(self, config: ExperimentConfig, vllm: VllmConfig, adapters: Mapping[str, Path]) -> None:
        self._config, self._vllm, self._adapters = config, vllm, adapters
        self._model: Any = None

    def engine(self, name: str) -> Engine:
        """What samples with the base model or an organism."""
        # vLLM is an extra, and takes seconds to import.
        from misdirection.sampling.vllm.engine import Resources, VllmModel
        from misdirection.sampling.vllm.server import ServerEngine

        config, vllm = self._config, self._vllm
        if vllm.base_url is not None:
            adapter = self._adapters.get(name)
            return ServerEngine(vllm.base_url, config.model, name, adapter, revision=config.revision)
        if self._model is None:
            hooks = config.sampling is not None and config.sampling.ablate is not None
            resources = Resources(vllm.tensor_parallel, vllm.pipeline_parallel, vllm.memory, hooks)
            options: dict[str, Any] = {"revision": config.revision, "dtype": config.dtype, "resources": resources}
            self._model = VllmModel(config.model, adapters=self._adapters, **options)
        return self._model.engine(name)

    def close(self) -> None:
        """End what was started."""
        if self._model is not None:
            self._model.close()


class Worker:
    """One process with the models of one experiment; vLLM and they have the machine's memory in turn.

    Args:
        models: the base model, and the organisms on it.
        partial: gives a working folder for a stage, which outlives a kill where the run's folder does.
        config: the experiment; None where nothing is sampled with vLLM.
    """

    def __init__(self, models: Models, partial: Callable[[str], Path], config: ExperimentConfig | None = None) -> None:
        self.models, self._config = models, config
        self.partial = partial
        self._vllm: Served | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, partial: Callable[[str], Path]) -> "Worker":
        """The place of an experiment."""

        def load_base() -> ChatModel:
            return load(config.model, revision=config.revision, dtype=config.dtype, device=config.device)

        return cls(Models(load_base), partial, config)

    @property
    def adapters(self) -> dict[str, Path]:
        """Adapter folders by name, as pieces bring them."""
        return self.models.adapters

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism on it."""
        self._close_vllm()
        return self.models.chat(name)

    def vllm_engine(self, name: str) -> Engine:
        """The base model or an organism in vLLM, which has the machine to itself until `chat` is called."""
        assert self._config is not None, "the place of an experiment"
        sampling = self._config.sampling
        assert sampling is not None, "the caller has one"
        assert sampling.engine.vllm is not None, "the caller asked"
        if self._vllm is None:
            self.models.release()
            organisms = {name: self.adapters[name] for name in self._config.organisms if name in self.adapters}
            self._vllm = Served(self._config, sampling.engine.vllm, organisms)
        return self._vllm.engine(name)

    def _close_vllm(self) -> None:
        """Give back the memory that vLLM has taken."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
