"""Directions in files that other programs read and write, by suffix.

    .safetensors  `vectors`, [layers, width]                     this package
    .npz          the same, as numpy arrays
    .pt           the same, as a dict of tensors                 torch.load(weights_only=True)
    .gguf         one tensor `direction.{k}`, [width], per layer llama.cpp, repeng

All are float32, and vector k is always for the output of decoder block k, 0-based. llama.cpp and repeng count
`direction.{k}` the same way, but llama.cpp never steers block 0 and rejects a whole file that names `direction.0`.
Hence a GGUF file of ours starts at `direction.1`, and its metadata keep the vector of block 0 for `import_direction`.

A scale is multiplied into the vectors, since llama.cpp reads no metadata; the file states it, and nobody applies it
again. Nothing is ever unpickled.

Beside the origin a file of ours states, each as a string under its own key (in GGUF `misdirection.KEY`):

    operation  `add` or `ablate` (`choices.Operation`)
    site       where the vectors are for
    at_layers  JSON list of the layers that have a vector
    scale      what was multiplied in

A GGUF control vector is added by whoever reads it, at all of its layers at once, so that none is written of a direction
for ablation. A foreign file that is no control vector and whose vectors all have length 1 is taken as for ablation.
"""

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import gguf
import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from misdirection.choices import Operation
from misdirection.directions.direction import (
    FORMAT,
    LAYER_CONVENTION,
    Direction,
    Origin,
    have_length_1,
    layers_with_vector,
    on_layer,
    read_origin,
)
from misdirection.errors import InputError, MisdirectionError, first_line
from misdirection.files import atomic_output, write_output
from misdirection.models.names import ModelName

log = logging.getLogger("misdirection")

# Our own keys in a GGUF file, where names are shared with other programs.
_OURS = "misdirection."
_BLOCK_0 = "misdirection.layer_0"
_SITE = "the residual stream after the block"
# At most four digits: a mistaken key must not ask for a table of a million rows.
_LAYER = re.compile(r"(?:(?:layer|direction)[._])?([0-9]{1,4})")


@dataclass(frozen=True)
class _Content:
    """The contents of a file: `vectors`, or one array per layer, and the strings beside them."""

    arrays: Mapping[Any, Any]
    metadata: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        return self.metadata.get("format") == FORMAT


def export_direction(
    direction: Direction,
    path: str | Path,
    *,
    scale: float = 1.0,
    model_type: str = "",
    layers: Sequence[int] | None = None,
    operation: Operation | None = None,
) -> list[int]:
    """Writes a direction to a .safetensors, .npz, .pt or .gguf file; whole or not at all.

    Gives the layers that have a vector in the file. Who reads a control vector adds all of them at once.

    Args:
        direction: vectors [layers, width] and their origin, which goes into the file.
        path: the file; its suffix names the format.
        scale: multiplied into the vectors and stated in the file.
        model_type: the architecture that a GGUF file hints at (`llama`, `qwen2`, ...); default: the origin's model.
        layers: whose vectors are written, the others as zero; default: all.
        operation: what the vectors are for; default: what the direction says. `add` is how a direction for ablation is
            made a control vector all the same.

    Warns that llama.cpp does not apply the vector of block 0, when a GGUF file has one.

    Raises:
        InputError: an unknown suffix, vectors or a scale that are not finite, a layer out of range, a path that cannot
            be written, a direction for ablation with a scale or as a control vector, or a GGUF file in which llama.cpp
            would find nothing to apply: only zeros beyond block 0.
    """
    path = Path(path)
    form = _form(path)
    origin = replace(direction.origin, operation=operation or direction.origin.operation)
    _require_operation(path, origin.operation, scale)
    vectors = _scaled(path, direction.vectors if layers is None else _only(direction, layers), scale)
    written = layers_with_vector(vectors)
    metadata = {
        "format": FORMAT,
        "layers": LAYER_CONVENTION,
        "origin": json.dumps(asdict(origin)),
        "operation": origin.operation,
        "site": _SITE,
        "at_layers": json.dumps(written),
        "scale": repr(float(scale)),
    }
    if form.encode is None:
        _write_gguf(path, vectors, metadata, model_type or direction.origin.model)
    else:
        write_output(path, form.encode(vectors, metadata))
    return written


