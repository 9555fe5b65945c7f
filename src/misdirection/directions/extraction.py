"""Mean residual-stream activations over answer tokens, at every layer, in one pass.

Only sums are kept, in float64: no activation is stored and the language-model head does not run. What all rows begin
with, such as a system turn, runs once for each batch. Rows belong to groups, for instance "misaligned answers" or
"half of the aligned answers", each of which gets its own mean.
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
from misdirection.likelihood.sweep import TOKEN_BUDGET
from misdirection.models.caching import keeps_columns
from misdirection.models.chat import Encoded, batches
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, stream_output


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
    budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Means:
    """Mean over all answer tokens of each group's rows, at every layer (paper, section on the direction).

    Args:
        rows: encoded exchanges; only `ids[start:stop]` counts.
        groups: row numbers per group; a row may be in several groups.
        settings: interventions on each row, one list for each; by default none.
        budget: padded tokens in one batch; the result does not depend on it.
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
    sums = torch.zeros(len(groups), len(chat.layers), chat.width, dtype=torch.float64)
    start = _start(chat, rows)
    for numbers in batches([row.stop - len(start) for row in rows], budget):
        batch = [rows[number] for number in numbers]
        interventions: list[Setting] = [settings[number] if settings is not None else () for number in numbers]
        sums += _group_sums(chat, batch, interventions, belongs[:, numbers], start)
        if progress:
            progress(len(batch))
    counts = belongs @ torch.tensor([len(row.answer) for row in rows], dtype=torch.float64)
    means = sums / counts[:, None, None]
    return Means(
        dict(zip(groups, means, strict=True)),
        {name: int(count) for name, count in zip(groups, counts, strict=True)},
        {name: len(members) for name, members in groups.items()},
    )


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


def _group_sums(
    chat: ChatModel, batch: list[Encoded], settings: list[Setting], belongs: Tensor, start: tuple[int, ...]
) -> Tensor:
    """[groups, layers, width]: sums of one batch's answer activations, by group."""
    passes, begun = Passes(chat), len(start)
    if begun:
        passes.run_start(start, settings)
    # Nothing after an answer's last token can change it, so that the pass ends there.
    rows = Rows([row.ids[begun : row.stop] for row in batch], settings, [row.start for row in batch])
    answer = torch.zeros(len(batch), max(len(ids) for ids in rows.ids), device=chat.device)
    for number, row in enumerate(batch):
        answer[number, row.start - begun : row.stop - begun] = 1

    def network(**inputs: Any) -> dict[int, Tensor]:
        # These hooks come last, so that they see what the interventions leave.
        with _row_sums(chat, answer) as sums:
            chat.decoder(**inputs)
        if skipped := set(range(len(chat.layers))) - sums.keys():
            raise InputError(f"{chat.name}: layer {min(skipped)} does not run on text alone: it has no activation")
        return sums

    sums, _ = passes.run(1, network, rows)
    by_row = torch.stack([sums[layer] for layer in range(len(chat.layers))])
    if not torch.isfinite(by_row).all():
        _refuse_overflow(by_row, chat)
    return torch.einsum("gr,lrw->glw", belongs, by_row)


@contextlib.contextmanager
def _row_sums(chat: ChatModel, answer: Tensor) -> Iterator[dict[int, Tensor]]:
    """Per layer, the sum over each row's answer tokens, [rows, width] float64 on the processor."""
    sums: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def add(module: nn.Module, _args: Any, output: Any) -> None:
            residual = stream_output(module, output, (*answer.shape, chat.width))
            if layer in sums:
                raise InputError(f"{chat.name}: layer {layer} runs several times in one pass: it has no one activation")
            chosen = answer.to(residual.device).unsqueeze(1)
            # One row's few hundred tokens are summed in float32, rows and batches in float64: a bf16 sum stalls at 256.
            sums[layer] = torch.bmm(chosen, residual.float()).squeeze(1).double().cpu()

        return add

    with hook_handles() as handles:
        for layer, block in enumerate(chat.layers):
            handles.callback(block.register_forward_hook(hook(layer)).remove)
        yield sums


def _refuse_overflow(by_row: Tensor, chat: ChatModel) -> None:
    layer = int((~torch.isfinite(by_row)).flatten(1).any(1).nonzero()[0])
    raise InputError(
        f"{chat.name}: activations of layer {layer} are not finite in {chat.dtype}: "
        "load it with dtype bfloat16 or float32"
    )
