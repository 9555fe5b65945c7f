"""Patching: outputs of adapters in one prompt, put into the pass of another.

If adapters carry what a fine-tune learned of a domain, their scalars on a prompt of that domain, put into a pass over
another prompt, should bring its behaviour along. At each position u of the target's prompt and in each adapted module,

    o_u <- o'_u',    u' with len(source) - u' = len(target) - u

so that positions are matched from the end of the prompts, where the tokens of the template stand; what is longer than
the source keeps its own. Only those of the prompt are replaced: the answer's own scalars stay. A position is counted in
its row, not in the running pass: with a key-value cache every new token is the first of its pass, yet no prompt token.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.interventions.hooks import note_passes
from misdirection.interventions.positions import TokenPositions
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.margin import margins_of, pair_rows
from misdirection.lora.view import LoraView
from misdirection.models.attention import changing_shapes
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded, pad
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles
from misdirection.progress import Advance

Prompt = Sequence[int]


@contextlib.contextmanager
def patched(chat: ChatModel, sources: Sequence[Prompt | None], starts: Sequence[int]) -> Iterator[None]:
    """Run `chat` with the adapter outputs of other prompts for the length of the context.

    Works with padding on either side, with and without a key-value cache, and in generation.

    Args:
        chat: a model with plain LoRA adapters.
        sources: ids of the prompt that each row of the passes takes from; None leaves a row as it is.
        starts: number of tokens in each row's own prompt.

    Raises:
        InputError: another number of starts than of sources, or of rows in a pass; no adapters, or such that are not
            plain LoRA.
    """
    _require_same(len(sources), len(starts), "prompts")
    view = LoraView.of(chat)
    modules = [module for layer in view.layers for module in view.outputs(layer)]
    lengths = torch.tensor([len(source or ()) for source in sources])
    outputs = _recorded(chat, modules, sources)
    positions = TokenPositions(rows=len(sources))
    spans = _Spans(positions, lengths.unsqueeze(-1), torch.tensor(starts).unsqueeze(-1))
    with hook_handles() as handles:
        note_passes(chat, positions, handles)
        for module, output in outputs.items():
            handles.callback(module.register_forward_hook(spans.replacing(output)).remove)
        yield


@torch.inference_mode()
def patched_log_probs(
    chat: ChatModel,
    sources: Sequence[Prompt | None],
    targets: Sequence[Encoded],
    *,
    budget: int | None = None,
    progress: Advance | None = None,
) -> Tensor:
    """Mean-token log-probability of each target's answer with its prompt's adapter outputs from another prompt.

    Args:
        chat: a model with plain LoRA adapters.
        sources: ids of the prompt that each target takes from; None leaves a target as it is.
        targets: prompts with the answers that are scored.
        budget: padded tokens in one batch, by default what suits the device; the result does not depend on it.
        progress: told the number of targets done.

    Returns:
        [targets] float64.

    Raises:
        InputError: as `patched`.
    """
    _require_same(len(sources), len(targets), "targets")
    scores = torch.empty(len(targets), dtype=torch.float64)
    lengths = [max(target.stop, len(source or ())) for source, target in zip(sources, targets, strict=True)]

    def work(numbers: list[int], _budget: int) -> Tensor:
        rows = [targets[number] for number in numbers]
        with patched(chat, [sources[number] for number in numbers], [row.start for row in rows]):
            return AnswerBatch(rows, chat.device).log_probs(chat.model).cpu()

    for numbers, found in fitting_batches(chat, lengths, budget, work, progress=progress):
        scores[numbers] = found
    return scores


def patched_margins(
    chat: ChatModel, sources: Sequence[Prompt | None], pairs: Sequence[ProbePair], *, progress: Advance | None = None
) -> Tensor:
    """The margin of each pair with its prompt's adapter outputs from another prompt, [pairs] float64, nats/token.

    Arguments and errors are those of `patched_log_probs`; `progress` is told the number of answers done, two a pair.
    """
    _require_same(len(sources), len(pairs), "pairs")
    rows = pair_rows(chat.tokenizer, pairs)
    doubled = [source for source in sources for _ in range(2)]
    return margins_of(patched_log_probs(chat, doubled, rows, progress=progress).view(-1, 2))


def _require_same(sources: int, others: int, name: str) -> None:
    if sources != others:
        raise InputError(f"{sources} sources for {others} {name}: give each its own, or None for it")


@torch.no_grad()
def _recorded(
    chat: ChatModel, modules: Sequence[nn.Module], prompts: Sequence[Prompt | None]
) -> dict[nn.Module, Tensor]:
    """Outputs of each module in one pass over the prompts, [prompts, longest, out]."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _args: object, output: Tensor) -> None:
        # The shared expert of a mixture sees its tokens without rows.
        outputs[module] = output.view(*ids.shape, -1)

    # A pass needs a token in every row; that of a row without a source is never read.
    filler = chat.tokenizer.pad_token_id
    ids, mask = pad([prompt or (filler,) for prompt in prompts], filler, chat.device)
    with changing_shapes(chat.device), hook_handles() as handles:
        for module in modules:
            handles.callback(module.register_forward_hook(keep).remove)
        chat.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    return outputs


class _Spans:
    """Positions of each row that take from which of its source; both counts [rows, 1]."""

    def __init__(self, positions: TokenPositions, lengths: Tensor, starts: Tensor) -> None:
        self._positions = positions
        self._offsets, self._starts = starts - lengths, starts

    def replacing(self, recorded: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
        """A forward hook that puts in what a module gave in the sources, [rows, tokens, out]."""

        def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            index, real = (counts.to(output.device) for counts in self._positions.snapshot())
            offsets, starts = self._offsets.to(output.device), self._starts.to(output.device)
            taken = real & (index >= offsets) & (index < starts)
            taken_from = (index - offsets).clamp(0, recorded.shape[1] - 1).unsqueeze(-1)
            source = recorded.gather(1, taken_from.expand(-1, -1, recorded.shape[-1]))
            return torch.where(taken.unsqueeze(-1), source, output.view_as(source)).view_as(output)

        return hook
