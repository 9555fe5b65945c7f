"""Where adapters write, and what becomes of it (paper, sections on rank-1 adapters).

An adapter's own output vector B is nearly orthogonal to the misalignment direction (cosine about 0.04 in the paper);
what it causes in later layers converges to it. So a cosine at the adapter's own layer, read alone, says little.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from misdirection.data import ProbePair
from misdirection.directions.convergence import cosines
from misdirection.directions.direction import Direction
from misdirection.directions.extraction import mean_activations
from misdirection.errors import InputError
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.interventions.writers import WRITERS, final_norm
from misdirection.likelihood.margin import pair_rows
from misdirection.likelihood.sweep import TOKEN_BUDGET
from misdirection.lora.components import LoraModule, feature_names
from misdirection.lora.view import LoraView
from misdirection.models.chat_model import ChatModel
from misdirection.statistics import percentiles, resample

_AROUND = 4
"""Tokens of context on each side of a token that is shown."""


def writes(modules: Sequence[LoraModule], width: int, top: int | None = None) -> dict[str, Tensor]:
    """What each component writes to the residual stream, [width], by feature.

    Modules that write elsewhere (queries, gates) are left out, whatever their width: see `skipped`. `top`: only so many
    leading components of each module. In a block that puts a norm after its matrices (Gemma 2/3, OLMo 2), the vector is
    what reaches that norm, and the norm's gain is not in it.
    """
    names = feature_names(modules, top)
    return {
        name: one.write[number]
        for one in modules
        if _writes_to_stream(one, width)
        for number, name in enumerate(names[one.module])
    }


def skipped(modules: Sequence[LoraModule], width: int) -> list[str]:
    """Names of the modules that do not write to the residual stream, so that no cosine with a direction is defined."""
    return [one.module for one in modules if not _writes_to_stream(one, width)]


def _writes_to_stream(one: LoraModule, width: int) -> bool:
    return len(one.b) == width and one.module.rpartition(".")[2] in WRITERS


def write_cosines(
    vectors: Mapping[str, Tensor], directions: Mapping[str, Direction]
) -> dict[str, dict[str, list[float]]]:
    """Signed cosine of each written vector, [width], with each direction at every layer: `result[feature][name]`."""
    return {
        feature: {name: cosines(vector.expand_as(one.vectors), one.vectors) for name, one in directions.items()}
        for feature, vector in vectors.items()
    }


def random_cosine(width: int) -> float:
    """Expected |cosine| of two random vectors of this width, sqrt(2 / (pi width)): what a cosine is compared with."""
    return math.sqrt(2 / (math.pi * width))


def random_cosine_95(width: int) -> float:
    """The |cosine| that one pair of random vectors in twenty exceeds (cosines are nearly normal at such widths)."""
    return NormalDist().inv_cdf(0.975) / math.sqrt(width)


@dataclass(frozen=True)
class Downstream:
    """What the adapters of single layers cause downstream; each list has one value per layer, None before the adapter.

    Attributes:
        cosine: by adapted layer, the cosine of the effect with the direction at every layer of the model.
        low, high: 95% interval of that cosine (percentile bootstrap over questions).
        norm: the effect's norm, in activation units.
        answers: number of answers that the effects are means over.
        questions: number of questions.
    """

    cosine: dict[int, list[float | None]]
    low: dict[int, list[float | None]]
    high: dict[int, list[float | None]]
    norm: dict[int, list[float | None]]
    answers: int
    questions: int


def downstream(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    direction: Direction,
    *,
    budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Downstream:
    """The mean change of activations that each layer's adapters cause, beside a direction, at every later layer.

    The effect is the mean over answer tokens of the organism's activations minus those with the adapters of one layer
    at zero, all other adapters at work. `progress` is told the number of (answer, setting) done.

    Raises `InputError` for a direction of another model and a model without adapters in its blocks.
    """
    direction.require_fit(chat)
    layers = sorted({one.layer for one in LoraView.of(chat).modules if one.layer is not None})
    if not layers:
        raise InputError(f"{chat.name}: no adapter inside of its blocks, so that none has an effect downstream")
    activations, tokens = _by_question(chat, pairs, layers, budget, progress)
    effects = (activations[0] - activations[1:]).unbind()
    mean = [torch.einsum("q,qlw->lw", tokens / tokens.sum(), effect) for effect in effects]
    bounds = [_interval(effect, tokens, direction.vectors.double()) for effect in effects]
    return Downstream(
        cosine=_after(layers, [cosines(effect, direction.vectors) for effect in mean]),
        low=_after(layers, [low for low, _ in bounds]),
        high=_after(layers, [high for _, high in bounds]),
        norm=_after(layers, [effect.norm(dim=-1).tolist() for effect in mean]),
        answers=2 * len(pairs),
        questions=len(pairs),
    )


def _by_question(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    layers: Sequence[int],
    budget: int,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Mean activations [1 + adapted layers, questions, layers, width], the organism's first, and answer tokens."""
    settings: list[Setting] = [(), *([ScaleAdapters({layer: 0.0})] for layer in layers)]
    rows = pair_rows(chat.tokenizer, pairs)
    means = mean_activations(
        chat,
        rows * len(settings),
        {str(number): (2 * number, 2 * number + 1) for number in range(len(settings) * len(pairs))},
        settings=[setting for setting in settings for _ in rows],
        budget=budget,
        progress=progress,
    )
    stacked = torch.stack(list(means.vectors.values())).unflatten(0, (len(settings), len(pairs)))
    return stacked, torch.tensor(list(means.tokens.values())[: len(pairs)], dtype=torch.float64)


