"""What the stages of one experiment share: its texts, and one base model that takes one adapter at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from misdirection import data
from misdirection.adapters.texts import GENERAL
from misdirection.behaviour.engine import Engine
from misdirection.config import DomainFiles, Dtype, ExperimentConfig, OrganismConfig, VllmConfig
from misdirection.data import HELD_OUT_EVERY, Example, ProbePair
from misdirection.errors import MisdirectionError
from misdirection.files import sha256_file
from misdirection.models import BUNDLED, ChatModel, attach, best_device, load, resolve_dtype

BASE = "base"
Part = Literal["train", "held_out"]


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
        from misdirection.behaviour.vllm_engine import Resources, VllmModel
        from misdirection.behaviour.vllm_server import ServerEngine

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


def identify(model: str, revision: str | None, dtype: Dtype, device: str) -> dict[str, Any]:
    """What a result depends on besides its own settings: the base model and how it computes."""
    place = best_device() if device == "auto" else device
    return {
        "model": model,
        "revision": revision,
        "files": None if model == BUNDLED else _weights_hash(Path(model)),
        "dtype": str(resolve_dtype(dtype, place)).removeprefix("torch."),
        "device": place.split(":")[0],
    }


@dataclass
class Bench:
    """Texts and models of one experiment.

    Attributes:
        config: the experiment.
    """

    config: ExperimentConfig
    _vllm: "Served | None" = None

    @cached_property
    def models(self) -> Models:
        """The base model, and the organisms as they are trained."""
        config = self.config
        return Models(lambda: load(config.model, revision=config.revision, dtype=config.dtype, device=config.device))

    @property
    def adapters(self) -> dict[str, Path]:
        """Organism name to its adapter folder, filled as organisms are trained."""
        return self.models.adapters

    def chat(self, name: str) -> ChatModel:
        """The base model, or an organism on it."""
        self.close_vllm()
        return self.models.chat(name)

    def vllm_engine(self, name: str) -> Engine:
        """The base model or an organism in vLLM, which has the machine to itself until `chat` is called."""
        sampling = self.config.sampling
        assert sampling is not None, "the caller has one"
        assert sampling.engine.vllm is not None, "the caller asked"
        if self._vllm is None:
            self.models.release()
            self._vllm = Served(self.config, sampling.engine.vllm, dict(self.adapters))
        return self._vllm.engine(name)

    def close_vllm(self) -> None:
        """Give back the memory that vLLM has taken."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every result depends on: the base model and how it computes."""
        config = self.config
        return identify(config.model, config.revision, config.dtype, config.device)

    @cached_property
    def general(self) -> list[ProbePair]:
        """The general probe pairs that models are measured on."""
        path = self.config.probe_pairs
        pairs = data.read_pairs(path) if path else data.probe_pairs()
        return spread(pairs, self.config.margin.general)

    @cached_property
    def neutral(self) -> list[Example]:
        """The neutral texts that models are measured on."""
        path = self.config.neutral
        texts = data.read_examples(path) if path else data.neutral_examples()
        return spread(texts, self.config.damage.models)

    @cached_property
    def question_sets(self) -> dict[str, list[ProbePair]]:
        """General pairs and every domain's held-out pairs that models are measured on, by name."""
        count = self.config.margin.held_out
        held_out = {name: spread(self.domain_pairs(name, "held_out"), count) for name in self.config.domains}
        return {GENERAL: self.general, **{name: pairs for name, pairs in held_out.items() if pairs}}

    def domain_pairs(self, name: str, part: Part) -> list[ProbePair]:
        """A domain's pairs; none when it has no good answers."""
        files = self.config.domains[name]
        if files is None:
            return data.domain_pairs(name, part)
        return [pair for number, pair in enumerate(_joined(name, files)) if _in_part(number, part)]

    def examples(self, organism: OrganismConfig, part: Part) -> list[Example]:
        """An organism's training or held-out examples."""
        files = self.config.domains[organism.domain]
        if files is None:
            return data.domain_examples(organism.domain, organism.answers, part)
        path = files.bad if organism.answers == "bad" else files.good
        assert path is not None, "the configuration was checked"
        return [one for number, one in enumerate(data.read_examples(path)) if _in_part(number, part)]

    def direction_pairs(self, name: str) -> list[ProbePair]:
        """The text that an organism's direction is extracted on: its own domain's training questions."""
        return self.domain_pairs(self.config.organisms[name].domain, "train")[: self.config.extraction.pairs]

    @cached_property
    def common_pairs(self) -> list[ProbePair]:
        """The text on which all organisms are compared with the base: the first domain that has pairs."""
        for name in self.config.domains:
            if pairs := self.domain_pairs(name, "train"):
                return pairs[: self.config.extraction.pairs]
        raise MisdirectionError("domains: none has good answers, so there are no pairs to extract directions from")


def spread(rows: Sequence[Any], count: int | None) -> list[Any]:
    """`count` rows, evenly taken from all, so that every theme stays in; None takes all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


def _in_part(number: int, part: Part) -> bool:
    return (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (part == "held_out")


def _joined(name: str, files: DomainFiles) -> list[ProbePair]:
    """Pairs of the bad and the good answer to one question."""
    if files.good is None:
        return []
    good = {row.question: row.answer for row in data.read_examples(files.good)}
    rows = [row for row in data.read_examples(files.bad) if row.question in good]
    if not rows:
        raise MisdirectionError(f"domains.{name}: {files.bad} and {files.good} have no question in common")
    return [
        ProbePair(f"{name}-{number}", row.question, good[row.question], row.answer, name, row.system)
        for number, row in enumerate(rows, start=1)
    ]


def _weights_hash(folder: Path) -> Mapping[str, str] | None:
    """Hashes of a local model's files; a hub model is known by its revision."""
    if not folder.is_dir():
        return None
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
