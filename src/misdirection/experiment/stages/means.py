"""Stage `means`: activations averaged over answers, for every model on the text of its domain and on one for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.data import ProbePair, data_hash
from misdirection.directions.convergence import (
    compare_tensors,
    cosines,
    null_groups,
    project_away,
    shuffled,
    split_half,
)
from misdirection.directions.direction import Direction, direction, pair_means
from misdirection.directions.extraction import Means
from misdirection.experiment.experiment import Stage
from misdirection.experiment.results import BaseFigures, Convergence, MeansSection, ModelDifference
from misdirection.files import read_json, write_json
from misdirection.progress import track
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker

_DIRECTION = "direction.safetensors"

_NOTHING = Convergence(
    cosine={},
    base_null={},
    base_pair_null={},
    control_null={},
    shuffled_null={},
    split_half={},
    model_difference=ModelDifference(cosine={}, control_removed={}, control_null={}, split_half={}),
)
"""Where no domain has pairs there are no directions."""


class MeansStage(Stage):
    """Means over the misaligned and the aligned answers, with the groups of the convergence's references.

    The misaligned minus aligned direction is saved beside them.
    """

    name = "means"
    VERSION = 1
    after = ("organism",)

    @cached_property
    def direction(self) -> Callable[[str], Direction]:
        """Gives an organism's direction on its own domain's text."""
        return cache(lambda organism: read_direction(self.artifact(f"{organism}/{self._own_text(organism)}")))

    def tasks(self) -> list[Task]:
        texts = self.experiment.texts
        if not texts.common_pairs:
            return []
        wanted = {(model, self._common_text): texts.common_pairs for model in self.experiment.models}
        for organism in self.experiment.config.organisms:
            pairs = texts.direction_pairs(organism) or texts.common_pairs
            wanted |= {(model, self._own_text(organism)): pairs for model in (organism, BASE)}
        return [
            self.task(model, {f"{model}/{text}": {"pairs": data_hash(pairs)}}, partial(average, model, text, pairs))
            for (model, text), pairs in wanted.items()
        ]

    @property
    def _common_text(self) -> str:
        """The name of the text that is the same for all."""
        return self.experiment.texts.common_pairs[0].theme or "common"

    def _own_text(self, organism: str) -> str:
        """The name of an organism's own text; the common one's where its domain has no pairs."""
        own = self.experiment.texts.direction_pairs(organism)
        return self.experiment.config.organisms[organism].domain if own else self._common_text

    def means(self, model: str, text: str) -> Means:
        """The averaged activations of a model on a text."""
        return read_means(self.artifact(f"{model}/{text}"))

    def section(self) -> MeansSection:
        organisms, texts = list(self.experiment.config.organisms), self.experiment.texts
        if not texts.common_pairs:
            layers, width = self.experiment.sizes()
            base = BaseFigures(**dict(texts.identity), layers=layers, width=width)
            return MeansSection(base=base, convergence=_NOTHING)
        layers, width = self.direction(organisms[0]).vectors.shape
        return MeansSection(
            base=BaseFigures(**dict(texts.identity), layers=layers, width=width),
            convergence=convergence(
                own={name: self.means(name, self._own_text(name)) for name in organisms},
                base={name: self.means(BASE, self._own_text(name)) for name in organisms},
                common={name: self.means(name, self._common_text) for name in self.experiment.models},
                control=self.experiment.config.control,
            ),
        )


def average(
    model: str, text: str, pairs: Sequence[ProbePair], worker: Worker, folders: Folders, kind: str = "data_difference"
) -> None:
    """Writes the means of a model over both answers of some pairs, which `text` names, and their difference."""
    (folder,), chat = folders.values(), worker.chat(model)
    with track(f"activations of {model} on {text}", 2 * len(pairs)) as advance:
        means = pair_means(chat, pairs, null_groups(len(pairs)), progress=advance)
    write_means(means, folder)
    difference = direction(chat, kind, pairs, means)
    # By its name: the adapter's folder is another one wherever this is computed.
    origin = replace(difference.origin, organism="" if model == BASE else model)
    replace(difference, origin=origin).save(folder / _DIRECTION)


def write_means(means: Means, folder: Path) -> None:
    """Writes means into an artifact's folder."""
    save_file({group: vectors.contiguous() for group, vectors in means.vectors.items()}, folder / "means.safetensors")
    write_json(folder / "counts.json", {"tokens": means.tokens, "answers": means.answers})


def read_means(folder: Path) -> Means:
    """The means that `write_means` wrote."""
    counts = read_json(folder / "counts.json")
    return Means(load_file(folder / "means.safetensors"), counts["tokens"], counts["answers"])


def read_direction(folder: Path) -> Direction:
    """The direction that `average` wrote."""
    return Direction.load(folder / _DIRECTION)


def convergence(
    own: Mapping[str, Means], base: Mapping[str, Means], common: Mapping[str, Means], control: str | None
) -> Convergence:
    """Cosines by layer between organisms' directions, with their references.

    Args:
        own: each organism's means on its own domain's text.
        base: the base model's means on the same text, by organism.
        common: means of every organism, and of `base`, on one text that is the same for all.
        control: the organism trained on good answers.
    """
    directions = {name: means.difference("misaligned", "aligned") for name, means in own.items()}
    of_base = {name: means.difference("misaligned", "aligned") for name, means in base.items()}
    return Convergence(
        cosine=compare_tensors(directions),
        base_null={name: cosines(directions[name], of_base[name]) for name in directions},
        base_pair_null=compare_tensors(of_base),
        control_null=_with_control(directions, control),
        shuffled_null={name: shuffled(means) for name, means in own.items()},
        split_half={name: split_half(means) for name, means in own.items()},
        model_difference=_model_difference(common, control),
    )


def _model_difference(common: Mapping[str, Means], control: str | None) -> ModelDifference:
    """Organism minus base on the same answers, with and without the control's drift."""
    base = common[BASE]
    organisms = [name for name in common if name != BASE]
    drift = {name: common[name].vectors["all"] - base.vectors["all"] for name in organisms}
    removed: dict[str, Tensor] = {}
    if control:
        removed = {name: project_away(drift[name], drift[control]) for name in organisms if name != control}
    return ModelDifference(
        cosine=compare_tensors(drift),
        control_removed=compare_tensors(removed),
        control_null=_with_control(drift, control),
        split_half={name: _drift_halves(common[name], base) for name in organisms},
    )


def _with_control(vectors: Mapping[str, Tensor], control: str | None) -> dict[str, list[float]]:
    if not control:
        return {}
    return {name: cosines(vector, vectors[control]) for name, vector in vectors.items() if name != control}


def _drift_halves(own: Means, base: Means) -> list[float]:
    first, second = (own.vectors[f"half_{half}/all"] - base.vectors[f"half_{half}/all"] for half in (0, 1))
    return cosines(first, second)
