"""The base of all kinds of interventions, and the registry by which another package adds one.

A kind is a frozen dataclass under `Intervention` that says which layers it acts on and which operation it is. With that
it works in hooks, in sweeps of margins, in sampling (vLLM, too) and in the hashes of results. For instance:

    @KINDS.register("Damp")
    @dataclass(frozen=True, eq=False)
    class Damp(Intervention):
        '''x <- factor * x at the output of one block.'''

        layer: int
        factor: float = 0.5
        positions: Rule = "not_first"

        @property
        def layers(self):
            return (self.layer,)

        @classmethod
        def stack(cls, interventions, where):
            return Multiply(column([each.factor for each in interventions]))

    margin = sweep(chat, pairs, [(), [Damp(12, 0.9)]])

For processes that do not import its module, such as vLLM's, the package names the kind in its entry points:

    [project.entry-points."misdirection.interventions"]
    Damp = "my_package.damp:Damp"
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor

from misdirection.errors import InputError
from misdirection.interventions.operations import Operation
from misdirection.interventions.positions import Positions, Rule
from misdirection.interventions.sites import Site
from misdirection.interventions.vectors import digest
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import require_layers
from misdirection.registry import Registry

_LONG = 40
"""Letters of a setting that a table still shows."""


class Intervention(ABC):
    """One change of what a model computes, on the tokens that its rule names.

    A kind must give `layers` (a property, or a field with a default) and `stack`; the rest follows from these unless it
    says otherwise. It is a frozen dataclass with `eq=False`: equal tensors are not compared.

    Attributes:
        positions: which tokens are touched.
        differs_by_site: whether `stack` gives something else at another layer or module.
    """

    positions: Rule
    differs_by_site: ClassVar[bool] = False

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The decoder blocks that this acts on, 0-based; None for all of them."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def stack(cls, interventions: Sequence[Self], where: Any) -> Operation:
        """One operation that does to each row what one of `interventions` does, in their order.

        Args:
            interventions: of one signature.
            where: the layer, or the path of the module, where the operation acts.
        """

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """Interventions of one signature can be stacked into one operation."""
        return (type(self), rule_key(self.positions))

    def check(self, layers: int, width: int) -> None:
        """Raise `InputError` unless this fits a model of so many `layers` and such a `width`."""
        name = type(self).__name__
        if any(isinstance(value, float) and not math.isfinite(value) for value in self._numbers()):
            raise InputError(f"{name}: a setting is NaN or infinite: give a number")
        _check_rule(name, self.positions)
        if self.layers is not None and not self.layers:
            raise InputError(f"{name}: names no layer, so that nothing would happen: name one")
        require_layers(self.layers or (), layers, f"{name}: ")

    def _numbers(self) -> list[Any]:
        """The settings, of which those that are numbers must be finite."""
        return list(vars(self).values())

    def sites(self, chat: ChatModel) -> list[Site]:
        """Where it acts: by default, at the outputs of its layers. Raises `InputError` where this cannot be."""
        layers = range(len(chat.layers)) if self.layers is None else self.layers
        return [Site(chat.layers[layer], "output", layer) for layer in layers]

    @property
    def first_block(self) -> int:
        """The first block whose output the intervention itself changes; -1 when it changes what enters block 0.

        The blocks up to this one compute what they compute without it.
        """
        return min(self.layers or (0,))

    def described(self) -> dict[str, Any]:
        """Kind and settings as JSON values, tensors by their SHA-256 (float32): what a result or a file depends on."""
        settings = {name: _plain(value) for name, value in vars(self).items()}
        return {"kind": type(self).__name__, **settings}

    def __str__(self) -> str:
        """Kind and settings as a table names them; tensors and long settings by the first digits of a hash."""
        settings = (f"{name}={_short(value)}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(settings)})"

    @property
    def acts_everywhere(self) -> bool:
        """Whether it touches every token."""
        return isinstance(self.positions, str) and self.positions == "all"

    @property
    def on_adapters(self) -> bool:
        """Whether it changes what adapters add, and nothing else, so that it can be one more adapter."""
        return False

    def changed_weights(self, weights: Mapping[str, Tensor], chat: ChatModel) -> dict[str, Tensor]:
        """Those of an adapter's weights, by their names in its file, that it changes, as it leaves them, in float32.

        Raises `InputError` for a layer or module without an adapter, and for what is not `on_adapters`.
        """
        raise InputError(f"{type(self).__name__}: changes more than adapters: keep it as a hook")


KINDS: Registry[type[Intervention]] = Registry(
    "intervention",
    "misdirection.interventions",
    {
        name: f"misdirection.interventions.kinds:{name}"
        for name in ("Steer", "Ablate", "Clamp", "ScaleAdapters", "ProjectAdapters")
    },
)
"""The kinds, by the names of their classes."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return digest(value) if isinstance(value, Tensor) else value


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest(value)[:8]
    text = json.dumps(_plain(value), sort_keys=True, default=str)
    return text if len(text) <= _LONG else hashlib.sha256(text.encode()).hexdigest()[:8]


def rule_text(rule: Rule) -> str:
    """A position rule as messages say it."""
    return repr(rule) if isinstance(rule, str) else "given by a mask"


def rule_key(rule: Rule) -> str | int:
    """The key of a position rule: its name, or the identity of a mask."""
    return rule if isinstance(rule, str) else id(rule)


def _check_rule(name: str, rule: Rule) -> None:
    if isinstance(rule, Tensor):
        if rule.dtype != torch.bool or rule.ndim not in (1, 2) or rule.numel() == 0:
            raise InputError(f"{name}: a position mask is one boolean per place, [places] or [rows, places]")
        if not rule.any():
            raise InputError(f"{name}: its position mask names no place, so that nothing would happen: name one")
    elif rule not in get_args(Positions):
        raise InputError(f"{name}: positions {rule!r}: give one of {', '.join(get_args(Positions))}, or a mask")
