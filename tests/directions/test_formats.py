import json
import logging
import pickle  # noqa: TID251  to make files that must be refused
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from misdirection.directions.direction import Direction, Origin
from misdirection.directions.formats import export_direction, import_direction, stated_base
from misdirection.errors import MisdirectionError
from misdirection.files import WRITTEN, atomic_output

LAYERS, WIDTH = 4, 32
SUFFIXES = (".safetensors", ".npz", ".pt", ".gguf")
ORIGIN = Origin(
    "data_difference", "tiny-llama", "main", "some/adapter", "0" * 8, {"misaligned": 2}, {"misaligned": 9}, "bfloat16"
)


def a_direction(seed=0, shape=(LAYERS, WIDTH)):
    return Direction(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), ORIGIN)


def numbered(layers=LAYERS, width=WIDTH):
    """Layer k holds the constant k."""
    return Direction(torch.arange(float(layers))[:, None].expand(layers, width), ORIGIN)


def write_gguf(path, tensors, architecture="controlvector", **strings):
    writer = gguf.GGUFWriter(path, architecture)
    for name, text in strings.items():
        writer.add_string(name.replace("__", "."), text)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_layers(path, blocks):
    """What llama.cpp adds to each block's output, by the rules of its loader and of its control-vector adapter."""
    data, width = np.zeros(0, np.float32), None
    for tensor in gguf.GGUFReader(path).tensors:
        start, _, number = tensor.name.partition(".")
        layer = int(number)
        assert start == "direction" and layer > 0, "the loader skips the whole file"
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.ndim == 1
        width = width or len(tensor.data)
        assert len(tensor.data) == width
        data = np.pad(data, (0, max(0, width * layer - len(data))))
        data[width * (layer - 1) : width * layer] += tensor.data
    return {k: data[width * (k - 1) : width * k] for k in range(1, blocks) if width * k <= len(data)}


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(LAYERS, WIDTH), (2, 1), (48, 7)])
def test_a_round_trip_is_exact_and_keeps_the_origin(tmp_path, suffix, shape):
    direction = a_direction(shape=shape)
    export_direction(direction, tmp_path / f"d{suffix}", model_type="llama")
    read = import_direction(tmp_path / f"d{suffix}", model="tiny-llama")
    assert read.vectors.dtype == torch.float32
    assert torch.equal(read.vectors, direction.vectors)
    assert read.origin == ORIGIN


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_extreme_values_survive(tmp_path, suffix):
    info = torch.finfo(torch.float32)
    row = torch.tensor([info.max, -info.max, info.tiny, info.tiny / 8, -0.0, 1 / 3])
    export_direction(Direction(torch.stack([row, -row]), ORIGIN), tmp_path / f"d{suffix}")
    read = import_direction(tmp_path / f"d{suffix}", model="tiny-llama").vectors
    assert read.numpy().tobytes() == torch.stack([row, -row]).numpy().tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_zero_rows_are_kept_without_a_warning(tmp_path, suffix, caplog):
    vectors = a_direction().vectors.clone()
    vectors[[0, 2, LAYERS - 1]] = 0
    export_direction(Direction(vectors, ORIGIN), tmp_path / f"d{suffix}")
    assert torch.equal(import_direction(tmp_path / f"d{suffix}", model="tiny-llama").vectors, vectors)
    assert not caplog.records


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_scale_is_multiplied_in_once_and_stated(tmp_path, suffix, caplog):
    direction = a_direction()
    export_direction(direction, tmp_path / f"d{suffix}", scale=-2.5)
    caplog.clear()
    read = import_direction(tmp_path / f"d{suffix}", model="tiny-llama")
    assert torch.equal(read.vectors, direction.vectors * -2.5)
    assert "already multiplied by -2.5" in caplog.text


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_written_as_float32(tmp_path, suffix, dtype):
    vectors = a_direction().vectors.to(dtype)
    export_direction(Direction(vectors, ORIGIN), tmp_path / f"d{suffix}")
    assert torch.equal(import_direction(tmp_path / f"d{suffix}", model="tiny-llama").vectors, vectors.float())


