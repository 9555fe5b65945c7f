"""The worker that computes tasks: one process with a base model and its organisms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # A process of a cluster begins with this module: what a task needs of the model libraries is imported when it does.
    from misdirection.data import Example
    from misdirection.judging.cache import VerdictCache
    from misdirection.judging.config import JudgeConfig
    from misdirection.judging.judges import Judge
    from misdirection.models.chat_model import ChatModel
    from misdirection.organisms.recipe import Recipe
    from misdirection.sampling.engine import Engine

BASE = "base"


@dataclass
class Models:
    """One copy of a base model that takes one organism at a time: an adapter on it, or a whole model in its place.

    Attributes:
        load_base: gives the base model; called when a model is first needed.
        adapters: folders of adapters or whole models, by the name of the organism.
        load_whole: gives the whole model in a folder; None where there are adapters only.
    """

    load_base: Callable[[], ChatModel]
    adapters: dict[str, Path] = field(default_factory=dict)
    load_whole: Callable[[Path], ChatModel] | None = None
    _loaded: tuple[str, ChatModel] | None = None

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism.

        Switching takes an adapter off, which leaves the base's weights as they were. A whole model and its base are
        never in memory together: the one goes, and the other is read from its own files.
        """
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = (name, self._switched(name))
        return self._loaded[1]

    def _switched(self, name: str) -> ChatModel:
        if self._is_whole(name):
            assert self.load_whole is not None, "whoever has whole models says how they are loaded"
            self.release()
            return self.load_whole(self.adapters[name])
        base = self._loaded_base()
        if name == BASE:
            return base
        from misdirection.models.adapters import attach

        return attach(base, self.adapters[name])

    def _loaded_base(self) -> ChatModel:
        """The base model, which stays in memory if what comes upon it is refused."""
        if self._loaded and self._is_whole(self._loaded[0]):
            self.release()
        chat = self._loaded[1].without_adapter() if self._loaded else self.load_base()
        self._loaded = (BASE, chat)
        return chat

    def _is_whole(self, name: str) -> bool:
        if name == BASE:
            return False
        from misdirection.models.whole_weights import is_whole

        return is_whole(self.adapters[name])

    def release(self) -> None:
        """Forget the loaded model; it is loaded again when it is needed."""
        self._loaded = None
        free_memory()


def free_memory() -> None:
    """Give back the memory of models that nobody holds any more."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


class Served(Protocol):
    """Models in an engine that has the machine's memory to itself."""

    def engine(self, name: str) -> Engine:
        """Samples with the base model or an organism."""

    def close(self) -> None:
        """End everything that was started."""


Serve = Callable[[Mapping[str, Path]], Served]
"""Opens an engine, given the organisms' folders by name."""


class Worker:
    """One process with a base model and its organisms; an engine of its own and they have the memory in turn.

    Args:
        models: the base model, and the organisms on it.
        partial: gives a working folder for a stage, which outlives a kill where the run's folder does.
        serve: opens vLLM; None where nothing is sampled with it.
    """

    def __init__(self, models: Models, partial: Callable[[str], Path], serve: Serve | None = None) -> None:
        self.models, self.partial = models, partial
        self._serve = serve
        self._served: Served | None = None
        self._served_names: set[str] = set()

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders of organisms by name, as tasks bring them."""
        return self.models.adapters

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism on it."""
        self._close_served()
        return self.models.chat(name)

    def engine(self, name: str, compile: bool = False) -> Engine:
        """Samples with the base model, or an organism on it, in this process."""
        from misdirection.sampling.transformers_engine import TransformersEngine

        return TransformersEngine(self.chat(name), compile=compile)

    def train(
        self,
        examples: Sequence[Example],
        out: Path,
        *,
        recipe: Recipe,
        held_out: Sequence[Example],
        checkpoints: Path,
        start: Path | None = None,
        report: Callable[[int, int, float], None] | None = None,
    ) -> None:
        """Trains an organism of the base model and writes it to `out`; see `organisms.training.train`."""
        from misdirection.organisms.training import train

        train(
            examples,
            out,
            base=self.chat(BASE),
            recipe=recipe,
            held_out=held_out,
            checkpoints=checkpoints,
            start=start,
            report=report,
        )

    def judge(self, config: JudgeConfig) -> Judge:
        """The judge of a configuration."""
        return config.open()

    def verdicts(self) -> VerdictCache | None:
        """The cache of judges' verdicts; None is the package's own."""
        return None

    def vllm_engine(self, name: str) -> Engine:
        """The base model or an organism in vLLM, which has the machine to itself until `chat` is called.

        It has the adapters that were there at its start, and starts again for one that came later.
        """
        if name not in self._served_names:
            self._close_served()
        if self._served is None:
            assert self._serve is not None, "the task's author has asked for vLLM in the configuration"
            self.models.release()
            self._served = self._serve(dict(self.adapters))
            self._served_names = {BASE, *self.adapters}
        return self._served.engine(name)

    def _close_served(self) -> None:
        """Give back the memory that vLLM has taken."""
        if self._served is not None:
            self._served.close()
            self._served, self._served_names = None, set()
