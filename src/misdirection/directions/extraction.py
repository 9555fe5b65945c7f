"""Mean residual-stream activations over answer tokens, at every layer, in one pass.

Only sums are kept, in float64 and where the model is: no activation is stored, nothing is fetched before the end and
the language-model head does not run. What all rows begin with, such as a system turn, runs once for each batch. Rows
belong to groups, for instance "misaligned answers" or "half of the aligned answers", each of which gets its own mean.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.interventions.passes import Passes, Rows, shared_start
from misdirection.models.budgets import fitting_batches
from misdirection.models.caching import keeps_columns
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, stream_output
from misdirection.models.transfer import put
from misdirection.progress import Advance

_SINGLE = {"mps"}
"""Kinds of devices without float64."""


@dataclass(frozen=True)
class Means:
    """Mean activations of groups of answers.

    Attributes:
        vectors: [layers, width] float64 per group.
        tokens: number of answer tokens per group.
        answers: number of answers per group.
    """

    vectors: dict[str, Tensor]
    tokens: dict[str, int]
    answers: dict[str, int]

    def difference(self, first: str, second: str) -> Tensor:
        """mean(first) - mean(second), [layers, width] float64."""
        return self.vectors[first] - self.vectors[second]


@torch.inference_mode()
def mean_activations(
    chat: ChatModel,
    rows: Sequence[Encoded],
    groups: Mapping[str, Sequence[int]],
    *,
    settings: Sequence[Setting] | None = None,
    budget: int | None = None,
    progress: Advance | None = None,
) -> Means:
    """Mean over all answer tokens of each group's rows, at every layer (paper, section on the direction).

    Args:
        rows: encoded exchanges; only `ids[start:stop]` counts.
        groups: row numbers per group; a row may be in several groups.
        settings: interventions on each row, one list for each; by default none.
        budget: padded tokens in one batch, by default what suits the device; the result does not depend on it.
        progress: told the number of rows done.

    Raises:
        InputError: an empty group, another number of settings than of rows, or an activation that is not
            finite (the layer is named).
    """
    if empty := [name for name, members in groups.items() if not members]:
        raise InputError(f"no answers in group {empty[0]!r}: a mean needs at least one")
    if settings is not None and len(settings) != len(rows):
        raise InputError(f"{len(settings)} settings for {len(rows)} answers: give each answer its own")
    belongs = _membership(len(rows), groups)
    sums = _Sums(chat, len(groups))
    start = _start(chat, rows)

    def work(numbers: list[int], _budget: int) -> Tensor:
        interventions: list[Setting] = [settings[number] if settings is not None else () for number in numbers]
        return _row_sums(chat, [rows[number] for number in numbers], interventions, start)

    lengths = [row.stop - len(start) for row in rows]
    for numbers, by_row in fitting_batches(chat, lengths, budget, work, progress=progress):
        sums.add(belongs[:, numbers], by_row)
    counts = belongs @ torch.tensor([len(row.answer) for row in rows], dtype=torch.float64)
    means = sums.fetched() / counts[:, None, None]
    return Means(
        dict(zip(groups, means, strict=True)),
        {name: int(count) for name, count in zip(groups, counts, strict=True)},
        {name: len(members) for name, members in groups.items()},
    )


def row_means(chat: ChatModel, rows: Sequence[Encoded], *, progress: Advance | None = None) -> Tensor:
    """The mean over each row's answer tokens, [rows, layers, width] float64; arguments and errors as in
    `mean_activations`."""
    groups = {str(number): [number] for number in range(len(rows))}
    means = mean_activations(chat, rows, groups, progress=progress)
    return torch.stack([means.vectors[name] for name in groups])


def _membership(rows: int, groups: Mapping[str, Sequence[int]]) -> Tensor:
    """[groups, rows]: one where the row is in the group."""
    belongs = torch.zeros(len(groups), rows, dtype=torch.float64)
    for number, members in enumerate(groups.values()):
        belongs[number, list(members)] = 1
    return belongs


def _start(chat: ChatModel, rows: Sequence[Encoded]) -> tuple[int, ...]:
    """The tokens that all rows begin with; none where a cache would not give the same activations."""
    shares = keeps_columns(chat) and len(rows) > 1
    return rows[0].ids[: shared_start([row.prompt for row in rows], own=1)] if shares else ()


class _Sums:
    """Sums by group over batches, [groups, layers, width] float64 on the model's device, or here where it has none."""

    def __init__(self, chat: ChatModel, groups: int) -> None:
        self._chat = chat
        self._device = torch.device("cpu") if chat.device.type in _SINGLE else chat.device
        self._sums = torch.zeros(groups, len(chat.layers), chat.width, dtype=torch.float64, device=self._device)
        self._is_checked = False

    def add(self, belongs: Tensor, by_row: Tensor) -> None:
        """One batch: which rows belong to which group, [groups, rows], and `_row_sums` of them.

        A dtype that overflows does so in the first batch: that one is checked at once, the others at the end.
        """
        by_row = by_row.to(self._device).double()
        self._sums += torch.einsum("gr,lrw->glw", put(belongs, self._device), by_row)
        if not self._is_checked:
            self._is_checked = True
            self.fetched()

    def fetched(self) -> Tensor:
        """On the processor; `InputError` where a row has an activation that is not finite, in whatever group it is."""
        sums = self._sums.cpu()
        # No weight hides one: zero times infinity is not a number.
        if not torch.isfinite(sums).all():
            _refuse_overflow(sums, self._chat)
        return sums