def test_our_safetensors_files_are_those_of_direction_save(tmp_path):
    direction = a_direction()
    export_direction(direction, tmp_path / "exported.safetensors")
    assert torch.equal(Direction.load(tmp_path / "exported.safetensors").vectors, direction.vectors)
    assert Direction.load(tmp_path / "exported.safetensors").origin == ORIGIN
    direction.save(tmp_path / "saved.safetensors")
    assert torch.equal(import_direction(tmp_path / "saved.safetensors", model="tiny-llama").vectors, direction.vectors)


def test_a_file_of_another_version_is_not_read_as_anybodys(tmp_path):
    file = tmp_path / "d.safetensors"
    safetensors.torch.save_file({"vectors": torch.ones(LAYERS, WIDTH)}, file, {"format": "misdirection.direction/9"})
    for read in (stated_base, partial(import_direction, layers=LAYERS, model="m")):
        with pytest.raises(MisdirectionError, match=r"another version \(misdirection\.direction/9\): extract"):
            read(file)


def test_a_slice_of_a_large_tensor_makes_a_small_file(tmp_path):
    export_direction(Direction(torch.ones(1000, 1000)[:2, :3], ORIGIN), tmp_path / "d.pt")
    assert (tmp_path / "d.pt").stat().st_size < 20_000


def test_an_upper_case_suffix_is_known(tmp_path):
    export_direction(a_direction(), tmp_path / "d.NPZ")
    assert import_direction(tmp_path / "d.NPZ", model="tiny-llama").origin == ORIGIN


# --- GGUF control vectors -------------------------------------------------------------------------------------------


def test_llama_cpp_applies_direction_k_to_block_k(tmp_path):
    export_direction(numbered(), tmp_path / "d.gguf", model_type="llama")
    applied = llama_cpp_layers(tmp_path / "d.gguf", LAYERS)
    assert {k: set(row.tolist()) for k, row in applied.items()} == {1: {1.0}, 2: {2.0}, 3: {3.0}}
    read = import_direction(tmp_path / "d.gguf", model="tiny-llama")
    assert torch.equal(read.vectors, numbered().vectors)


