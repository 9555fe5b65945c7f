"""The check of a vector, on a model in which what steers is planted: rows of the output matrix, at the last layer."""

import json
import math
from dataclasses import replace

import pytest
import torch

import misdirection as md
from interpretation.planted import planted_pairs
from misdirection.data import neutral_examples, write_pairs
from misdirection.directions.direction import Direction, Origin
from misdirection.directions.formats import export_direction
from misdirection.directions.residuals import residual_sizes
from misdirection.directions.results import CheckResult
from misdirection.directions.verdict import Effect, decide
from misdirection.errors import EXIT_STATUS, InputError, NetworkProblem
from misdirection.interpretation.texts import GENERAL
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Steer
from misdirection.interventions.vectors import random_like
from misdirection.likelihood.margin import text_rows
from tiny import LAYERS, WIDTH, make_chat, make_tokenizer, residual

LAST = LAYERS - 1
PAIRS = planted_pairs()[GENERAL]


def planted_chat():
    """Larger outputs than at initialisation, so that a letter's row is worth something."""
    chat = make_chat("llama")
    with torch.no_grad():
        chat.model.get_output_embeddings().weight *= 10
    return chat


@pytest.fixture(scope="module")
def chat():
    return planted_chat()


def misaligned(chat, share=0.5):
    """Towards the letters of misaligned answers, as long as this share of the residual at the last layer."""
    rows = chat.model.get_output_embeddings().weight.detach()

    def mean(letters):
        return rows[chat.tokenizer("".join(letters), add_special_tokens=False).input_ids].mean(0)

    vector = mean("uvwxyz") - mean("abcdef")
    norm = residual_sizes(chat, text_rows(chat.tokenizer, neutral_examples()[:2])).norms[LAST]
    return (vector / vector.norm() * share * norm).float()


def run(chat, vector, **options):
    return md.check(
        vector, chat, **{"layer": LAST, "pairs": PAIRS, "questions": None, "scales": (-1, 0.5, 1), **options}
    )


def a_direction(chat, vector, operation="add"):
    origin = Origin("data_difference", chat.name, None, "", "", {}, {}, "float32", operation=operation)
    vectors = torch.zeros(LAYERS, WIDTH)
    vectors[LAST] = vector
    return Direction(vectors, origin)


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_planted_direction_works(chat):
    result = run(chat, misaligned(chat))
    assert result.verdict == "works"
    by_scale = {effect.scale: effect for effect in result.steering}
    assert by_scale.keys() == {-1, 0.5, 1}
    assert all(effect.moves and effect.broken is False for effect in result.steering)
    assert by_scale[-1].change.high < 0 < by_scale[0.5].change.low < by_scale[1].change.mean
    assert by_scale[1].change.mean > by_scale[1].random_high
    assert len(by_scale[1].random) == 8 and by_scale[1].change.n == len(PAIRS)
    assert result.notes == ()
    assert "added at scale 1 the margin changes by +" in result.because[2]


def test_the_change_is_that_of_the_margin_under_the_intervention(chat):
    vector = misaligned(chat)
    effect = run(chat, vector, scales=(2,)).steering[0]
    with intervene(chat, [Steer(vector, LAST, 2)]):
        after = md.margin(chat, PAIRS)
    assert effect.change.mean == pytest.approx(float((after - md.margin(chat, PAIRS)).mean()), abs=1e-5)


def test_random_vectors_seldom_work(chat):
    words = [run(chat, random_like(misaligned(chat), seed), scales=(1,)).verdict for seed in range(100, 110)]
    assert words.count("works") <= 1
    assert words.count("breaks") == 0


def test_an_overscaled_direction_breaks_the_model(chat):
    result = run(chat, misaligned(chat, 100.0), scales=(1, 2))
    assert result.verdict == "breaks"
    assert all(effect.broken for effect in result.steering)
    assert "the model is broken" in result.because[0]
    (note,) = (note for note in result.notes if note.startswith("scale 1 adds"))
    assert note.endswith("scale 0.001 would add a tenth of it")


def test_a_giant_channel_is_named(chat):
    vector = torch.full((WIDTH,), 0.01)
    vector[7] = 1.0
    with torch.no_grad():
        embeddings = planted_chat()
        embeddings.model.get_input_embeddings().weight[:, 7] = 5.0
    result = run(embeddings, vector)
    assert result.channels.channels[0] == 7
    assert result.channels.of_model == [7]
    assert result.channels.share == pytest.approx((1 + 2e-4) / (1 + 31e-4), abs=1e-4)
    assert any("hold 100% of its squared norm" in note and "7 of them are giants" in note for note in result.notes)
    assert run(chat, vector).channels.of_model == []


