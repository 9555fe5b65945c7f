"""One base model and its organisms in vLLM: in this process, or on a running server."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from misdirection.choices import Dtype
from misdirection.models.weightless import weightless
from misdirection.models.whole_weights import is_whole
from misdirection.sampling.config import VllmConfig
from misdirection.sampling.engine import Engine


class VllmServing:
    """Engines of one base model and its organisms; vLLM is started when the first is asked for.

    The base and its adapters share one engine. A whole model has vLLM to itself, and is loaded in the other's place.

    Args:
        model, revision, dtype: the base model.
        config: where and how.
        hooks: whether answers are sampled under interventions.
        chats: `thinking` and `chat_template`, as in `load`.
        adapters: folders of adapters and whole models, by the name of the organism.
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
        self._config, self._hooks, self._chats = config, hooks, chats
        self._whole = {name: folder for name, folder in adapters.items() if is_whole(folder)}
        self._adapters = {name: folder for name, folder in adapters.items() if name not in self._whole}
        self._model: Any = None
        self._running: Path | None = None

    def engine(self, name: str) -> Engine:
        """Samples with the base model or an organism."""
        # vLLM is an extra, and takes seconds to import.
        from misdirection.sampling.vllm.adapters import BASE
        from misdirection.sampling.vllm.server import ServerEngine

        url, whole = self._config.base_url, self._whole.get(name)
        if url is None:
            if self._model is None or whole != self._running:
                self._start(whole)
            return self._model.engine(BASE if whole else name)
        assert whole is None, "a configuration with whole models and a server is refused"
        adapter, chat = self._adapters.get(name), weightless(self._name, self._revision, **self._chats)
        return ServerEngine(url, self._name, name, adapter, revision=self._revision, chat=chat)

    def _start(self, whole: Path | None) -> None:
        """Load the base with all adapters, or a whole model with the base's chats."""
        from misdirection.sampling.vllm.engine import Resources, VllmModel

        self.close()
        config = self._config
        resources = Resources(config.tensor_parallel, config.pipeline_parallel, config.memory, self._hooks)
        chat = weightless(self._name, self._revision, **self._chats)
        if whole:
            chat = replace(chat, name=str(whole), revision=None)
        adapters = {} if whole else self._adapters
        options: dict[str, Any] = {"revision": chat.revision, "dtype": self._dtype, "resources": resources}
        self._model = VllmModel(chat.name, adapters=adapters, chat=chat, **options)
        self._running = whole

    def close(self) -> None:
        """End vLLM, if it was started."""
        if self._model is not None:
            self._model.close()
            self._model = None
