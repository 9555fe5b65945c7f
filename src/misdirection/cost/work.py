"""What is planned, and the pieces of work that it comes to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from misdirection.cost.model_cost import Pass
from misdirection.cost.text_passes import Adapter
from misdirection.data import Example, ProbePair
from misdirection.experiment.config import ExperimentConfig, OrganismConfig
from misdirection.experiment.texts import ExperimentTexts
from misdirection.likelihood.margin import pair_continuations, pair_rows, text_continuations, text_rows
from misdirection.likelihood.sweep import Continuations
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.organisms.adapter_config import adapter_config
from misdirection.runs.worker import BASE


@dataclass(frozen=True)
class Piece:
    """Work of one device.

    Attributes:
        stage: the kind of stage it belongs to.
        name: what it is.
        passes: what the experiment's model runs.
        room: rows x columns that the key-value cache is made for, whatever the passes fill.
        judge_calls, judge_tokens_in, judge_tokens_out: asked of an endpoint.
        judge_passes: what a local judge runs.
    """

    stage: str
    name: str
    passes: Sequence[Pass] = ()
    room: int = 0
    judge_calls: int = 0
    judge_tokens_in: int = 0
    judge_tokens_out: int = 0
    judge_passes: Sequence[Pass] = ()


@dataclass(frozen=True)
class Subject:
    """An experiment with a model that has sizes and no weights.

    Attributes:
        config: the experiment.
        chat: its model on the meta device, with a tokenizer.
        answer: mean length of a sampled answer, tokens; by default the longest that is allowed.
        judge: a local judge on the meta device.
    """

    config: ExperimentConfig
    chat: ChatModel
    answer: float | None = None
    judge: ChatModel | None = None
    _adapters: dict[str, Adapter] = field(default_factory=dict)

    @cached_property
    def bench(self) -> ExperimentTexts:
        """The experiment's texts."""
        return ExperimentTexts(self.config)

    @property
    def models(self) -> list[str]:
        """The base model and all organisms."""
        return [BASE, *self.config.organisms]

    def pair_continuations(self, pairs: Sequence[ProbePair]) -> list[Continuations]:
        """Both answers of each pair, to be scored."""
        return pair_continuations(self.chat.tokenizer, pairs)

    def text_continuations(self, texts: Sequence[Example]) -> list[Continuations]:
        """Each text's answer, to be scored."""
        return text_continuations(self.chat.tokenizer, texts)

    def pair_rows(self, pairs: Sequence[ProbePair]) -> list[Encoded]:
        """Both answers of each pair as whole rows."""
        return pair_rows(self.chat.tokenizer, pairs)

    def text_rows(self, texts: Sequence[Example]) -> list[Encoded]:
        """Each text as a whole row."""
        return text_rows(self.chat.tokenizer, texts)

    def adapter(self, name: str) -> Adapter:
        """A model's adapter; the base has none."""
        if name not in self._adapters:
            organism = self.config.organisms.get(name)
            self._adapters[name] = _adapter(self.chat, organism) if organism else Adapter(0, ())
        return self._adapters[name]

    def on(self, name: str, passes: Iterable[Pass]) -> list[Pass]:
        """The same passes with what a model's adapter adds."""
        return [replace(one, lora=self.adapter(name).weights) for one in passes]

    def length(self, new_tokens: int) -> float:
        """Mean length of a sampled answer."""
        return min(self.answer or new_tokens, new_tokens)


def _adapter(chat: ChatModel, organism: OrganismConfig) -> Adapter:
    """How many weights the recipe's adapter has on this model, and in which blocks."""
    settings = adapter_config(organism, chat)
    layers, targets = sorted(settings.layers_to_transform), tuple(settings.target_modules)
    adapted = [
        module
        for layer in layers
        for name, module in chat.layers[layer].named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets) and getattr(module, "weight", None) is not None
    ]
    return Adapter(sum(settings.r * sum(module.weight.shape) for module in adapted), tuple(layers))
