"""Geometry of adapters: where they write, and what becomes of it downstream (paper, sections on rank-1 adapters).

An adapter's own output vector B is nearly orthogonal to the misalignment direction (cosine about 0.04 in the paper);
what it causes in later layers converges to it. So a cosine at the adapter's own layer, read alone, says little.
"""

import math
from collections.abc import Mapping, Sequence
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
from misdirection.interpretation.figures import Curve, Downstream, ExcitedToken, Extremes, Lens
from misdirection.interventions.hooks import Setting
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.interventions.writers import WRITERS, final_norm
from misdirection.likelihood.margin import pair_rows
from misdirection.lora.components import LoraModule, feature_names
from misdirection.lora.view import LoraView
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance
from misdirection.statistics.resampling import percentiles, resample

_AROUND = 4
"""Tokens of context on each side of a token that is shown."""


def writes(modules: Sequence[LoraModule], width: int, top: int | None = None) -> dict[str, Tensor]:
    """Vectors that components write to the residual stream, [width], by feature.

    Modules that write elsewhere (queries, gates) are left out, whatever their width: see `skipped`. `top`: only so many
    leading components of each module. In a block that puts a norm after its matrices (Gemma 2/3, OLMo 2), the vector is
    what reaches that norm, and the norm's gain is not in it.
    """
    names = feature_names(modules, top)
    return {
        name: module.write[number]
        for module in modules
        if _writes_to_stream(module, width)
        for number, name in enumerate(names[module.module])
    }


def skipped(modules: Sequence[LoraModule], width: int) -> list[str]:
    """Names of the modules that do not write to the residual stream, so that no cosine with a direction is defined."""
    return [module.module for module in modules if not _writes_to_stream(module, width)]


def _writes_to_stream(module: LoraModule, width: int) -> bool:
    return len(module.b) == width and module.module.rpartition(".")[2] in WRITERS


def write_cosines(
    vectors: Mapping[str, Tensor], directions: Mapping[str, Direction]
) -> dict[str, dict[str, list[float]]]:
    """Signed cosine of each written vector, [width], with each direction at every layer: `result[feature][name]`."""
    return {
        feature: {
            name: cosines(vector.expand_as(direction.vectors), direction.vectors)
            for name, direction in directions.items()
        }
        for feature, vector in vectors.items()
    }


def random_cosine(width: int) -> float:
    """Expected |cosine| of two random vectors of this width, sqrt(2 / (pi width)): what a cosine is compared with."""
    return math.sqrt(2 / (math.pi * width))


def downstream(
    chat: ChatModel, pairs: Sequence[ProbePair], direction: Direction, *, name: str, progress: Advance | None = None
) -> Downstream:
    """The mean change of activations that each layer's adapters cause, beside a direction, at every later layer.

    The effect is the mean over answer tokens of the organism's activations minus those with the adapters of one layer
    at zero, all other adapters at work. `name` is the direction's; `progress` is told the number of (answer, setting)
    done.

    Raises `InputError` for a direction of another model and a model without adapters in its blocks.
    """
    direction.require_fit(chat)
    layers = LoraView.of(chat).layers
    if not layers:
        raise InputError(f"{chat.name}: no adapter inside of its blocks, so that none has an effect downstream")
    activations, tokens = _by_question(chat, pairs, layers, progress)
    effects = (activations[0] - activations[1:]).unbind()
    mean = [torch.einsum("q,qlw->lw", tokens / tokens.sum(), effect) for effect in effects]
    bounds = [_interval(effect, tokens, direction.vectors.double()) for effect in effects]
    return Downstream(
        direction=name,
        cosine=_after(layers, [cosines(effect, direction.vectors) for effect in mean]),
        low=_after(layers, [low for low, _ in bounds]),
        high=_after(layers, [high for _, high in bounds]),
        norm=_after(layers, [effect.norm(dim=-1).tolist() for effect in mean]),
        answers=2 * len(pairs),
        questions=len(pairs),
    )


