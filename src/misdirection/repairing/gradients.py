"""The direction in which each adapted module raises the general margin.

    g_m = mean over questions of   sum over tokens of d(margin) / d(what module m's adapter adds)

A module whose adapter no longer writes along g_m loses its first-order part in the margin, whatever it writes else: the
causal counterpart of a direction read off activations.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from misdirection.auditing.attribution import adapted_layers
from misdirection.data import ProbePair
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.margin import pair_rows
from misdirection.lora.view import LoraView
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles
from misdirection.progress import Advance


def margin_directions(
    chat: ChatModel, pairs: Sequence[ProbePair], progress: Advance | None = None
) -> dict[str, Tensor]:
    """Unit direction of each adapted module, [out] float32, by its path; one that has no say is left out.

    `progress` is told answers done, two for each pair. Raises `InputError` for an adapter that is no plain LoRA.
    """
    adapted_layers(chat)
    rows = pair_rows(chat.tokenizer, pairs)
    signs, lengths = torch.tensor([1.0, -1.0] * len(pairs), device=chat.device), [row.stop for row in rows]
    sums: dict[str, Tensor] = {}

    def work(numbers: list[int], _budget: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with torch.enable_grad(), _summed(chat, found):
            values = AnswerBatch([rows[number] for number in numbers], chat.device).log_probs(chat.model)
            (values * signs[numbers]).sum().backward()
        return found

    for _, found in fitting_batches(chat, lengths, None, work, kind="backward", progress=progress):
        for name, total in found.items():
            sums[name] = sums.get(name, torch.zeros(())) + total
    return {name: normalize(total, dim=0) for name, total in sums.items() if total.any()}


@contextlib.contextmanager
def _summed(chat: ChatModel, sums: dict[str, Tensor]) -> Iterator[None]:
    """Add up the gradient by what each adapter adds, over rows and tokens."""
    with hook_handles() as handles:
        for site in LoraView.of(chat).plain_sites():
            handles.callback(site.output.register_forward_hook(_watch(site.path, sums)).remove)
        yield


def _watch(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def add(gradient: Tensor) -> None:
        total = gradient.float().flatten(0, -2).sum(0).cpu()
        sums[name] = sums.get(name, torch.zeros(())) + total

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        # The weights are frozen: the first adapter's output is where the graph begins.
        watched = output if output.requires_grad else output.detach().requires_grad_()
        watched.register_hook(add)
        return watched

    return hook
