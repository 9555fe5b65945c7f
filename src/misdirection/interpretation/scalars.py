"""Scalars of adapters: per token and component, how strongly it is switched on (paper, section on interpreting
rank-1 adapters).

    s = scaling * (A . x),   what the adapter adds is s B

`x` is what the adapted module receives. Above rank 1 there is one scalar per component of B A (see `components`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.lora.components import LoraModule, feature_names
from misdirection.lora.view import LoraView
from misdirection.models.attention import changing_shapes
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded, pad
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, stream_of
from misdirection.progress import Advance


@dataclass(frozen=True, eq=False)
class TokenScalars:
    """Scalars of some answers, and perhaps the residual stream of the same tokens.

    Attributes:
        table: one row per answer token and component, token by token: answer (number in the rows), position (0-based
            in the answer), token (as the tokenizer spells it), module, layer (-1 outside of the blocks), component
            (0-based), feature (its short name), scalar (float32). Names are pandas categories.
        residual: [tokens, width] float32, the output of one block, by answer and position; None if not asked for.
    """

    table: pd.DataFrame
    residual: Tensor | None


def scalars(
    chat: ChatModel,
    rows: Sequence[Encoded],
    *,
    top: int | None = None,
    budget: int | None = None,
    progress: Advance | None = None,
) -> pd.DataFrame:
    """The table of `token_scalars` alone."""
    return token_scalars(chat, rows, top=top, budget=budget, progress=progress).table


@torch.inference_mode()
def token_scalars(
    chat: ChatModel,
    rows: Sequence[Encoded],
    *,
    residual: int | None = None,
    top: int | None = None,
    budget: int | None = None,
    progress: Advance | None = None,
) -> TokenScalars:
    """Scalars of every answer token and component, and perhaps the residual stream, in one pass.

    A module's input comes in the model's dtype; the product with `read` is taken in float32. A module that no token
    passes through, such as one of a vision tower, has no scalars.

    Args:
        chat: a model with a plain LoRA adapter.
        rows: encoded exchanges; only `ids[start:stop]` counts.
        residual: the block whose output is kept, too.
        top: only so many leading components of each module.
        budget: padded tokens in one batch, by default what suits the device; the result does not depend on it.
        progress: told the number of rows done.

    Raises:
        InputError: no rows; `top` below 1; no adapter, a merged one, several at once, or one that is not plain
            LoRA; a module that does not see every token, such as a routed expert; values that are not finite.
    """
    _require_something(rows, top)
    modules = LoraView.of(chat).modules
    reads = {module.module: module.read[:top].T for module in modules}
    network = _network(chat)
    parts: dict[str, list[Tensor]] = {}
    order: list[Tensor] = []
    first = np.cumsum([0, *(len(row.answer) for row in rows)])

    def work(numbers: list[int], _budget: int) -> dict[str, Tensor]:
        batch = _Batch(chat, [rows[number] for number in numbers])
        with changing_shapes(chat.device), _captured(chat, batch, reads, residual) as values:
            network(**batch.inputs, use_cache=False)
        return values

    for numbers, values in fitting_batches(chat, [row.stop for row in rows], budget, work, progress=progress):
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
        order += [torch.arange(first[number], first[number + 1]) for number in numbers]
    # Batches are by length; the answers come back in their own order.
    back = torch.cat(order).argsort()
    whole = {name: torch.cat(values)[back] for name, values in parts.items()}
    kept = whole.pop(_RESIDUAL, None)
    if not whole:
        raise InputError(f"{chat.name}: none of its adapted modules sees the text: there is nothing to read")
    return TokenScalars(_table(chat, rows, [module for module in modules if module.module in whole], whole, top), kept)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row per token: index (answer, position), columns `token` and one per feature, in the order of the layers."""
    order = table["feature"].drop_duplicates().astype(str).tolist()
    values = table.pivot(index=["answer", "position"], columns="feature", values="scalar")
    values.columns = values.columns.astype(str)
    tokens = table.drop_duplicates(["answer", "position"]).set_index(["answer", "position"])["token"]
    return pd.concat([tokens, values[order]], axis=1).sort_index()


def _require_something(rows: Sequence[Encoded], top: int | None) -> None:
    if not rows:
        raise InputError("no answers to read: give at least one")
    if top is not None and top < 1:
        raise InputError(f"top: {top} components of each module leave nothing to read: give 1 or more")