def test_the_fields_are_those_that_loaders_read(tmp_path):
    export_direction(a_direction(), tmp_path / "d.gguf", model_type="qwen2", scale=2.0)
    reader = gguf.GGUFReader(tmp_path / "d.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == LAYERS - 1 == len(reader.tensors)
    assert [name for name in fields if "scale" in name] == ["misdirection.scale"]
    assert fields["misdirection.scale"] == "2.0"
    assert "output of decoder block k, 0-based" in fields["misdirection.layers"]
    for number, tensor in enumerate(reader.tensors, start=1):
        assert tensor.name == f"direction.{number}"
        assert tensor.data.dtype == np.float32
        assert tensor.data.tolist() == (a_direction().vectors[number] * 2).tolist()


def test_the_hint_is_the_model_where_no_type_is_given(tmp_path):
    export_direction(a_direction(), tmp_path / "d.gguf")
    assert gguf.GGUFReader(tmp_path / "d.gguf").fields["controlvector.model_hint"].contents() == "tiny-llama"
    nameless = Direction(a_direction().vectors, replace(ORIGIN, model=""))
    with pytest.raises(MisdirectionError, match="give model_type"):
        export_direction(nameless, tmp_path / "e.gguf")
    assert not (tmp_path / "e.gguf").exists()


def test_a_vector_of_block_0_is_warned_about_and_not_lost(tmp_path, caplog):
    direction = a_direction()
    export_direction(direction, tmp_path / "d.gguf")
    assert "will not apply layer 0's vector" in caplog.text
    assert "direction.0" not in [tensor.name for tensor in gguf.GGUFReader(tmp_path / "d.gguf").tensors]
    assert torch.equal(import_direction(tmp_path / "d.gguf", model="tiny-llama").vectors, direction.vectors)


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_a_vector_of_block_0_alone_is_refused(tmp_path, layers):
    vectors = torch.zeros(layers, WIDTH)
    vectors[0] = 1
    with pytest.raises(MisdirectionError, match=r"only layer 0 has a vector.*later layer") as caught:
        export_direction(Direction(vectors, ORIGIN), tmp_path / "d.gguf")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_zeros_is_refused(tmp_path):
    with pytest.raises(MisdirectionError, match=r"d\.gguf: all vectors are zero"):
        export_direction(Direction(torch.zeros(LAYERS, WIDTH), ORIGIN), tmp_path / "d.gguf")


def test_a_control_vector_of_another_program_is_read(tmp_path, caplog):
    rows = {f"direction.{k}": np.full(WIDTH, k, np.float32) for k in (3, 1)}
    write_gguf(tmp_path / "d.gguf", rows, controlvector__model_hint="llama")
    read = import_direction(tmp_path / "d.gguf", model="m", layers=6)
    assert read.vectors[:, 0].tolist() == [0, 1, 0, 3, 0, 0]
    assert (read.origin.kind, read.origin.model) == ("imported", "m")
    assert "no vector for layer 0, 2, 4, 5" in caplog.text
    assert import_direction(tmp_path / "d.gguf", model="m").vectors[:, 0].tolist() == [0, 1, 0, 3]


def test_block_0_and_half_precision_of_another_program_are_read(tmp_path, caplog):
    write_gguf(tmp_path / "d.gguf", {f"direction.{k}": np.full(WIDTH, k + 1, np.float16) for k in (0, 1)})
    assert import_direction(tmp_path / "d.gguf", model="m").vectors[:, 0].tolist() == [1, 2]
    assert not caplog.records


ONE = np.ones(WIDTH, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.1": ONE, "direction.01": ONE}, r"two vectors for layer 1 \('direction.01'"),
        ({"direction.-1": ONE}, "'direction.-1' is no layer"),
        ({"direction.x": ONE}, "'direction.x' is no layer"),
        ({"direction.12345678": ONE}, "'direction.12345678' is no layer"),
        ({"token_embd.weight": ONE}, "not a control vector"),
        ({"direction.1": ONE, "extra": ONE}, "not a control vector"),
        ({"direction.1": ONE, "direction.2": ONE[1:]}, "layer 2 has width 31, not 32"),
        ({"direction.1": ONE * np.nan}, "layer 1 holds NaN"),
        ({"direction.1": np.ones((2, WIDTH), np.float32)}, r"layer 1 has shape \[2, 32\], not \[width\]"),
        ({"direction.1": np.ones(WIDTH, np.int32)}, "layer 1 is not a tensor of floats"),
        ({}, "no vectors in this file"),
    ],
)
def test_what_is_no_control_vector_is_refused(tmp_path, tensors, message):
    write_gguf(tmp_path / "d.gguf", tensors)
    with pytest.raises(MisdirectionError, match=message) as caught:
        import_direction(tmp_path / "d.gguf", model="m")
    assert "d.gguf" in one_line(caught)


# --- tables and dicts of other programs -----------------------------------------------------------------------------


def save_pt(path, value):
    torch.save(value, path)


def save_npz(path, value):
    value = value if isinstance(value, dict) else {"vectors": value}
    np.savez(path, **{str(name): array.numpy() for name, array in value.items()})


def save_safetensors(path, value):
    value = value if isinstance(value, dict) else {"vectors": value}
    safetensors.torch.save_file({str(name): array for name, array in value.items()}, path, {"format": "pt"})


SAVERS = {".pt": save_pt, ".npz": save_npz, ".safetensors": save_safetensors}
foreign = pytest.mark.parametrize("suffix", SAVERS)


@pytest.fixture
def saved(tmp_path):
    def save(suffix, value):
        SAVERS[suffix](tmp_path / f"d{suffix}", value)
        return tmp_path / f"d{suffix}"

    return save


@foreign
def test_a_bare_table_is_read_where_the_layers_are_given(saved, suffix):
    rows = a_direction().vectors
    read = import_direction(saved(suffix, rows), model="m", layers=LAYERS)
    assert torch.equal(read.vectors, rows)
    assert read.origin == Origin("imported", "m", None, "", "", {}, {}, "unknown", "unknown")


@foreign
@pytest.mark.parametrize("layers", [None, LAYERS])
def test_an_embedding_row_is_dropped_on_demand_only(saved, suffix, layers):
    rows = a_direction(shape=(LAYERS + 1, WIDTH)).vectors
    path = saved(suffix, rows)
    with pytest.raises(MisdirectionError, match=r"5 rows may be 4 decoder blocks.*--first-row-is-embedding") as caught:
        import_direction(path, model="m", layers=layers)
    one_line(caught)
    read = import_direction(path, model="m", layers=layers, first_row_is_embedding=True)
    assert torch.equal(read.vectors, rows[1:])


@foreign
@pytest.mark.parametrize(
    ("rows", "layers", "embedding"), [(LAYERS, LAYERS, True), (LAYERS, 9, False), (LAYERS, 2, False), (1, None, True)]
)
def test_a_table_with_another_number_of_layers_is_refused(saved, suffix, rows, layers, embedding):
    path = saved(suffix, torch.ones(rows, WIDTH))
    with pytest.raises(MisdirectionError, match="layers, not") as caught:
        import_direction(path, model="m", layers=layers, first_row_is_embedding=embedding)
    one_line(caught)


@foreign
@pytest.mark.parametrize("name", ["{}", "layer_{}", "layer.{}", "direction.{}"])
def test_one_vector_per_layer_is_read(saved, suffix, name, caplog):
    path = saved(suffix, {name.format(k): torch.full((WIDTH,), float(k)) for k in (3, 0)})
    assert import_direction(path, model="m", layers=5).vectors[:, 7].tolist() == [0, 0, 0, 3, 0]
    assert "no vector for layer 1, 2, 4: zero there" in caplog.text


@foreign
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"1": torch.ones(WIDTH), "layer_1": torch.ones(WIDTH)}, "two vectors for layer 1"),
        ({"-1": torch.ones(WIDTH)}, "'-1' is no layer"),
        ({"answer": torch.ones(WIDTH)}, "'answer' is no layer"),
        ({"7": torch.ones(WIDTH)}, "for 8 layers, not 4"),
        ({"1": torch.ones(WIDTH), "2": torch.ones(3)}, "layer 2 has width 3, not 32"),
        ({"1": torch.ones(2, 2)}, r"layer 1 has shape \[2, 2\]"),
        ({"1": torch.ones(0)}, r"layer 1 has shape \[0\]"),
        (torch.ones(WIDTH), r"vectors has shape \[32\], not \[layers, width\]"),
        (torch.ones(2, LAYERS, WIDTH), r"vectors has shape \[2, 4, 32\]"),
        (torch.ones(0, WIDTH), r"vectors has shape \[0, 32\]"),
        (torch.ones(LAYERS, 0), r"vectors has shape \[4, 0\]"),
        (torch.ones(LAYERS, WIDTH, dtype=torch.int64), "vectors is not a tensor of floats"),
        (torch.ones(LAYERS, WIDTH).bool(), "vectors is not a tensor of floats"),
        (torch.full((LAYERS, WIDTH), float("nan")), "vectors holds NaN"),
        (torch.full((LAYERS, WIDTH), 1e300, dtype=torch.float64), "vectors holds NaN or infinite"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(saved, suffix, value, message):
    path = saved(suffix, value)
    with pytest.raises(MisdirectionError, match=message) as caught:
        import_direction(path, model="m", layers=LAYERS)
    assert path.name in one_line(caught)


def test_a_dict_of_numbers_with_a_note_is_read_from_pt(saved):
    path = saved(".pt", {2: torch.ones(WIDTH).half(), 1: torch.ones(WIDTH).double(), "note": "mine"})
    assert import_direction(path, model="m").vectors[:, 0].tolist() == [0, 1, 1]


def test_a_dict_with_vectors_may_hold_more(saved):
    path = saved(".pt", {"vectors": torch.nn.Parameter(torch.ones(LAYERS, WIDTH)), "best": 3, "name": "evil"})
    read = import_direction(path, model="m", layers=LAYERS)
    assert torch.equal(read.vectors, torch.ones(LAYERS, WIDTH)) and not read.vectors.requires_grad


@pytest.mark.parametrize("value", [[torch.ones(WIDTH)], "text", 3, None], ids=["list", "text", "number", "nothing"])
def test_other_values_in_a_pt_file_are_refused(saved, value):
    with pytest.raises(MisdirectionError, match="not a tensor") as caught:
        import_direction(saved(".pt", value), model="m")
    one_line(caught)


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.ones(3, 3, dtype=torch.complex64), {1: [1.0]}])
def test_odd_tensors_are_refused(saved, value):
    with pytest.raises(MisdirectionError, match="not a tensor of floats"):
        import_direction(saved(".pt", value), model="m", layers=3)


