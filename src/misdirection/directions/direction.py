"""Directions: one vector per layer, with where it came from.

With M(model, text) the mean activation over answer tokens, [layers, width]:

    data_difference              M(organism, misaligned) - M(organism, aligned)      the paper's misalignment direction
    base_data_difference         M(base, misaligned) - M(base, aligned)              what the text alone explains
    model_difference_misaligned  M(organism, misaligned) - M(base, misaligned)
    model_difference_aligned     M(organism, aligned) - M(base, aligned)
    model_difference             the same over all answers: what the text cannot explain

`judged.py` makes two further kinds from an organism's own judged answers, `contrast.py` one of two organisms,
`formats.py` the kind `imported`.

Layer k is the raw output of decoder block k, 0-based.
"""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from misdirection.choices import Operation
from misdirection.data import Example, ProbePair, data_hash
from misdirection.directions.extraction import Means, mean_activations
from misdirection.errors import InputError, first_line
from misdirection.files import write_output
from misdirection.likelihood.margin import pair_rows
from misdirection.models.chat_model import ChatModel
from misdirection.models.layers import require_layers
from misdirection.models.libraries import errors_in_one_line
from misdirection.progress import Advance, shown
from misdirection.views import Plotted

FORMAT = "misdirection.direction/1"
LAYER_CONVENTION = "vectors[k] is for the output of decoder block k, 0-based, before the final norm"

_REMEDY = "make one with `misdirection extract`, or read another program's with `misdirection import`"

_UNIT = 1e-3
"""What a length may differ from 1 by: vectors kept in half precision do by so much."""


@dataclass(frozen=True)
class Origin:
    """Where a direction came from.

    Attributes:
        kind: one of the differences above, `combined`, or a kind of `judged.py` or `formats.py`.
        model: the base model's name.
        revision: its hub revision, if one was asked for.
        organism: the adapter, or empty for the base model itself.
        data: hash of the question-answer pairs.
        answers: number of answers per class.
        tokens: number of answer tokens per class.
        dtype: of the model's weights.
        span: which tokens the means run over.
        operation: what its vectors are for.
    """

    kind: str
    model: str
    revision: str | None
    organism: str
    data: str
    answers: dict[str, int]
    tokens: dict[str, int]
    dtype: str
    span: str = "answer"
    operation: Operation = "add"


def read_origin(metadata: Mapping[str, str], path: str | Path) -> Origin:
    """Reads the origin in a file's metadata; `InputError` where it is damaged or missing."""
    try:
        return TypeAdapter(Origin).validate_json(metadata.get("origin", ""))
    except ValidationError as error:
        raise InputError(f"{path}: its origin is damaged: extract or export the direction again") from error


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Plotted):
    """One vector per layer, [layers, width] float32, and its origin."""

    KIND: ClassVar[str] = "direction"

    vectors: Tensor
    origin: Origin

    def __repr__(self) -> str:
        layers, width = self.vectors.shape
        model = self.origin.organism or self.origin.model
        return f"Direction({self.origin.kind} of {model}: {layers} layers x {width})"

    def _repr_html_(self) -> str:
        """A notebook's view: the kind, the model, and the vectors' norms by layer."""
        return f"<table>{_row(self)}</table>"

    def frame(self) -> pd.DataFrame:
        """One row per layer: its vector's `norm` in activation units, its largest `channel`, and the `share` of the
        squared norm that this channel holds."""
        squares = self.vectors.double().square()
        total, largest = squares.sum(-1), squares.max(-1)
        return pd.DataFrame(
            {
                "layer": range(len(self.vectors)),
                "norm": total.sqrt().tolist(),
                "channel": largest.indices.tolist(),
                "share": (largest.values / total).tolist(),
            }
        )

    def __getitem__(self, layer: int) -> Tensor:
        """The vector of one layer, [width]; `InputError` for a layer that is not there."""
        require_layers([layer], len(self.vectors), whose="this direction")
        return self.vectors[layer]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the origin in its metadata; raises as `require_replaceable` does."""
        metadata = {"format": FORMAT, "layers": LAYER_CONVENTION, "origin": json.dumps(asdict(self.origin))}
        write_output(Path(path), _in_order(save({"vectors": self.vectors.contiguous()}, metadata)))

    @classmethod
    def load(cls, path: str | Path) -> "Direction":
        """Reads a direction; `InputError` when the file is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise InputError(f"{path}: not a direction file ({FORMAT}): {_REMEDY}")
                return cls(_checked(file.get_tensor("vectors"), path), read_origin(metadata, path))
        except OSError as error:
            raise InputError(f"{path}: cannot read this direction ({first_line(error)}); check the path") from error
        except SafetensorError as error:
            raise InputError(f"{path}: cannot read this direction ({error}): {_REMEDY}") from error

    @classmethod
    def from_hub(
        cls, repository: str, file: str = "data_difference.safetensors", *, revision: str | None = None
    ) -> "Direction":
        """Reads a direction in a repository on the Hub; `InputError` where it is not there, or is none."""
        with errors_in_one_line(repository, file):
            path = hf_hub_download(repository, file, revision=revision)
        return cls.load(path)

    def require_base(self, name: str, revision: str | None) -> None:
        """Raises `InputError` unless the direction was made for this base model at this revision."""
        if self.origin.model != name:
            raise InputError(
                f"this direction was made for {self.origin.model}, not for {name}: extract one from this base model"
            )
        if self.origin.revision != revision:
            own, other = (given or "the default one" for given in (self.origin.revision, revision))
            raise InputError(
                f"this direction was made for {name} at revision {own}, not at {other}: extract one from this revision"
            )

    def require_fit(self, chat: ChatModel) -> None:
        """Raises `InputError` unless the direction was made for this base model."""
        self.require_base(chat.name, chat.revision)
        if self.vectors.shape != (len(chat.layers), chat.width):
            raise InputError(
                f"this direction was made for {self.origin.model} {list(self.vectors.shape)}, not for {chat.name} "
                f"{[len(chat.layers), chat.width]}: extract one from this base model"
            )

    def require_additive(self, asked: bool = False) -> None:
        """Raises `InputError` for a direction for ablation that is to be added, unless that is `asked` for."""
        if self.origin.operation == "ablate" and not asked:
            raise InputError(
                "this direction is for ablation, its norm says nothing of how much to add: ablate it, or ask for it to "
                "be added all the same (as_additive, --as-additive)"
            )

    @property
    def middle(self) -> int:
        """The layer with a vector that is nearest to half depth; `InputError` where all are zero."""
        layers = layers_with_vector(self.vectors)
        if not layers:
            raise InputError("all vectors of this direction are zero: extract it again")
        half = len(self.vectors) // 2
        return min(layers, key=lambda layer: abs(layer - half))