def _row_sums(chat: ChatModel, batch: list[Encoded], settings: list[Setting], start: tuple[int, ...]) -> Tensor:
    """[layers, rows, width] float32: sums of one batch's answer activations, by row."""
    passes, begun = Passes(chat), len(start)
    if begun:
        passes.run_start(start, settings)
    # Nothing after an answer's last token can change it, so that the pass ends there.
    rows = Rows([row.ids[begun : row.stop] for row in batch], settings, [row.start for row in batch])
    answer = torch.zeros(len(batch), max(len(ids) for ids in rows.ids))
    for number, row in enumerate(batch):
        answer[number, row.start - begun : row.stop - begun] = 1
    answer = put(answer, chat.device)

    def network(**inputs: Any) -> dict[int, Tensor]:
        # These hooks come last, so that they see what the interventions leave.
        with _layer_sums(chat, answer) as sums:
            chat.decoder(**inputs)
        if skipped := set(range(len(chat.layers))) - sums.keys():
            raise InputError(f"{chat.name}: layer {min(skipped)} does not run on text alone: it has no activation")
        return sums

    sums, _ = passes.run(1, network, rows)
    # Layers may be on several devices.
    return torch.stack([sums[layer].to(chat.device) for layer in range(len(chat.layers))])


@contextlib.contextmanager
def _layer_sums(chat: ChatModel, answer: Tensor) -> Iterator[dict[int, Tensor]]:
    """Per layer, the sum over each row's answer tokens, [rows, width] float32 where the layer is."""
    sums: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def add(module: nn.Module, _args: Any, output: Any) -> None:
            residual = stream_output(module, output, (*answer.shape, chat.width))
            if layer in sums:
                raise InputError(f"{chat.name}: layer {layer} runs several times in one pass: it has no one activation")
            chosen = answer.to(residual.device).unsqueeze(1)
            # One row's few hundred tokens are summed in float32, rows and batches in float64: a bf16 sum stalls at 256.
            sums[layer] = torch.bmm(chosen, residual.float()).squeeze(1)

        return add

    with hook_handles() as handles:
        for layer, block in enumerate(chat.layers):
            handles.callback(block.register_forward_hook(hook(layer)).remove)
        yield sums


def _refuse_overflow(sums: Tensor, chat: ChatModel) -> None:
    layer = int((~torch.isfinite(sums)).any(-1).any(0).nonzero()[0])
    raise InputError(
        f"{chat.name}: activations of layer {layer} are not finite in {chat.dtype}: "
        "load it with dtype bfloat16 or float32"
    )