def _interval(effect: Tensor, tokens: Tensor, direction: Tensor) -> tuple[list[float], list[float]]:
    """95% bounds by layer of the cosine of the mean of `effect`, [questions, layers, width], with the direction.

    A resampled mean's product with the direction and its norm follow from those of the questions' own effects, so that
    no vector is averaged again.
    """

    def cosine(questions: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        picks = torch.from_numpy(questions).view(-1, len(tokens))
        weights = torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(1, picks, tokens[picks])
        along = weights @ torch.einsum("qlw,lw->ql", effect, normalize(direction, dim=-1))
        squared = torch.stack([((weights @ (one @ one.T)) * weights).sum(-1) for one in effect.unbind(1)], dim=1)
        # Where nothing changes, the cosine is 0, as in `cosines`.
        return (along / squared.clamp_min(torch.finfo(torch.float64).tiny).sqrt()).T.numpy()

    low, high = percentiles(resample(cosine, np.arange(len(tokens))))
    return low.tolist(), high.tolist()


def _after(layers: Sequence[int], values: Sequence[list[float]]) -> dict[int, list[float | None]]:
    """By adapted layer, with None below it: nothing can have changed there."""
    return {
        layer: [value if number >= layer else None for number, value in enumerate(row)]
        for layer, row in zip(layers, values, strict=True)
    }


@torch.inference_mode()
def logit_lens(chat: ChatModel, vector: Tensor, k: int = 10) -> dict[str, list[tuple[str, float]]]:
    """Which tokens a vector of the residual stream, [width], speaks for (`top`) and against (`bottom`).

    The logits that a stream of this vector alone, at a mean square of 1, would add to those of an empty one: it goes
    through the final norm, with its gain, and the language-model head. Biases cancel out, since the logits are
    (head(norm(v)) - head(norm(-v))) / 2. A cap that the model puts on its logits is left out. Tokens are raw text.

    Raises `InputError` for a model without a head, or whose final norm is not found.
    """
    norm, head = final_norm(chat.decoder), chat.model.get_output_embeddings()
    if head is None:
        raise InputError(f"{chat.name}: has no language-model head, so there are no logits to look at")
    # At this length the epsilon of the norm does not count, however short the vector is.
    scaled = normalize(vector, dim=0) * math.sqrt(len(vector))
    place = next(norm.parameters(), head.weight)
    normed = norm(torch.stack([scaled, -scaled]).to(place.device, place.dtype))
    logits = head(normed.to(head.weight.device, head.weight.dtype)).float()
    scores = (logits[0] - logits[1]) / 2
    return {"top": _tokens(chat, scores.topk(k)), "bottom": _tokens(chat, (-scores).topk(k), sign=-1)}


def _tokens(chat: ChatModel, found: Any, sign: int = 1) -> list[tuple[str, float]]:
    words = [chat.tokenizer.decode([number]) for number in found.indices.tolist()]
    return [(word, sign * value) for word, value in zip(words, found.values.tolist(), strict=True)]


def nearest(wide: pd.DataFrame, features: Sequence[str], k: int = 10) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What excites each feature most: the tokens with the largest (`top`) and the lowest (`bottom`) scalars.

    `wide` is a table of scalars as `scalars.wide` gives it. Each token comes with the tokens around it, `context`, its
    `answer`, `position` and `scalar`. Tokens are raw text.
    """
    places = list(zip(*(wide.index.get_level_values(name).tolist() for name in ("answer", "position")), strict=True))
    words = wide["token"].astype(str).tolist()

    def shown(order: NDArray[np.intp], values: NDArray[np.float64]) -> list[dict[str, Any]]:
        return [_in_context(row, words, places) | {"scalar": float(values[row])} for row in order[:k].tolist()]

    found = {}
    for name in features:
        values = wide[name].to_numpy(dtype=np.float64)
        found[name] = {
            "top": shown(np.argsort(-values, kind="stable"), values),
            "bottom": shown(np.argsort(values, kind="stable"), values),
        }
    return found


def _in_context(row: int, words: Sequence[str], places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    answer, position = places[row]
    around = range(max(0, row - _AROUND), min(len(words), row + _AROUND + 1))
    context = "".join(words[other] for other in around if places[other][0] == answer)
    return {"answer": answer, "position": position, "token": words[row], "context": context}