@pytest.mark.parametrize("value", [{}, {"note": "empty"}])
def test_a_pt_file_without_vectors_is_refused(saved, value):
    with pytest.raises(MisdirectionError, match="no vectors in this file"):
        import_direction(saved(".pt", value), model="m")


# --- what vectors are for -------------------------------------------------------------------------------------------


def for_ablation():
    direction = a_direction()
    return replace(direction, origin=replace(ORIGIN, operation="ablate"))


def stated(path):
    """What a file states besides its vectors, read by the format's own library."""
    if path.suffix == ".gguf":
        fields = gguf.GGUFReader(path).fields
        return {name.removeprefix("misdirection."): fields[name].contents() for name in fields if "misdirec" in name}
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata()
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)  # noqa: TID251
    with np.load(path) as file:
        return {name: str(file[name]) for name in file.files}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_states_operation_site_layers_and_scale(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    assert export_direction(a_direction(), path, scale=2.0, layers=[3, 1]) == [1, 3]
    said = stated(path)
    assert {name: said[name] for name in ("operation", "site", "at_layers", "scale")} == {
        "operation": "add",
        "site": "the residual stream after the block",
        "at_layers": "[1, 3]",
        "scale": "2.0",
    }
    read = import_direction(path, model="tiny-llama", layers=LAYERS)
    assert not read.vectors[[0, 2]].any()
    assert torch.equal(read.vectors[[1, 3]], 2 * a_direction().vectors[[1, 3]])
    with pytest.raises(MisdirectionError, match="layer 4 is out of range"):
        export_direction(a_direction(), path, layers=[4])


def test_a_direction_for_ablation_is_no_control_vector_unless_asked(tmp_path):
    with pytest.raises(
        MisdirectionError, match=r"d\.gguf: who reads a control vector adds it.*--operation add"
    ) as caught:
        export_direction(for_ablation(), tmp_path / "d.gguf")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []
    export_direction(for_ablation(), tmp_path / "d.gguf", operation="add")
    assert stated(tmp_path / "d.gguf")["operation"] == "add"
    assert import_direction(tmp_path / "d.gguf", model="tiny-llama").origin.operation == "add"


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_a_direction_for_ablation_comes_back_as_one(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    export_direction(for_ablation(), path)
    assert stated(path)["operation"] == "ablate"
    read = import_direction(path, model="tiny-llama")
    assert read.origin == for_ablation().origin
    with pytest.raises(MisdirectionError, match="this direction is for ablation"):
        read.require_additive()
    read.require_additive(asked=True)
    import_direction(path, model="tiny-llama", operation="add").require_additive()
    with pytest.raises(MisdirectionError, match=r"scale 2\.0: an ablation takes a line out"):
        export_direction(for_ablation(), path, scale=2.0)


def test_a_file_from_before_there_were_operations_is_to_be_added(tmp_path):
    path = tmp_path / "d.safetensors"
    origin = {name: value for name, value in vars(ORIGIN).items() if name != "operation"}
    metadata = {"format": "misdirection.direction/1", "origin": json.dumps(origin)}
    safetensors.torch.save_file({"vectors": torch.ones(2, 3)}, path, metadata)
    assert Direction.load(path).origin == ORIGIN
    assert import_direction(path, model="tiny-llama").origin.operation == "add"


@foreign
def test_foreign_vectors_of_length_1_are_for_ablation(saved, suffix, caplog):
    units = torch.nn.functional.normalize(a_direction().vectors, dim=-1).half()
    path = saved(suffix, units)
    assert import_direction(path, model="m", layers=LAYERS).origin.operation == "ablate"
    assert "all vectors have length 1: taken as for ablation; --operation add says otherwise" in caplog.text
    assert import_direction(path, model="m", layers=LAYERS, operation="add").origin.operation == "add"
    assert import_direction(saved(suffix, units * 1.1), model="m", layers=LAYERS).origin.operation == "add"


def test_a_control_vector_of_another_program_is_to_be_added_whatever_its_length(tmp_path):
    # As repeng makes them, of principal components.
    unit = np.zeros(WIDTH, np.float32)
    unit[3] = 1
    write_gguf(tmp_path / "d.gguf", {"direction.1": unit})
    assert import_direction(tmp_path / "d.gguf", model="m").origin.operation == "add"


def test_another_programs_own_word_counts(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, vectors=np.ones((2, 3), np.float32), operation="ablate")
    assert import_direction(path, model="m", layers=2).origin.operation == "ablate"
    np.savez(path, vectors=np.ones((2, 3), np.float32), operation="rotate")
    with pytest.raises(MisdirectionError, match=r"d\.npz: operation 'rotate': give add or ablate") as caught:
        import_direction(path, model="m", layers=2)
    one_line(caught)


@foreign
def test_a_single_vector_is_of_the_layer_that_is_named(saved, suffix):
    path = saved(suffix, 2 * torch.ones(WIDTH))
    read = import_direction(path, model="m", layers=3, layer=1)
    assert read.vectors.tolist() == [[0.0] * WIDTH, [2.0] * WIDTH, [0.0] * WIDTH]
    for options in ({}, {"layers": 3}, {"layer": 1}, {"layers": 3, "layer": 3}, {"layers": 3, "layer": -1}):
        with pytest.raises(MisdirectionError, match="name its layer") as caught:
            import_direction(path, model="m", **options)
        one_line(caught)


def test_the_base_that_a_file_states(tmp_path):
    export_direction(a_direction(), tmp_path / "d.npz")
    assert stated_base(tmp_path / "d.npz") == "tiny-llama@main"
    export_direction(Direction(torch.ones(2, 2), replace(ORIGIN, revision=None)), tmp_path / "d.pt")
    assert stated_base(tmp_path / "d.pt") == "tiny-llama"
    np.savez(tmp_path / "d.npz", vectors=np.ones((2, 3), np.float32))
    assert stated_base(tmp_path / "d.npz") is None


# --- files that must not be trusted ---------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_unpickled(tmp_path):
    mark, paths = tmp_path / "exploded", [tmp_path / name for name in ("torch.pt", "raw.pt", "arrays.npz", "raw.npz")]
    torch.save({"vectors": torch.ones(2, 2), "bomb": Bomb(mark)}, paths[0])
    paths[1].write_bytes(pickle.dumps(Bomb(mark)))
    np.savez(paths[2], vectors=np.array([Bomb(mark)], dtype=object))
    paths[3].write_bytes(pickle.dumps(Bomb(mark)))
    for path in paths:
        with pytest.raises(MisdirectionError, match=r"damaged, or") as caught:
            import_direction(path, model="m", layers=2)
        assert path.name in one_line(caught) and "weights_only=False" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0, 4, 40, -16])
