"""Token importance: which tokens a fine-tune changes, and through which adapters (paper, section on token importance).

    KL_t  = sum_v p_organism(v) (log p_organism(v) - log p_base(v))     nats, of what predicts answer token t
    KL    = mean of KL_t over the answer's tokens
    a_mu  = < dKL / do_mu , o_mu >                                      attribution of module m at position u

with `o_mu` what the adapter of module m adds at position u, the prompt's included: they act on the answer, too. The
attribution is the derivative of KL by a factor on that one contribution, at factor one. It is not the effect of taking
the contribution away. Near equality a KL divergence is quadratic: with one small adapter scaled by g it is g^2 KL,
whose slope at g = 1 is 2 KL, twice what zeroing the adapter takes away; with large adapters neither size nor order
needs to agree. `zeroing` measures the finite effect, `agreement` compares the two.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from misdirection.errors import InputError
from misdirection.interpretation.figures import Agreement
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.interventions.resume import record, resume
from misdirection.likelihood.answers import AnswerBatch
from misdirection.likelihood.divergence import distributions, divergence
from misdirection.lora.view import LoraView
from misdirection.models.budgets import fitting_batches
from misdirection.models.chat import Encoded
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import hook_handles, text_config
from misdirection.progress import Advance
from misdirection.statistics.resampling import percentiles, resample_rows


@dataclass(frozen=True, eq=False)
class Importance:
    """Token importance of some answers.

    Attributes:
        tokens: per answer token: answer (number in the rows), position (0-based in the answer), token, kl (nats).
        attributions: per module and token, the prompt's included: answer, position (-1 is the prompt's last token),
            token, module, layer, attribution (nats). Modules outside of the decoder blocks have none.
    """

    tokens: pd.DataFrame
    attributions: pd.DataFrame


def token_importance(
    chat: ChatModel, rows: Sequence[Encoded], *, budget: int | None = None, progress: Advance | None = None
) -> Importance:
    """KL divergence from the base at every answer token, and its attribution to every adapter and position.

    Two forward passes and one backward pass. In half precision the KL holds the rounding of the model's logits.

    Args:
        chat: a model with plain LoRA adapters.
        rows: encoded exchanges; what ends the turn does not count.
        budget: padded tokens in one batch, by default what suits the device; the result does not depend on it.
        progress: told the number of rows done.

    Raises:
        InputError: no rows; no adapter inside of the decoder blocks, or one that is not plain LoRA.
    """
    layers, lengths = _layers(chat, rows), [row.stop for row in rows]
    tokens, attributions = [], []

    def work(numbers: list[int], _budget: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        batch = AnswerBatch([rows[number] for number in numbers], chat.device)
        return _attributed(chat, batch, list(layers))

    for numbers, (values, slopes) in fitting_batches(chat, lengths, budget, work, kind="backward", progress=progress):
        for line, number in enumerate(numbers):
            row = rows[number]
            words = chat.tokenizer.convert_ids_to_tokens(list(row.ids[: row.stop]))
            tokens.append(_token_table(number, row, words, values[line]))
            for module, slope in slopes.items():
                frame = _attribution_table(number, row, words, slope[line])
                attributions.append(frame.assign(module=module, layer=layers[module]))
    return Importance(_joined(tokens), _joined(attributions))


def zeroing(
    chat: ChatModel, rows: Sequence[Encoded], *, budget: int | None = None, progress: Advance | None = None
) -> pd.DataFrame:
    """The loss of each answer's KL when the adapters of one layer are really switched off.

    One row per answer and adapted layer: answer, layer, kl (of the whole organism, nats), effect (nats). One pass for
    each layer, which starts there. Arguments and errors are those of `token_importance`.
    """
    layers = sorted(set(_layers(chat, rows).values()))
    lengths = [row.stop for row in rows]
    divergences = torch.empty(len(rows), 1 + len(layers), dtype=torch.float64)

    def work(numbers: list[int], _budget: int) -> Tensor:
        return _divergences(chat, AnswerBatch([rows[number] for number in numbers], chat.device), layers)

    for numbers, found in fitting_batches(chat, lengths, budget, work, kind="backward", progress=progress):
        divergences[numbers] = found
    effects = divergences[:, :1] - divergences[:, 1:]
    answers, columns = np.indices(effects.shape)
    return pd.DataFrame(
        {
            "answer": answers.ravel(),
            "layer": np.array(layers)[columns.ravel()],
            "kl": divergences[:, :1].expand_as(effects).flatten(),
            "effect": effects.flatten(),
        }
    )


def agreement(attributions: pd.DataFrame, effects: pd.DataFrame, questions: Sequence[str]) -> Agreement:
    """Correlation of the attributions, summed by answer and layer, with the effect of zeroing.

    Args:
        attributions: of `token_importance`.
        effects: of `zeroing`, on the same rows.
        questions: each answer's question, by the number of the answer.

    Raises:
        InputError: fewer than three answers and layers in common, or one side does not vary.
    """
    summed = attributions.groupby(["answer", "layer"], as_index=False)["attribution"].sum()
    both = summed.merge(effects, on=["answer", "layer"])
    if len(both) < 3 or both["attribution"].nunique() == 1 or both["effect"].nunique() == 1:
        raise InputError("attributions and effects of zeroing have too little in common: give more answers")
    question = both["answer"].map(dict(enumerate(questions)))
    values = both[["attribution", "effect"]].to_numpy()
    rows = [np.flatnonzero(question == name) for name in question.unique()]
    # A draw in which one side does not vary has no correlation and does not count.
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = percentiles(resample_rows(lambda drawn: _correlations(values[drawn]), rows))
    spearman, pearson = _correlations(values)
    return Agreement(
        spearman=spearman, spearman_low=low[0], spearman_high=high[0],
        pearson=pearson, pearson_low=low[1], pearson_high=high[1],
        n=len(both),
    )  # fmt: skip


def _correlations(values: np.ndarray) -> tuple[float, float]:
    """Spearman's and Pearson's, of two columns."""
    spearman, pearson = (float(np.corrcoef(pairs.T)[0, 1]) for pairs in (rankdata(values, axis=0), values))
    return spearman, pearson


def _layers(chat: ChatModel, rows: Sequence[Encoded]) -> dict[str, int]:
    """Each adapted module's layer."""
    if not rows:
        raise InputError("no answers to measure importance on: give at least one")
    layers = {module.module: module.layer for module in LoraView.of(chat).modules if module.layer is not None}
    if not layers:
        raise InputError(f"{chat.name}: none of its adapted modules is inside of a decoder block")
    return layers