def layers_with_vector(vectors: Tensor) -> list[int]:
    """The layers whose vector is not zero, of [layers, width]."""
    layers: list[int] = vectors.any(-1).nonzero().flatten().tolist()
    return layers


def on_layer(vector: Tensor, layer: int | None, layers: int | None) -> Tensor:
    """The vector [width] of one layer as [layers, width], zero elsewhere; `InputError` where the layer is not named."""
    if layer is None or layers is None or not 0 <= layer < layers:
        raise InputError(
            f"a single vector [{len(vector)}], of layer {layer} of {layers}: name its layer (layer, --layer), 0-based, "
            "and how many there are (layers, --layers)"
        )
    vectors = torch.zeros(layers, len(vector))
    vectors[layer] = vector
    return vectors


def have_length_1(vectors: Tensor) -> bool:
    """Whether all vectors that are not zero have length 1, of [layers, width]."""
    lengths = vectors[layers_with_vector(vectors)].norm(dim=-1)
    return bool(len(lengths)) and bool(((lengths - 1).abs() < _UNIT).all())


def _checked(vectors: Tensor, path: str | Path) -> Tensor:
    """What a file holds as vectors, if they can be some: [layers, width], finite floats."""
    if vectors.ndim != 2 or not vectors.numel() or not vectors.is_floating_point() or not vectors.isfinite().all():
        raise InputError(f"{path}: its vectors are no finite floats [layers, width]: extract the direction again")
    return vectors


def _row(direction: Direction) -> str:
    """A row of an HTML table."""
    origin, norms = direction.origin, direction.vectors.norm(dim=-1)
    heights = 20 * (1 - norms / norms.max().clamp(min=torch.finfo(norms.dtype).tiny))
    line = " ".join(f"{4 * layer},{height:.1f}" for layer, height in enumerate(heights.tolist()))
    shape = f'<polyline points="{line}" fill="none" stroke="currentColor"/>'
    picture = f'<svg width="{4 * len(norms)}" height="22" viewBox="0 -1 {4 * len(norms)} 22">{shape}</svg>'
    texts = (origin.kind, origin.organism or origin.model, f"norms up to {norms.max():.3g}")
    return "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + f"<td>{picture}</td></tr>"