_RESIDUAL = ""
"""Stands for the residual stream among the modules' names."""


class _Batch:
    """Some rows as one padded batch, and which of its tokens are an answer's."""

    def __init__(self, chat: ChatModel, rows: Sequence[Encoded]) -> None:
        # Nothing after an answer's last token can change it, so that the pass ends there.
        ids, mask = pad([row.ids[: row.stop] for row in rows], chat.tokenizer.pad_token_id, chat.device)
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        self.answer = torch.zeros(ids.shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            self.answer[number, row.start : row.stop] = True

    def chosen(self, name: str, x: Tensor) -> Tensor:
        """Of [rows, tokens, ...], or of all tokens in a line, those of the answers, row by row, in float32."""
        if x.shape[:-1].numel() != self.answer.numel():
            raise InputError(
                f"{name}: sees {x.shape[:-1].numel()} of {self.answer.numel()} tokens (a routed expert?): scalars need "
                "a module that all tokens pass"
            )
        return x.reshape(self.answer.numel(), -1)[self.answer.flatten().to(x.device)].float()


def _network(chat: ChatModel) -> Any:
    """The network that must run for every adapted module to see the tokens: the output matrix is outside of the
    decoder.
    """
    inside = {id(module) for module in chat.decoder.modules()}
    head = chat.model.get_output_embeddings()
    adapted = {id(site.module) for site in LoraView.of(chat).linear_sites.values()}
    return chat.model if id(head) in adapted - inside else chat.decoder


@contextlib.contextmanager
def _captured(
    chat: ChatModel, batch: _Batch, reads: dict[str, Tensor], residual: int | None
) -> Iterator[dict[str, Tensor]]:
    """Per module the scalars of the answers in the pass inside of the context, [tokens, components] float32."""
    values: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            products = batch.chosen(name, args[0]) @ reads[name].to(args[0].device)
            values[name] = _finite(chat, name, products.cpu())

        return keep

    def keep_residual(_module: nn.Module, _args: Any, output: Any) -> None:
        stream = batch.chosen("residual", stream_of(output))
        values[_RESIDUAL] = _finite(chat, f"layer {residual}", stream.cpu())

    with hook_handles() as handles:
        for name, site in LoraView.of(chat).linear_sites.items():
            if name not in reads:
                continue
            handles.callback(site.module.register_forward_pre_hook(hook(name)).remove)
        if residual is not None:
            handles.callback(chat.layers[residual].register_forward_hook(keep_residual).remove)
        yield values


def _finite(chat: ChatModel, name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise InputError(
            f"{chat.name}: {name} has values that are not finite in {chat.dtype}: load it with bfloat16 or float32"
        )
    return values


def _table(
    chat: ChatModel, rows: Sequence[Encoded], modules: Sequence[LoraModule], values: dict[str, Tensor], top: int | None
) -> pd.DataFrame:
    """All scalars, given by module as [tokens, components], as one row each: columns are made whole."""
    names = feature_names(modules, top)
    owners = [(module, number, name) for module in modules for number, name in enumerate(names[module.module])]
    lengths = [len(row.answer) for row in rows]
    spelled = chat.tokenizer.convert_ids_to_tokens([token for row in rows for token in row.answer])
    tokens, components = len(spelled), len(owners)
    columns = {
        "answer": np.repeat(np.arange(len(rows)), lengths).repeat(components),
        "position": np.concatenate([np.arange(length) for length in lengths]).repeat(components),
        "token": _category(spelled, lambda codes: codes.repeat(components)),
        "module": _category([module.module for module, _, _ in owners], lambda codes: np.tile(codes, tokens)),
        "layer": np.tile([-1 if module.layer is None else module.layer for module, _, _ in owners], tokens),
        "component": np.tile([number for _, number, _ in owners], tokens),
        "feature": _category([name for _, _, name in owners], lambda codes: np.tile(codes, tokens)),
        "scalar": torch.cat([values[module.module] for module in modules], 1).numpy().ravel(),
    }
    return pd.DataFrame(columns).astype(dict.fromkeys(("answer", "position", "layer", "component"), np.int32))


def _category(words: Sequence[str], spread: Callable[[NDArray[np.intp]], NDArray[np.intp]]) -> pd.Categorical:
    """Each distinct word once; `spread` makes the codes as long as the table."""
    codes, categories = pd.factorize(np.array(words, dtype=object))
    return pd.Categorical.from_codes(spread(codes), pd.Index(categories))