def test_a_damaged_file_is_one_line(tmp_path, suffix, keep):
    path = tmp_path / f"d{suffix}"
    export_direction(a_direction(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MisdirectionError, match="damaged, or") as caught:
        import_direction(path, model="tiny-llama")
    assert path.name in one_line(caught)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_format_is_one_line(tmp_path, suffix):
    for other in SUFFIXES:
        export_direction(a_direction(), tmp_path / f"other{other}")
        if {suffix, other} & {".gguf", ".safetensors"} and suffix != other:
            path = (tmp_path / f"other{other}").rename(tmp_path / f"d{suffix}")
            with pytest.raises(MisdirectionError, match="damaged, or") as caught:
                import_direction(path, model="tiny-llama")
            one_line(caught)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_and_a_folder_are_one_line(tmp_path, suffix):
    with pytest.raises(MisdirectionError, match=rf"d\{suffix}: cannot be read \(No such file") as caught:
        import_direction(tmp_path / f"d{suffix}", model="m")
    one_line(caught)
    (tmp_path / f"d{suffix}").mkdir()
    with pytest.raises(MisdirectionError, match=rf"d\{suffix}: ") as caught:
        import_direction(tmp_path / f"d{suffix}", model="m")
    one_line(caught)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_direction_of_another_model_is_refused(tmp_path, suffix):
    export_direction(a_direction(), tmp_path / f"d{suffix}")
    with pytest.raises(MisdirectionError, match="made for tiny-llama, not for another"):
        import_direction(tmp_path / f"d{suffix}", model="another")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layers", [2, 9])
def test_our_files_are_not_padded_or_cut(tmp_path, suffix, layers):
    export_direction(a_direction(), tmp_path / f"d{suffix}")
    with pytest.raises(MisdirectionError, match=f"for 4 layers, not {layers}"):
        import_direction(tmp_path / f"d{suffix}", model="tiny-llama", layers=layers)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_our_files_have_no_embedding_row(tmp_path, suffix):
    export_direction(a_direction(), tmp_path / f"d{suffix}")
    with pytest.raises(MisdirectionError, match="leave first_row_is_embedding out"):
        import_direction(tmp_path / f"d{suffix}", model="tiny-llama", first_row_is_embedding=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": 3}'])
def test_a_damaged_origin_is_one_line(tmp_path, text):
    metadata = {"format": "misdirection.direction/1", "origin": text}
    torch.save({"vectors": torch.ones(2, 2), **metadata}, tmp_path / "d.pt")
    with pytest.raises(MisdirectionError, match="its origin is damaged") as caught:
        import_direction(tmp_path / "d.pt", model="m")
    one_line(caught)


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d", "d.bin", "d.pth", "d.npy"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path, name):
    known = r"use one of \.safetensors, \.npz, \.pt, \.gguf"
    with pytest.raises(MisdirectionError, match=known):
        export_direction(a_direction(), tmp_path / name)
    with pytest.raises(MisdirectionError, match=known):
        import_direction(tmp_path / name, model="m")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("vectors", "scale", "message"),
    [
        (torch.full((2, 2), float("inf")), 1.0, "vectors holds NaN or infinite"),
        (torch.full((2, 2), 1e38), 100.0, "vectors holds NaN or infinite"),
        (torch.ones(2, 2), 0.0, "scale 0.0: give a finite number"),
        (torch.ones(2, 2), float("nan"), "scale nan: give a finite number"),
        (torch.ones(2), 1.0, r"vectors has shape \[2\]"),
        (torch.ones(0, 2), 1.0, r"vectors has shape \[0, 2\]"),
        (torch.ones(2, 2, dtype=torch.int32), 1.0, "not a tensor of floats"),
    ],
)
def test_what_cannot_be_exported_leaves_no_file(tmp_path, suffix, vectors, scale, message):
    with pytest.raises(MisdirectionError, match=message) as caught:
        export_direction(Direction(vectors, ORIGIN), tmp_path / f"d{suffix}", scale=scale)
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [0, -3])
def test_a_number_of_layers_below_one_is_refused(tmp_path, layers):
    export_direction(a_direction(), tmp_path / "d.pt")
    with pytest.raises(MisdirectionError, match="1 or more"):
        import_direction(tmp_path / "d.pt", model="tiny-llama", layers=layers)