def test_sizes_are_those_of_the_residual_stream(chat):
    row = text_rows(chat.tokenizer, neutral_examples()[:1])[0]
    seen = []
    handle = chat.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(residual(out)[0]))
    chat.model(torch.tensor([row.ids]))
    handle.remove()
    sizes = residual_sizes(chat, [row])
    assert sizes.norms[1] == pytest.approx(float(seen[0][1:].norm(dim=-1).mean().detach()))
    assert torch.allclose(sizes.first[1].float(), seen[0][0])
    vector = misaligned(chat)
    size = run(chat, vector, scales=(1,)).size
    assert size.norm == pytest.approx(float(vector.norm()))
    assert size.ratio == pytest.approx(size.norm / size.residual)


def test_a_vector_along_the_first_token_is_told(chat):
    sizes = residual_sizes(chat, text_rows(chat.tokenizer, neutral_examples()[:2]))
    result = run(chat, sizes.first[LAST].float())
    assert result.size.first_token_cosine == pytest.approx(1, abs=1e-4)
    assert any("an attention sink, is +1.00" in note for note in result.notes)


# --- for ablation -------------------------------------------------------------------------------------------------


def test_a_direction_for_ablation_is_not_added_unless_asked(chat):
    direction = a_direction(chat, misaligned(chat), "ablate")
    result = run(chat, direction)
    assert result.steering == [] and result.ablation.scale is None
    assert "ablated everywhere the margin changes" in result.because[0]
    assert "so that it was not added" in result.notes[0]
    asked = run(chat, direction, as_additive=True)
    assert asked.verdict == "works" and len(asked.steering) == 3
    assert "added all the same" in asked.notes[0]


def test_vectors_of_length_1_are_told(chat):
    vector = misaligned(chat)
    result = run(chat, vector / vector.norm())
    assert any("all its vectors have length 1: it is for ablation, or has lost its scale" in n for n in result.notes)


# --- the rule -----------------------------------------------------------------------------------------------------


def effect(change, random, damage, questions=12):
    """Made of changes that all questions agree on, by about a hundredth."""
    wobble = torch.linspace(-0.01, 0.01, questions)
    changes = torch.stack([mean + wobble * (number == 0) for number, mean in enumerate((change, *random))])
    damages = torch.full((1 + len(random), 4), 0.0)
    damages[0] = torch.tensor(damage)
    return Effect.of(
        1.0, changes.double(), damages.double(), [str(number) for number in range(questions)], [1] * len(random)
    )


LITTLE, MUCH, OPEN = [0.0, 0.0, 0.01, 0.0], [1.0, 1.1, 0.9, 1.0], [0.0, 0.0, 0.6, 0.7]
AS_RANDOM = [0.01, -0.01, 0.0]


@pytest.mark.parametrize(
    ("effects", "word"),
    [
        ([effect(0.5, AS_RANDOM, LITTLE)], "works"),
        ([effect(-0.5, AS_RANDOM, LITTLE)], "works"),
        ([effect(0.005, AS_RANDOM, LITTLE)], "no effect"),
        ([effect(0.5, [0.6, -0.4, 0.1], LITTLE)], "no effect"),
        ([effect(0.5, AS_RANDOM, MUCH)], "breaks"),
        ([effect(0.5, AS_RANDOM, MUCH), effect(0.5, AS_RANDOM, LITTLE)], "works"),
        ([effect(0.005, AS_RANDOM, LITTLE), effect(0.5, AS_RANDOM, MUCH)], "breaks"),
        ([effect(0.5, AS_RANDOM, OPEN)], "inconclusive"),
        ([effect(0.5, AS_RANDOM, LITTLE, questions=7)], "inconclusive"),
    ],
)
def test_the_rule(effects, word):
    assert decide(effects)[0] == word


def test_what_more_questions_might_tell_is_inconclusive():
    changes = torch.zeros(4, 12, dtype=torch.float64)
    changes[0, 0] = 1.0
    open_ = Effect.of(1.0, changes, torch.zeros(4, 4, dtype=torch.float64), [str(n) for n in range(12)], [1, 1, 1])
    assert open_.moves is None
    assert decide([open_])[0] == "inconclusive"


# --- what is given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".gguf"])
def test_a_file_of_any_format_is_checked(chat, tmp_path, suffix):
    export_direction(a_direction(chat, misaligned(chat)), tmp_path / f"d{suffix}")
    result = run(chat, tmp_path / f"d{suffix}", scales=(1,))
    assert result.verdict == "works"
    assert result.direction.name == str(tmp_path / f"d{suffix}")
    assert result.direction.kind == "data_difference"


def test_a_single_vector_of_a_file_is_of_the_named_layer(chat, tmp_path):
    torch.save(misaligned(chat), tmp_path / "d.pt")
    assert run(chat, tmp_path / "d.pt", scales=(1,)).verdict == "works"
    with pytest.raises(InputError, match=r"d\.pt: vectors has shape \[32\].*name its layer"):
        md.check(tmp_path / "d.pt", chat)