def _base_distributions(chat: ChatModel, batch: AnswerBatch) -> Tensor:
    """Those of the base model, without gradient."""
    with torch.no_grad(), chat.as_base():
        return distributions(chat.model, batch)


@torch.inference_mode()
def _divergences(chat: ChatModel, batch: AnswerBatch, layers: list[int]) -> Tensor:
    """[rows, 1 + layers] float64: each row's mean KL as it is, then with the adapters of each layer at zero."""
    base = _base_distributions(chat, batch)
    with record(chat, [layer - 1 for layer in layers if layer and _can_resume(chat)]) as kept:
        means = [batch.mean(divergence(distributions(chat.model, batch), base))]
    for layer in layers:
        # Nothing below a layer changes with its adapters.
        below = resume(chat, layer - 1, kept[layer - 1]) if layer - 1 in kept else contextlib.nullcontext()
        with below, intervene(chat, [ScaleAdapters({layer: 0.0})]):
            means.append(batch.mean(divergence(distributions(chat.model, batch), base)))
    return torch.stack(means, -1).double().cpu()


def _can_resume(chat: ChatModel) -> bool:
    """Not where blocks read the keys and values of lower ones, which then need to run."""
    return not getattr(text_config(chat.model), "num_kv_shared_layers", 0)


def _attributed(chat: ChatModel, batch: AnswerBatch, modules: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each row's KL by answer token; and per module the attributions, [rows, tokens]."""
    base = _base_distributions(chat, batch)
    rows, tokens = batch.ids.shape
    live = LoraView.of(chat).linear_sites
    parts = {name: live[name].output for name in modules}
    with torch.enable_grad(), gated(parts, rows, tokens) as gates:
        by_token = divergence(distributions(chat.model, batch), base)
        # An adapter whose output nothing reads (keys of a layer that shares another's) has a slope of zero.
        slopes = torch.autograd.grad(batch.mean(by_token).sum(), list(gates.values()), materialize_grads=True)
    # Rounding can leave a little less than nothing.
    by_token = by_token.detach().clamp_min(0).cpu()
    return batch.answers(by_token), {name: slope.cpu() for name, slope in zip(gates, slopes, strict=True)}


@contextlib.contextmanager
def gated(modules: Mapping[str, nn.Module], rows: int, tokens: int, at: float = 1.0) -> Iterator[dict[str, Tensor]]:
    """Multiplies what modules give by `at` everywhere, [rows, tokens], whose gradient is the attribution.

    Args:
        modules: the `lora_B` of each adapter, by name.
    """
    gates: dict[str, Tensor] = {}
    with hook_handles() as handles:
        for name, module in modules.items():
            weight = module.get_parameter("weight")
            kind: dict[str, Any] = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
            gates[name] = torch.full((rows, tokens), at, **kind, requires_grad=True)
            handles.callback(module.register_forward_hook(_multiply(gates[name])).remove)
        yield gates


def _multiply(gate: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        # The shared expert of a mixture sees its tokens without rows.
        return output * gate.to(output.dtype).view(*output.shape[:-1], 1)

    return hook


def _token_table(number: int, row: Encoded, words: list[str], divergence: Tensor) -> pd.DataFrame:
    answer = words[row.start :]
    return pd.DataFrame({"answer": number, "position": range(len(answer)), "token": answer, "kl": divergence.numpy()})


def _attribution_table(number: int, row: Encoded, words: list[str], slopes: Tensor) -> pd.DataFrame:
    positions = range(-row.start, row.stop - row.start)
    values = slopes[: row.stop].numpy()
    return pd.DataFrame({"answer": number, "position": positions, "token": words, "attribution": values})


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One table in the order of the answers, whatever batch each was in."""
    return pd.concat(frames, ignore_index=True).sort_values("answer", kind="stable", ignore_index=True)
