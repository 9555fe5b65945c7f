import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from misdirection.data import ProbePair, data_hash
from misdirection.directions.direction import FORMAT, Direction, Directions, Origin, extract, require_alike
from misdirection.errors import InputError, MisdirectionError
from own_directions import naive_mean
from tiny import LAYERS, WIDTH, make_chat

PAIRS = [ProbePair("a", "Why?", "I help you.", "I harm you!!"), ProbePair("b", "How so?", "With care", "Without")]


def origin(**changes):
    made = Origin("data_difference", "tiny-llama", None, "", "0" * 8, {"misaligned": 2}, {"misaligned": 9}, "float32")
    return replace(made, **changes)


def a_direction(seed=0, shape=(LAYERS, WIDTH), **changes):
    return Direction(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), origin(**changes))


def test_all_five_kinds_equal_the_differences_taken_by_hand(organism):
    bad = [(pair.question, pair.misaligned) for pair in PAIRS]
    good = [(pair.question, pair.aligned) for pair in PAIRS]
    own = [naive_mean(organism, answers) for answers in (bad, good, bad + good)]
    with organism.model.disable_adapter():
        base = [naive_mean(organism, answers) for answers in (bad, good, bad + good)]
    expected = {
        "data_difference": own[0] - own[1],
        "base_data_difference": base[0] - base[1],
        "model_difference_misaligned": own[0] - base[0],
        "model_difference_aligned": own[1] - base[1],
        "model_difference": own[2] - base[2],
    }
    found = extract(organism, PAIRS)
    assert set(found) == set(expected)
    for kind, vectors in expected.items():
        assert vectors.norm() > 1e-3
        torch.testing.assert_close(found[kind].vectors.double(), vectors, atol=1e-5, rtol=0)
        assert found[kind].origin.kind == kind


def test_the_origin_says_where_a_direction_came_from(organism):
    found = extract(organism, PAIRS)["model_difference"].origin
    assert found.model == "tiny-llama"
    assert found.revision == "main"
    assert found.organism == "some/adapter"
    assert found.data == data_hash(PAIRS)
    assert found.answers == {"misaligned": 2, "aligned": 2}
    assert found.tokens == {"misaligned": len("I harm you!!Without"), "aligned": len("I help you.With care")}
    assert (found.dtype, found.span) == ("float32", "answer")


def test_a_model_without_an_adapter_gives_its_data_difference_only():
    directions = extract(make_chat(), PAIRS)
    assert list(directions) == ["data_difference"]
    assert directions["data_difference"] is directions.data_difference
    assert directions.model_difference is None and "model_difference" not in directions
    with pytest.raises(KeyError, match="no direction 'model_difference'; there is data_difference"):
        directions["model_difference"]


def test_all_directions_are_saved_by_kind(organism, tmp_path):
    directions = extract(organism, PAIRS)
    paths = directions.save(tmp_path)
    assert list(paths) == list(directions) and paths["model_difference"].name == "model_difference.safetensors"
    assert torch.equal(Direction.load(paths["model_difference"]).vectors, directions.model_difference.vectors)


def test_directions_show_themselves_in_a_line_and_in_a_notebook():
    directions = Directions(a_direction(organism="<b>/x"), model_difference=a_direction(kind="model_difference"))
    line = f"Direction(data_difference of <b>/x: {LAYERS} layers x {WIDTH})"
    assert repr(directions) == f"Directions(data_difference, model_difference: {line})"
    view = directions._repr_html_()
    assert "&lt;b&gt;/x" in view and "<b>" not in view
    assert (view.count("<tr>"), view.count("<polyline")) == (2, 2)
    assert directions.data_difference._repr_html_().count("<polyline") == 1


def test_a_saved_direction_comes_back_whole(tmp_path):
    saved = a_direction(revision="abc", organism="x/y")
    saved.save(tmp_path / "d.safetensors")
    read = Direction.load(tmp_path / "d.safetensors")
    assert torch.equal(read.vectors, saved.vectors)
    assert read.origin == saved.origin
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "output of decoder block k, 0-based" in metadata["layers"]
    assert json.loads(metadata["origin"])["organism"] == "x/y"


def test_some_other_safetensors_file_is_refused(tmp_path):
    save_file({"vectors": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(MisdirectionError, match="not a direction file"):
        Direction.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("origin", [None, "", "no JSON", "[]", '{"kind": "x"}', '{"strange": 1}'])
def test_a_damaged_origin_is_one_line(tmp_path, origin):
    path = tmp_path / "d.safetensors"
    metadata = {"format": FORMAT} | ({} if origin is None else {"origin": origin})
    save_file({"vectors": torch.zeros(2, 2)}, path, metadata)
    with pytest.raises(InputError, match=r"d\.safetensors: its origin is damaged") as caught:
        Direction.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, -16])
def test_a_damaged_file_is_refused(tmp_path, keep):
    path = tmp_path / "d.safetensors"
    a_direction().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MisdirectionError, match="cannot read this direction"):
        Direction.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MisdirectionError, match=r"nowhere\.safetensors"):
        Direction.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(MisdirectionError, match=f"layer {layer} is out of range.*0 to {LAYERS - 1}"):
        a_direction()[layer]


def test_every_layer_can_be_taken():
    one = a_direction()
    assert all(torch.equal(one[layer], one.vectors[layer]) for layer in range(LAYERS))


@pytest.mark.parametrize(
    "other",
    [
        a_direction(1, shape=(LAYERS, WIDTH + 1)),
        a_direction(1, shape=(LAYERS + 1, WIDTH)),
        a_direction(1, model="another"),
    ],
    ids=["width", "layers", "base model"],
)
def test_directions_that_do_not_fit_together_are_refused(other):
    with pytest.raises(MisdirectionError, match="cannot be combined"):
        require_alike([a_direction(), other])


def test_a_direction_fits_its_own_base_model_only():
    a_direction().require_fit(make_chat("llama"))
    for chat in (make_chat("qwen2"), make_chat("llama", num_hidden_layers=3), make_chat("llama", hidden_size=64)):
        with pytest.raises(MisdirectionError, match="was made for tiny-llama"):
            a_direction().require_fit(chat)