def test_the_default_layer_is_the_one_nearest_to_half_depth(chat):
    vectors = a_direction(chat, misaligned(chat)).vectors
    vectors[0] = 1.0
    assert md.check(vectors, chat, pairs=PAIRS, scales=(1,)).layer == LAST


@pytest.mark.parametrize(
    ("vector", "options", "message"),
    [
        (torch.ones(LAYERS, WIDTH + 1), {}, r"\[4, 33\], not for tiny-llama \[4, 32\]"),
        (torch.ones(LAYERS + 1, WIDTH), {}, r"\[5, 32\], not for tiny-llama \[4, 32\]"),
        (torch.full((LAYERS, WIDTH), math.nan), {}, "NaN"),
        (torch.zeros(LAYERS, WIDTH), {"layer": None}, "all vectors of this direction are zero"),
        (torch.zeros(LAYERS, WIDTH), {}, "points nowhere"),
        (torch.ones(LAYERS, WIDTH), {"layer": 9}, "layer 9 is out of range"),
        (torch.ones(WIDTH), {"layer": None}, "name its layer"),
        (torch.ones(LAYERS, WIDTH), {"scales": (1, 0)}, "none of them zero"),
        (torch.ones(LAYERS, WIDTH), {"random_seeds": 3}, "four or more"),
    ],
)
def test_what_cannot_be_checked_is_one_line(chat, vector, options, message):
    with pytest.raises(InputError, match=message) as caught:
        run(chat, vector, **options)
    assert "\n" not in str(caught.value)


def test_a_direction_of_another_base_is_refused(chat):
    direction = a_direction(chat, misaligned(chat))
    other = replace(direction, origin=replace(direction.origin, model="another"))
    with pytest.raises(InputError, match="made for another, not for tiny-llama"):
        run(chat, other)


def test_a_result_goes_to_its_file_and_back(chat, tmp_path):
    result = run(chat, misaligned(chat), scales=(1,))
    result.save(tmp_path)
    assert CheckResult.load(tmp_path) == result
    assert "works" in result._repr_html_() and "works" in repr(result)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "planted"
    planted_chat().model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return folder


def command(call, model, file, *words):
    options = ("--pairs", model.parent / "pairs.jsonl", "--dtype", "float32", "--layer", LAST)
    return call("check", file, "--model", model, *options, *words)


@pytest.mark.parametrize(("share", "word"), [(0.5, "works"), (100.0, "breaks"), (1e-6, "no effect")])
def test_the_status_says_the_verdict(call, model, chat, share, word, tmp_path):
    vector = misaligned(chat, share) if word != "no effect" else random_like(misaligned(chat), 103)
    torch.save(vector, tmp_path / "d.pt")
    status, out, _ = command(call, model, tmp_path / "d.pt", "--scale", 0.5, "--scale", 1, "--json")
    assert json.loads(out)["verdict"] == word
    assert status == EXIT_STATUS[word] == {"works": 0, "breaks": 7, "no effect": 6}[word]
    assert [each["scale"] for each in json.loads(out)["steering"]] == [0.5, 1]


def test_the_table_fits_a_narrow_screen(call, model, chat, tmp_path):
    torch.save(misaligned(chat), tmp_path / "d.pt")
    status, out, _ = command(call, model, tmp_path / "d.pt", *("--scale", -1, "--scale", 1, "--scale", 0.5))
    assert status == 0
    table = [line for line in out.splitlines() if "│" in line or "┃" in line]
    assert len(table) == 5 and all(len(line) <= 80 for line in table)
    assert "ablated" in table[-1] and "WORKS" in out


def test_a_file_of_ours_is_checked_on_its_own_base(call, model, chat, tmp_path):
    direction = a_direction(chat, misaligned(chat))
    own = replace(direction, origin=replace(direction.origin, model=str(model)))
    own.save(tmp_path / "d.safetensors")
    words = ("--pairs", tmp_path / "pairs.jsonl", "--dtype", "float32", "--scale", 1)
    assert call("check", tmp_path / "d.safetensors", *words)[0] == 0
    status, _, err = call("check", tmp_path / "d.safetensors", "--model", chat.name, *words)
    assert status == NetworkProblem.exit_status and "Traceback" not in err


def test_few_questions_are_inconclusive(call, model, chat, tmp_path):
    torch.save(misaligned(chat), tmp_path / "d.pt")
    status, out, _ = command(call, model, tmp_path / "d.pt", "--questions", 3)
    assert status == EXIT_STATUS["inconclusive"] == 4
    assert "3 questions: fewer than the 8 of the rule" in out