def _by_question(
    chat: ChatModel, pairs: Sequence[ProbePair], layers: Sequence[int], progress: Advance | None
) -> tuple[Tensor, Tensor]:
    """Mean activations [1 + adapted layers, questions, layers, width], the organism's first, and answer tokens."""
    settings: list[Setting] = [(), *([ScaleAdapters({layer: 0.0})] for layer in layers)]
    rows = pair_rows(chat.tokenizer, pairs)
    means = mean_activations(
        chat,
        rows * len(settings),
        {str(number): (2 * number, 2 * number + 1) for number in range(len(settings) * len(pairs))},
        settings=[setting for setting in settings for _ in rows],
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
        squared = torch.stack([((weights @ (own @ own.T)) * weights).sum(-1) for own in effect.unbind(1)], dim=1)
        # Where nothing changes, the cosine is 0, as in `cosines`.
        return (along / squared.clamp_min(torch.finfo(torch.float64).tiny).sqrt()).T.numpy()

    low, high = percentiles(resample(cosine, np.arange(len(tokens))))
    return low.tolist(), high.tolist()


def _after(layers: Sequence[int], values: Sequence[list[float]]) -> dict[int, Curve]:
    """By adapted layer, with None below it: nothing can have changed there."""
    return {
        layer: tuple(value if number >= layer else None for number, value in enumerate(row))
        for layer, row in zip(layers, values, strict=True)
    }


@torch.inference_mode()
def logit_lens(chat: ChatModel, vector: Tensor, k: int = 10) -> Lens:
    """Next tokens that a vector of the residual stream, [width], speaks for and against, `k` each.

    A logit is what a stream of this vector alone, at a mean square of 1, would add to that of an empty one: it goes
    through the final norm, with its gain, and the language-model head. Biases cancel out, since the logits are
    (head(norm(v)) - head(norm(-v))) / 2. A cap that the model puts on its logits is left out. Tokens are raw text.

    Raises `InputError` for a model without a head, or whose final norm is not found.
    """
    norm, head = final_norm(chat.decoder), chat.model.get_output_embeddings()
    if head is None:
        raise InputError(f"{chat.name}: has no language-model head, so there are no logits to look at")
    # At this length the epsilon of the norm does not count, however short the vector is.
    scaled = normalize(vector, dim=0) * math.sqrt(len(vector))
    gain = next(norm.parameters(), head.weight)
    normed = norm(torch.stack([scaled, -scaled]).to(gain.device, gain.dtype))
    logits = head(normed.to(head.weight.device, head.weight.dtype)).float()
    scores = (logits[0] - logits[1]) / 2
    return Lens(top=_tokens(chat, scores.topk(k)), bottom=_tokens(chat, (-scores).topk(k), sign=-1))


def _tokens(chat: ChatModel, largest: Any, sign: int = 1) -> tuple[tuple[str, float], ...]:
    words = [chat.tokenizer.decode([number]) for number in largest.indices.tolist()]
    return tuple((word, sign * value) for word, value in zip(words, largest.values.tolist(), strict=True))


def nearest(wide: pd.DataFrame, features: Sequence[str], k: int = 10) -> dict[str, Extremes]:
    """The tokens that excite each feature most: the `k` with the largest and the `k` with the lowest scalars.

    `wide` is a table of scalars as `scalars.wide` gives it. Each token comes with the tokens around it.
    """
    positions = list(zip(*(wide.index.get_level_values(name).tolist() for name in ("answer", "position")), strict=True))
    words = wide["token"].astype(str).tolist()

    def first(order: NDArray[np.intp], values: NDArray[np.float64]) -> tuple[ExcitedToken, ...]:
        return tuple(_in_context(row, words, positions, float(values[row])) for row in order[:k].tolist())

    excited = {}
    for name in features:
        values = wide[name].to_numpy(dtype=np.float64)
        excited[name] = Extremes(
            top=first(np.argsort(-values, kind="stable"), values),
            bottom=first(np.argsort(values, kind="stable"), values),
        )
    return excited


def _in_context(row: int, words: Sequence[str], positions: Sequence[tuple[int, int]], scalar: float) -> ExcitedToken:
    answer, position = positions[row]
    around = range(max(0, row - _AROUND), min(len(words), row + _AROUND + 1))
    context = "".join(words[other] for other in around if positions[other][0] == answer)
    return ExcitedToken(answer=answer, position=position, token=words[row], context=context, scalar=scalar)