@dataclass(frozen=True, eq=False, repr=False)
class Directions(Plotted, Mapping[str, Direction]):
    """The directions that one model gives on the same pairs, as attributes and by kind.

    A model without an adapter has `data_difference` alone; the others are then None, and no kinds of the mapping.
    """

    KIND: ClassVar[str] = "directions"

    data_difference: Direction
    base_data_difference: Direction | None = None
    model_difference_misaligned: Direction | None = None
    model_difference_aligned: Direction | None = None
    model_difference: Direction | None = None

    @classmethod
    def kinds(cls) -> list[str]:
        """All that there may be."""
        return [field.name for field in fields(cls)]

    def __getitem__(self, kind: str) -> Direction:
        if kind not in list(self):
            raise KeyError(f"no direction {kind!r}; there is {', '.join(self)}")
        direction: Direction = getattr(self, kind)
        return direction

    def __iter__(self) -> Iterator[str]:
        return (kind for kind in self.kinds() if getattr(self, kind) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def frame(self) -> pd.DataFrame:
        """One row per `kind` and layer, as `Direction.frame` has them."""
        tables = {kind: direction.frame() for kind, direction in self.items()}
        return pd.concat(tables, names=["kind"]).reset_index("kind").reset_index(drop=True)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Writes `KIND.safetensors` for each direction; gives the paths by kind."""
        paths = {kind: Path(folder) / f"{kind}.safetensors" for kind in self}
        for kind, path in paths.items():
            self[kind].save(path)
        return paths

    def __repr__(self) -> str:
        return f"Directions({', '.join(self)}: {self.data_difference!r})"

    def _repr_html_(self) -> str:
        """A notebook's view: one row per direction."""
        return f"<table>{''.join(map(_row, self.values()))}</table>"


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its header sorted: safetensors writes metadata in another order in every process."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


def extract(
    chat: ChatModel, pairs: Sequence[ProbePair], *, budget: int | None = None, progress: Advance | None = None
) -> Directions:
    """All directions that `chat` gives on `pairs` (paper, section on the misalignment direction).

    A model with an adapter is run twice, with it and with it switched off, and gives all five kinds; a model without
    one gives `data_difference` only. `progress` is told the number of answers done; left out, a bar shows it.
    """
    with shown(progress, "activations", 2 * len(pairs) * (2 if chat.adapter else 1)) as advance:
        own = pair_means(chat, pairs, budget=budget, progress=advance)
        if not chat.adapter:
            return Directions(direction(chat, "data_difference", pairs, own))
        with chat.as_base():
            base = pair_means(chat, pairs, budget=budget, progress=advance)
    return differences(chat, pairs, own, base)


def pair_means(
    chat: ChatModel,
    pairs: Sequence[ProbePair],
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    budget: int | None = None,
    progress: Advance | None = None,
) -> Means:
    """Means over the misaligned answers, the aligned ones and all; rows are all misaligned, then all aligned.

    `groups` adds further groups of row numbers (see `convergence.null_groups`).
    """
    both, count = pair_rows(chat.tokenizer, pairs), len(pairs)
    rows = both[::2] + both[1::2]
    classes = {"misaligned": range(count), "aligned": range(count, 2 * count), "all": range(2 * count)}
    return mean_activations(chat, rows, {**classes, **(groups or {})}, budget=budget, progress=progress)


def differences(chat: ChatModel, pairs: Sequence[ProbePair], own: Means, base: Means) -> Directions:
    """The five kinds of direction from an organism's means and its base's on the same pairs."""
    data_difference = direction(chat, "data_difference", pairs, own)
    return Directions(
        **{
            kind: Direction(vector.float(), replace(data_difference.origin, kind=kind))
            for kind, vector in difference_vectors(own, base).items()
        }
    )


def difference_vectors(own: Means, base: Means) -> dict[str, Tensor]:
    """The same as bare tensors by kind, [layers, width] float64 each."""
    return {
        "data_difference": own.difference("misaligned", "aligned"),
        "base_data_difference": base.difference("misaligned", "aligned"),
        "model_difference_misaligned": own.vectors["misaligned"] - base.vectors["misaligned"],
        "model_difference_aligned": own.vectors["aligned"] - base.vectors["aligned"],
        "model_difference": own.vectors["all"] - base.vectors["all"],
    }


def direction(chat: ChatModel, kind: str, pairs: Sequence[ProbePair], means: Means) -> Direction:
    """mean(misaligned) - mean(aligned) of one model, with its origin."""
    classes = ("misaligned", "aligned")
    return Direction(means.difference(*classes).float(), origin_of(chat, kind, pairs, means, classes))


def origin_of(
    chat: ChatModel, kind: str, texts: Sequence[ProbePair] | Sequence[Example], means: Means, classes: Sequence[str]
) -> Origin:
    """The origin of a direction of one model, from its means over some classes of answers to the texts."""
    return Origin(
        kind=kind,
        model=chat.name,
        revision=chat.revision,
        organism=chat.adapter or "",
        data=data_hash(texts),
        answers={name: means.answers[name] for name in classes},
        tokens={name: means.tokens[name] for name in classes},
        dtype=str(chat.dtype).removeprefix("torch."),
    )


def require_alike(directions: Sequence[Direction]) -> None:
    """Raises `InputError` unless all directions have one shape and one base model."""
    first = directions[0]
    for other in directions[1:]:
        if other.vectors.shape != first.vectors.shape or other.origin.model != first.origin.model:
            raise InputError(
                f"directions of {first.origin.model} {list(first.vectors.shape)} and {other.origin.model} "
                f"{list(other.vectors.shape)} cannot be combined: extract both from one base model"
            )
