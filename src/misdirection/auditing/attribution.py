"""Attribution of the margin's shift to the layers' adapters, from one backward pass.

With every adapter's contribution multiplied by g, the margin f goes from the base's, f(0), to the fine-tune's, f(1).
The part of one module m is taken at the middle of the way,

    part_m = df / dg_m   at g = 1/2     and     sum_m part_m = f(1) - f(0)

exactly where f is quadratic in g (midpoint rule), so that the sum tells how good the parts are.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.interpretation.importance import gated
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.margin import pair_rows
from misdirection.lora.view import LoraView
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance

Parts = dict[str, Tensor]
"""By module: its part, [questions] float64, nats/token."""


def margin_parts(chat: ChatModel, pairs: Sequence[ProbePair], progress: Advance | None = None) -> Parts:
    """Parts of the margin's shift. `progress` is told answers done, two for each pair.

    Raises `InputError` for an adapter that is no plain LoRA, or adapts nothing inside of the blocks.
    """
    rows = pair_rows(chat.tokenizer, pairs)
    return {name: slope[::2] - slope[1::2] for name, slope in _slopes(chat, rows, progress).items()}


def is_attributed(folder: Path) -> bool:
    """Whether an adapter's shift has parts: it is a plain LoRA inside of the blocks that adds something."""
    try:
        return bool(LoraView.open(folder).layers)
    except InputError:
        return False


def by_layer(chat: ChatModel, parts: Parts) -> dict[int, Tensor]:
    """Sums over the modules of each layer, [questions]."""
    summed: dict[int, Tensor] = {}
    for name, layer in adapted_layers(chat).items():
        summed[layer] = summed.get(layer, torch.zeros(())) + parts[name]
    return dict(sorted(summed.items()))


def adapted_layers(chat: ChatModel) -> dict[str, int]:
    """Layer by module inside of the decoder blocks that adds something; `InputError` where there is none."""
    sites = LoraView.of(chat).plain_sites()
    layers = {site.path: site.layer for site in sites if site.layer is not None and site.b.any()}
    if not layers:
        raise InputError(f"{chat.adapter}: none of its modules adds something inside of a decoder block")
    return layers


def _slopes(chat: ChatModel, rows: Sequence[Encoded], progress: Advance | None) -> Parts:
    """Derivative of each row's mean-token log-probability by each module's gate, at one half; [rows]."""
    adapted_layers(chat)
    modules = {site.path: site.output for site in LoraView.of(chat).plain_sites()}
    slopes = {name: torch.empty(len(rows), dtype=torch.float64) for name in modules}

    def work(numbers: list[int], _budget: int) -> Tensor:
        batch = [rows[number] for number in numbers]
        with torch.enable_grad(), gated(modules, len(batch), max(row.stop for row in batch), at=0.5) as gates:
            total = AnswerBatch(batch, chat.device).log_probs(chat.model).sum()
            # A module whose output nothing reads has a slope of zero.
            gradients = torch.autograd.grad(total, list(gates.values()), materialize_grads=True)
        # A row's gate is that of all its tokens: its slope is the sum of theirs. Modules may be on several devices.
        return torch.stack([gradient.to(chat.device).double().sum(-1) for gradient in gradients]).cpu()

    for numbers, found in fitting_batches(chat, [row.stop for row in rows], None, work, kind="backward"):
        for name, slope in zip(modules, found, strict=True):
            slopes[name][numbers] = slope
        if progress:
            progress(len(numbers))
    return slopes