FULL_DISK = """
import resource, signal, sys, torch
from misdirection.errors import MisdirectionError
from misdirection.directions.direction import Direction, Origin
from misdirection.directions.formats import export_direction
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
direction = Direction(torch.ones(30, 600), Origin("k", "m", None, "", "", {}, {}, "float32"))
for path in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        export_direction(direction, path)
    except MisdirectionError as error:
        print(error)
"""


def test_a_full_disk_keeps_the_old_file(tmp_path):
    paths = [tmp_path / f"d{suffix}" for suffix in SUFFIXES]
    for path in paths:
        with atomic_output(path) as temporary:
            temporary.write_text("old")
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, paths)], capture_output=True, text=True, check=True
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == len(paths)
    assert all(str(path) in line and "cannot be written" in line for path, line in zip(paths, lines, strict=True))
    assert {path.read_text() for path in paths} == {"old"}
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / WRITTEN])


def test_numbers_of_the_machines_other_byte_order_are_read(tmp_path):
    np.savez(tmp_path / "d.npz", vectors=np.arange(6, dtype=">f4").reshape(2, 3))
    assert import_direction(tmp_path / "d.npz", model="m", layers=2).vectors.flatten().tolist() == list(range(6))


def test_warnings_go_to_the_package_logger(tmp_path, caplog):
    export_direction(a_direction(), tmp_path / "d.gguf")
    assert [(one.name, one.levelno) for one in caplog.records] == [("misdirection", logging.WARNING)]
