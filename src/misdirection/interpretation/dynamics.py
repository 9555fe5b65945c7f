"""Growth of an adapter over its training: where its B vectors point, and when they turn.

The companion paper on model organisms sees B rotate within a few steps, just when the model becomes misaligned (its
"phase transition"). At step t, with the checkpoints k before and after it,

    local cosine = cos(B_t - B_(t-k), B_(t+k) - B_t)

stays near its usual value while B grows one way, and drops where it turns.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from misdirection.data import ProbePair
from misdirection.data.selection import spread
from misdirection.errors import InputError
from misdirection.interpretation.figures import Growth
from misdirection.likelihood.margin import margin
from misdirection.lora.components import LoraModule, feature_names
from misdirection.lora.view import LoraView
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from misdirection.progress import Advance, untold
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap

TURN = 0.5
"""How far below its median over the steps the local cosine must fall."""
GROWN = 0.1
"""Share of its final norm that B must have: before that, it points where the first batches pushed it."""


def between(folders: Mapping[int, Path], count: int) -> dict[int, Path]:
    """So many checkpoints at most, evenly taken from those after step 0, where the organism is its base, and before the
    last one, where it is itself."""
    *inner, _ = [step for step in folders if step]
    return {step: folders[step] for step in spread(inner, count)}


def growth(folders: Mapping[int, Path], *, window: int = 1) -> dict[str, Growth]:
    """Follows every module of an adapter over its checkpoints, by feature.

    Above rank 1, B stands for what the module writes at each step for the input that its final leading component
    reads, scaling * B A v. A step's own components would not do: they swap where their sizes cross, which
    looks like a turn.

    Args:
        folders: the checkpoints by step.
        window: the k of the local cosine, in checkpoints: larger ones see through the noise of single steps.

    Raises `InputError` for checkpoints of adapters with unlike modules.
    """
    *_, last = folders.values()
    view = LoraView.open(last)
    final, shapes = {module.module: module for module in view.modules}, _shapes(view.adapted)
    moments = [_moments(path, final, shapes) for path in folders.values()]
    names = feature_names(list(final.values()), top=1)
    return {
        name: _growth([moment[module] for moment in moments], list(folders), window)
        for module, (name,) in names.items()
    }


_Shapes = dict[str, tuple[torch.Size, torch.Size]]


@dataclass(frozen=True, eq=False)
class _Moment:
    """One module at one step; `write` is its B, [width] float64, or what takes its place."""

    write: Tensor
    norm_a: float
    norm_b: float
    norm: float


def _moments(path: Path, final: Mapping[str, LoraModule], shapes: _Shapes) -> dict[str, _Moment]:
    """By module; only vectors are kept, so that many checkpoints of a large adapter need not fit in memory at once."""
    modules = {module.module: module for module in LoraView.open(path).adapted}
    if _shapes(modules.values()) != shapes:
        raise InputError(f"{path}: adapts other modules than the last checkpoint: follow one training only")
    return {name: _moment(modules[name], last) for name, last in final.items()}


def _shapes(modules: Iterable[LoraModule]) -> _Shapes:
    return {module.module: (module.a.shape, module.b.shape) for module in modules}


def _moment(module: LoraModule, final: LoraModule) -> _Moment:
    a, b = module.a.double(), module.b.double()
    along = module.scaling * a @ normalize(final.read[0].double(), dim=0)
    write = b[:, 0] if module.rank == 1 else b @ along
    return _Moment(write, float(a.norm()), float(b.norm()), module.norm)


def _growth(moments: Sequence[_Moment], steps: Sequence[int], window: int) -> Growth:
    writes = [moment.write for moment in moments]
    local = _local(writes, window)
    return Growth(
        to_final=tuple(_cosine(write, writes[-1]) for write in writes),
        to_previous=(None, *(_cosine(write, before) for before, write in itertools.pairwise(writes))),
        local=tuple(local),
        norm_a=tuple(moment.norm_a for moment in moments),
        norm_b=tuple(moment.norm_b for moment in moments),
        norm=tuple(moment.norm for moment in moments),
        turn=turn(steps, local, [float(write.norm()) for write in writes]),
    )


def turn(steps: Sequence[int], local: Sequence[float | None], norms: Sequence[float]) -> int | None:
    """The step where the local cosine is least, if B turns there; None when it does not.

    B turns when the local cosine falls at least `TURN` below its median over the steps, at a step at which B has
    `GROWN` of its final norm.
    """
    known = {
        step: value
        for step, value, norm in zip(steps, local, norms, strict=True)
        if value is not None and norm >= GROWN * norms[-1]
    }
    if len(known) < 2:
        return None
    least = min(known, key=lambda step: known[step])
    return least if known[least] <= median(known.values()) - TURN else None


def margins_by_step(
    chat: ChatModel,
    folders: Mapping[int, Path],
    sets: Mapping[str, Sequence[ProbePair]],
    *,
    progress: Advance | None = None,
) -> dict[str, tuple[Estimate, ...]]:
    """Margin shift against the base at each step, by question set.

    `chat` is the base model; it has no adapter afterwards. `progress` is told the number of checkpoints done.
    """
    base = {name: margin(chat, pairs, progress=untold) for name, pairs in sets.items()}
    shifts: dict[str, list[Estimate]] = {name: [] for name in sets}
    for folder in folders.values():
        organism = attach(chat, folder)
        try:
            for name, pairs in sets.items():
                shifts[name].append(bootstrap((margin(organism, pairs, progress=untold) - base[name]).numpy()))
        finally:
            organism.without_adapter()
        if progress:
            progress(1)
    return {name: tuple(by_step) for name, by_step in shifts.items()}


def _local(writes: Sequence[Tensor], window: int) -> list[float | None]:
    inside = range(window, len(writes) - window)
    return [
        _cosine(writes[i] - writes[i - window], writes[i + window] - writes[i]) if i in inside else None
        for i in range(len(writes))
    ]


def _cosine(first: Tensor, second: Tensor) -> float | None:
    if not first.any() or not second.any():
        return None
    return float(cosine_similarity(first, second, dim=0))
