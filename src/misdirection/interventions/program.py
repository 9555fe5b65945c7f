"""From lists of interventions, one for each row, to a few batched operations."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from misdirection.interventions.intervention import Intervention
from misdirection.interventions.operations import Operation
from misdirection.interventions.positions import Rule, TokenPositions
from misdirection.models.transfer import put


@dataclass(frozen=True)
class Step:
    """One operation on some rows of a batch; `rows` is None for all of them."""

    operation: Operation
    rule: Rule
    rows: Tensor | None

    def run(self, x: Tensor, positions: TokenPositions, devices: "Devices") -> Tensor:
        """The changed `x`, [rows, tokens, width]."""
        operation = devices.of(self.operation, x)
        touched = positions.touched(self.rule, x.device)
        if self.rows is None:
            return operation.apply(x, touched)
        rows = devices.numbers(self.rows, x.device)
        return x.index_copy(0, rows, operation.apply(x[rows], touched[rows]))


class Compiler:
    """Makes batched operations; all layers of one ablation share theirs."""

    def __init__(self) -> None:
        self._operations: dict[Hashable, Operation] = {}

    def steps(self, rows: Sequence[Sequence[Intervention]], where: int | str) -> list[Step]:
        """Operations that do to every row what its list says, in its order, at a layer or at a module of this path."""
        made = []
        for slot in itertools.zip_longest(*rows):
            groups: dict[Hashable, list[int]] = {}
            for number, intervention in enumerate(slot):
                if intervention is not None:
                    groups.setdefault(intervention.signature, []).append(number)
            for members in groups.values():
                stacked = [slot[number] for number in members]
                numbers = None if len(members) == len(rows) else torch.tensor(members)
                made.append(Step(self._operation(stacked, where), stacked[0].positions, numbers))
        return made

    def _operation(self, interventions: list[Intervention], where: int | str) -> Operation:
        first = interventions[0]
        if all(each is first for each in interventions):
            interventions = interventions[:1]
        key = (*map(id, interventions), where if first.differs_by_site else None)
        if key not in self._operations:
            self._operations[key] = first.stack(interventions, where)
        return self._operations[key]


class Devices:
    """Copies of operations in the dtype and on the device where they are used, each made once."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device, torch.dtype], Operation] = {}
        self._numbers: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, operation: Operation, x: Tensor) -> Operation:
        """`operation` as it can be applied to `x`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        key = (id(operation), x.device, wide)
        if key not in self._copies:
            # What is made in inference mode could not be used in a training step later in the same context.
            with torch.inference_mode(False):
                self._copies[key] = operation.on(x.device, wide)
        return self._copies[key]

    def numbers(self, rows: Tensor, device: torch.device) -> Tensor:
        """Row numbers on a device."""
        key = (id(rows), device)
        if key not in self._numbers:
            with torch.inference_mode(False):
                self._numbers[key] = put(rows, device)
        return self._numbers[key]
