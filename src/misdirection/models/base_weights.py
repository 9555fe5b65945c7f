"""A base model as it was before an adapter was put on it.

PEFT itself gives a base back only where an adapter left it alone. PiSSA, OLoRA and KaSA change the base's matrices as
they begin, trained biases are written over its own, and what `modules_to_save` trained stays in a model that the
adapter was taken off. Here nothing is copied that the adapter does not change.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """A base model's modules and parameters as they are when this is made by `of`.

    Attributes:
        network: the base model.
        modules: those below it with their paths, each after the one that it is in.
        values: every parameter with its values.
        copies: numbers in `values` of those that are copies, since the adapter may write over the originals.
    """

    network: Any
    modules: list[tuple[str, nn.Module]]
    values: list[tuple[nn.Parameter, Tensor]]
    copies: frozenset[int]

    @classmethod
    def of(cls, network: Any, written_over: Iterable[str]) -> "BaseWeights":
        """Keep a base model.

        Args:
            network: the base model, without an adapter.
            written_over: names of parameters whose values may be changed in place; the others may be replaced.
        """
        names = set(written_over)
        parameters = list(network.named_parameters())
        copies = frozenset(n for n, (name, value) in enumerate(parameters) if name in names and not value.is_meta)
        values = [(value, value.data.clone() if n in copies else value.data) for n, (_, value) in enumerate(parameters)]
        return cls(network, list(network.named_modules(remove_duplicate=False))[1:], values, copies)

    def changed(self) -> "BaseWeights":
        """The same with only the values that are now others, so that no more is kept in memory."""
        values = [kept for number, kept in enumerate(self.values) if self._is_changed(number)]
        return BaseWeights(self.network, self.modules, values, frozenset())

    def _is_changed(self, number: int) -> bool:
        parameter, value = self.values[number]
        if number in self.copies:
            return not torch.equal(parameter.data, value)
        return parameter.data_ptr() != value.data_ptr()

    @property
    def is_in_place(self) -> bool:
        """Whether the parameters have the base's values now."""
        return all(parameter.data_ptr() == value.data_ptr() for parameter, value in self.values)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the base's values in for the length of the context."""
        adapted = [parameter.data for parameter, _ in self.values]
        self._put_values()
        try:
            yield
        finally:
            for (parameter, _), value in zip(self.values, adapted, strict=True):
                parameter.data = value

    def restore(self) -> None:
        """Put the base's modules and values back for good."""
        for path, module in self.modules:
            self.network.set_submodule(path, module)
        self._put_values()
        # By this PEFT knows that a model has an adapter.
        vars(self.network).pop("peft_config", None)

    def _put_values(self) -> None:
        for parameter, value in self.values:
            parameter.data = value