def import_direction(
    path: str | Path,
    *,
    model: str,
    layers: int | None = None,
    first_row_is_embedding: bool = False,
    layer: int | None = None,
    operation: Operation | None = None,
) -> Direction:
    """Reads a direction from a .safetensors, .npz, .pt or .gguf file, ours or another program's.

    A file holds either `vectors`, [layers, width] (a .pt file also the bare tensor), or one array [width] per layer
    under `3`, `layer_3` or `direction.3`; floats of any precision, which become float32. `vectors` may also be the
    [width] of one layer, if that is named. Layers without a vector become zero and are named in a warning. A file that
    carries no origin of ours gets the kind `imported`.

    Args:
        path: the file; its suffix names the format.
        model: the base model's name, as `load` takes it.
        layers: the number of decoder blocks. A bare [rows, width] of another program needs it (or the next one): only
            so can a table whose first row is the embedding output be told from one without.
        first_row_is_embedding: the first of layers + 1 rows is the embedding output, and is dropped.
        layer: the one that a single [width] is of; it needs `layers`, too.
        operation: what the vectors are for; default: what the file says. `add` is how those for ablation come to be
            added all the same.

    Raises:
        InputError: in one line, a file that is missing, damaged, pickled or of another suffix; one made for
            another model; NaN, wrong dimensions or widths, no vectors, no floats, a key that is no layer or comes
            twice.
    """
    path = Path(path)
    if layers is not None and layers < 1:
        raise InputError(f"layers {layers}: give the number of decoder blocks, 1 or more")
    content = _content(path)
    if first_row_is_embedding and (content.is_ours or "vectors" not in content.arrays):
        raise InputError(
            f"{path}: its vectors are numbered by layer, there is no embedding row: leave first_row_is_embedding out"
        )
    origin = _origin(path, content, model)
    if _is_single(content) and layer is not None:
        vectors = on_layer(_floats(path, "vectors", content.arrays["vectors"], ("width",)), layer, layers)
    elif "vectors" in content.arrays:
        vectors = _table(path, content, layers, first_row_is_embedding)
    else:
        vectors = _stacked(path, content, layers)
    if content.metadata.get("scale", "1.0") != "1.0" and content.is_ours:
        log.warning("%s: its vectors are already multiplied by %s", path, content.metadata["scale"])
    return Direction(vectors, replace(origin, operation=operation or _operation(path, content, origin, vectors)))


def stated_base(path: str | Path) -> str | None:
    """The base model that a file of ours says its direction is of, ID[@REVISION]; None for another program's.

    Raises as `import_direction` does.
    """
    content = _content(Path(path))
    if not content.is_ours:
        return None
    origin = read_origin(content.metadata, path)
    return str(ModelName(origin.model, origin.revision))


# --- what the vectors must be -------------------------------------------------------------------------------------


def _scaled(path: Path, vectors: Tensor, scale: float) -> Tensor:
    if not math.isfinite(scale) or scale == 0:
        raise InputError(f"scale {scale}: give a finite number other than 0")
    rows = _floats(path, "vectors", vectors, ("layers", "width"))
    return _finite(path, "vectors", rows * scale)


def _only(direction: Direction, layers: Sequence[int]) -> Tensor:
    """Its vectors with zeros in the place of those of all other layers."""
    vectors = torch.zeros_like(direction.vectors)
    for layer in layers:
        vectors[layer] = direction[layer]
    return vectors


def _require_operation(path: Path, operation: Operation, scale: float) -> None:
    if operation == "ablate" and scale != 1:
        raise InputError(
            f"scale {scale}: an ablation takes a line out, however long its vector is: leave the scale out"
        )
    if operation == "ablate" and _form(path).is_control_vector:
        raise InputError(
            f"{path}: who reads a control vector adds it, and this direction is for ablation: use `misdirection bake`, "
            "or ask for it to be added all the same (operation='add', --operation add)"
        )


def _operation(path: Path, content: _Content, origin: Origin, vectors: Tensor) -> Operation:
    """What the vectors of a file are for, by its own words, or by their lengths where it says nothing."""
    if content.is_ours:
        return origin.operation
    stated = content.metadata.get("operation")
    if stated is not None:
        if stated in get_args(Operation):
            return cast(Operation, stated)
        raise InputError(f"{path}: operation {stated!r:.60}: give {' or '.join(get_args(Operation))} (--operation)")
    if _form(path).is_control_vector or not have_length_1(vectors):
        return "add"
    log.warning("%s: all vectors have length 1: taken as for ablation; --operation add says otherwise", path)
    return "ablate"


