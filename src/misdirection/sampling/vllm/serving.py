"""One base model and its organisms in vLLM: in this process, or on a running server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from misdirection.choices import Dtype
from misdirection.models.weightless import weightless
from misdirection.sampling.config import VllmConfig
from misdirection.sampling.engine import Engine


class VllmServing:
    """Engines of one base model and its organisms; vLLM is started when the first is asked for.

    Args:
        model, revision, dtype: the base model.
        config: where and how.
        hooks: whether answers are sampled under interventions.
        chats: `thinking` and `chat_template`, as in `load`.
        adapters: adapter folders, by the name of the organism.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        dtype: Dtype,
        config: VllmConfig,
        hooks: bool,
        chats: Mapping[str, Any],
        adapters: Mapping[str, Path],
    ) -> None:
        self._name, self._revision, self._dtype = model, revision, dtype
        self._config, self._hooks, self._chats, self._adapters = config, hooks, chats, adapters
        self._model: Any = None

    def engine(self, name: str) -> Engine:
        """Samples with the base model or an organism."""
        # vLLM is an extra, and takes seconds to import.
        from misdirection.sampling.vllm.engine import Resources, VllmModel
        from misdirection.sampling.vllm.server import ServerEngine

        config = self._config
        if config.base_url is not None:
            adapter = self._adapters.get(name)
            chat = weightless(self._name, self._revision, **self._chats)
            return ServerEngine(config.base_url, self._name, name, adapter, revision=self._revision, chat=chat)
        if self._model is None:
            resources = Resources(config.tensor_parallel, config.pipeline_parallel, config.memory, self._hooks)
            options: dict[str, Any] = {"revision": self._revision, "dtype": self._dtype, "resources": resources}
            options["chat"] = weightless(self._name, self._revision, **self._chats)
            self._model = VllmModel(self._name, adapters=self._adapters, **options)
        return self._model.engine(name)

    def close(self) -> None:
        """End vLLM, if it was started."""
        if self._model is not None:
            self._model.close()