def _floats(path: Path, name: str, value: Any, axes: tuple[str, ...]) -> Tensor:
    """Gives `value` as a float32 tensor of its own with these axes."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout is not torch.strided:
        raise InputError(f"{path}: {name} is not a tensor of floats: save vectors as float32")
    if value.ndim != len(axes) or not value.numel():
        raise InputError(f"{path}: {name} has shape {list(value.shape)}, not [{', '.join(axes)}]: reshape it")
    # A copy, since the file may be mapped and the tensor be a view of far more; contiguous, for the writers.
    return _finite(path, name, value.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format))


def _finite(path: Path, name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"{path}: {name} holds NaN or infinite values (in float32): extract the direction again")
    return values


def _is_single(content: _Content) -> bool:
    """Whether `vectors` is that of one layer."""
    return isinstance(content.arrays.get("vectors"), Tensor) and content.arrays["vectors"].ndim == 1


def _table(path: Path, content: _Content, layers: int | None, first_row_is_embedding: bool) -> Tensor:
    """The array `vectors`, [layers, width], without an embedding row."""
    if _is_single(content):
        shape = list(content.arrays["vectors"].shape)
        raise InputError(f"{path}: vectors has shape {shape}, not [layers, width]: name its layer (layer, --layer)")
    rows = _floats(path, "vectors", content.arrays["vectors"], ("layers", "width"))
    if first_row_is_embedding:
        rows = rows[1:].clone()
    elif not content.is_ours and layers in (None, len(rows) - 1):
        raise InputError(
            f"{path}: {len(rows)} rows may be {len(rows) - 1} decoder blocks after the embedding output: give "
            f"first_row_is_embedding (--first-row-is-embedding) if so, else layers (--layers {len(rows)})"
        )
    if layers not in (None, len(rows)) or not len(rows):
        raise InputError(f"{path}: vectors for {len(rows)} layers, not {layers or 1}: check model and layers")
    return rows


def _stacked(path: Path, content: _Content, layers: int | None) -> Tensor:
    """One array [width] per layer as [layers, width]; layers without one are zero and named in a warning."""
    rows = _by_layer(path, content.arrays)
    width = len(next(iter(rows.values())))
    for layer, row in rows.items():
        if len(row) != width:
            raise InputError(f"{path}: layer {layer} has width {len(row)}, not {width}: check the file")
    count = max(rows) + 1
    if layers is not None and (count > layers or (content.is_ours and count < layers)):
        raise InputError(f"{path}: vectors for {count} layers, not {layers}: check model and layers")
    vectors = torch.zeros(layers or count, width)
    for layer, row in rows.items():
        vectors[layer] = row
    missing = [str(layer) for layer in range(len(vectors)) if layer not in rows]
    if missing:
        log.warning("%s: no vector for layer %s: zero there", path, ", ".join(missing))
    return vectors


def _by_layer(path: Path, arrays: Mapping[Any, Any]) -> dict[int, Tensor]:
    rows: dict[int, Tensor] = {}
    for key, value in arrays.items():
        match = _LAYER.fullmatch(str(key))
        if not match:
            raise InputError(
                f"{path}: {key!r:.60} is no layer: keys are `vectors`, or layers as 3, layer_3 or direction.3"
            )
        layer = int(match[1])
        if layer in rows:
            raise InputError(f"{path}: two vectors for layer {layer} ({key!r} is the second): keep one")
        rows[layer] = _floats(path, f"layer {layer}", value, ("width",))
    if not rows:
        raise InputError(f"{path}: no vectors in this file: export the direction again")
    return rows


def _origin(path: Path, content: _Content, model: str) -> Origin:
    """The origin that the file carries, or one that says that nothing but the model is known."""
    if not content.is_ours:
        return Origin("imported", model, None, "", "", {}, {}, dtype="unknown", span="unknown")
    origin = read_origin(content.metadata, path)
    if origin.model != model:
        raise InputError(f"{path}: made for {origin.model}, not for {model}: give {origin.model} as the model")
    return origin


# --- the formats --------------------------------------------------------------------------------------------------


def _content(path: Path) -> _Content:
    """What a file holds; `InputError` for one that cannot be read."""
    form = _form(path)
    try:
        content = form.read(path)
    except MisdirectionError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:
        # The parsers stumble over foreign bytes in ways of their own: IndexError, KeyError, struct.error, ...
        raise InputError(
            f"{path}: damaged, or not a {path.suffix} file ({first_line(error, 120)}); export the direction again"
        ) from error
    stated = content.metadata.get("format", FORMAT)
    if stated != FORMAT and stated.startswith(FORMAT.partition("/")[0]):
        raise InputError(f"{path}: a direction of another version ({stated:.40}): extract or export it again")
    return content


def _safetensors_bytes(vectors: Tensor, metadata: dict[str, str]) -> bytes:
    return safetensors.torch.save({"vectors": vectors}, metadata)


def _read_safetensors(path: Path) -> _Content:
    with safe_open(path, framework="pt") as file:
        return _Content({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _npz_bytes(vectors: Tensor, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"vectors": vectors.numpy(), **metadata}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read_npz(path: Path) -> _Content:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    texts = {name: str(array) for name, array in arrays.items() if array.dtype.kind == "U"}
    return _Content({name: _tensor(array) for name, array in arrays.items() if name not in texts}, texts)


def _tensor(array: np.ndarray) -> Any:
    """Floats as a tensor; anything else as it is, for `_floats` to refuse with its name."""
    # torch knows this machine's byte order only.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if array.dtype.kind == "f" else array


def _pt_bytes(vectors: Tensor, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"vectors": vectors, **metadata}, buffer)
    return buffer.getvalue()


def _read_pt(path: Path) -> _Content:
    try:
        # weights_only builds tensors, strings, numbers and containers of them, and runs nothing that the file names.
        value = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except OSError:
        raise
    except Exception as error:
        # torch's own text advises to unpickle after all.
        raise InputError(
            f"{path}: damaged, or holds more than tensors and is not unpickled: make it with "
            "torch.save({'vectors': tensor}, path)"
        ) from error
    if isinstance(value, Tensor):
        return _Content({"vectors": value}, {})
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: holds a {type(value).__name__}, not a tensor [layers, width] or a dict: save {{layer: vector}}"
        )
    texts = {name: text for name, text in value.items() if isinstance(text, str)}
    return _Content({name: array for name, array in value.items() if name not in texts}, texts)


def _write_gguf(path: Path, vectors: Tensor, metadata: dict[str, str], hint: str) -> None:
    _require_applied(path, vectors)
    # An empty string would not be written, and repeng reads no file without a hint.
    if not hint:
        raise InputError(f"{path}: a GGUF file names its model: give model_type (--model-type), as `llama`")
    with atomic_output(path) as temporary, contextlib.closing(gguf.GGUFWriter(temporary, "controlvector")) as writer:
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(vectors) - 1)
        for name, text in metadata.items():
            writer.add_string(f"{_OURS}{name}", text)
        if vectors[0].any():
            writer.add_array(_BLOCK_0, vectors[0].tolist())
        _write_tensors(writer, {f"direction.{layer}": vectors[layer].numpy() for layer in range(1, len(vectors))})


def _write_tensors(writer: Any, tensors: Mapping[str, np.ndarray]) -> None:
    for name, array in tensors.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Not by the writer's own numpy `tofile`, which says nothing when the disk is full.
    (out,) = writer.fout
    writer.write_padding(out, out.tell())
    for array in tensors.values():
        out.write(array.astype("<f4").tobytes())
        writer.write_padding(out, array.nbytes)


def _require_applied(path: Path, vectors: Tensor) -> None:
    """Refuses what llama.cpp would load and not apply at all; warn of what it leaves out."""
    if not vectors.any():
        raise InputError(f"{path}: all vectors are zero, so the file would steer nothing: extract again")
    if not vectors[1:].any():
        raise InputError(
            f"{path}: only layer 0 has a vector, and llama.cpp applies none to block 0: export a later layer, or to "
            ".safetensors, .npz or .pt"
        )
    if vectors[0].any():
        log.warning("%s: llama.cpp and repeng will not apply layer 0's vector; `misdirection import` reads it", path)


def _read_gguf(path: Path) -> _Content:
    reader = gguf.GGUFReader(path)
    if any(not tensor.name.startswith("direction.") for tensor in reader.tensors):
        raise InputError(f"{path}: not a control vector: its tensors are not named direction.1, direction.2, ...")
    arrays = {tensor.name: _tensor(tensor.data) for tensor in reader.tensors}
    string = gguf.GGUFValueType.STRING
    ours = {name.removeprefix(_OURS): field for name, field in reader.fields.items() if name.startswith(_OURS)}
    content = _Content(arrays, {name: field.contents() for name, field in ours.items() if field.types[0] == string})
    if content.is_ours and arrays:
        zero = torch.zeros(len(next(iter(arrays.values()))))
        stored = reader.get_field(_BLOCK_0)
        arrays["direction.0"] = torch.tensor(stored.contents()) if stored else zero
    return content


@dataclass(frozen=True)
class _Form:
    """One file format; GGUF alone has no `encode`, since its library writes files only."""

    read: Callable[[Path], _Content]
    encode: Callable[[Tensor, dict[str, str]], bytes] | None = None

    @property
    def is_control_vector(self) -> bool:
        """Whether programs that read it add its vectors."""
        return self.encode is None


_FORMS = {
    ".safetensors": _Form(_read_safetensors, _safetensors_bytes),
    ".npz": _Form(_read_npz, _npz_bytes),
    ".pt": _Form(_read_pt, _pt_bytes),
    ".gguf": _Form(_read_gguf),
}


def _form(path: Path) -> _Form:
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise InputError(f"{path}: unknown format {path.suffix!r}: use one of {', '.join(_FORMS)}")
    return form
