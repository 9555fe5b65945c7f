import pytest
import torch

from misdirection.data import ProbePair
from misdirection.directions.convergence import (
    SHUFFLES,
    compare,
    compare_tensors,
    cosines,
    null_groups,
    project_away,
    shuffled,
    split_half,
)
from misdirection.directions.direction import Direction, Origin, pair_means
from misdirection.directions.extraction import Means
from misdirection.errors import MisdirectionError
from tiny import LAYERS, WIDTH, make_chat

E1, E2 = torch.eye(WIDTH)[:2]


def layers(*vectors):
    return torch.stack(vectors)


def means(**differences):
    """Means whose `name/misaligned` minus `name/aligned` (or the classes themselves) is the given tensor."""
    vectors = {}
    for name, difference in differences.items():
        prefix = "" if name == "true" else f"{name}/"
        vectors |= {f"{prefix}misaligned": difference + 5, f"{prefix}aligned": torch.full_like(difference, 5)}
    return Means(vectors, {}, {})


def test_cosines_are_signed_and_by_layer():
    first, second = layers(E1, E1, E1, 2 * E1), layers(3 * E1, -E1, E2, E1 + E2)
    assert cosines(first, second) == pytest.approx([1, -1, 0, 0.5**0.5])


def test_comparison_holds_every_pair_and_is_symmetric():
    table = compare_tensors({"a": layers(E1), "b": layers(E1 + E2), "c": layers(-E1)})
    assert {name: set(row) for name, row in table.items()} == {name: set("abc") for name in "abc"}
    assert table["a"]["c"] == [-1]
    assert table["a"]["b"] == table["b"]["a"] == pytest.approx([0.5**0.5])


def test_directions_of_other_base_models_are_not_compared():
    def made(model):
        return Direction(torch.ones(LAYERS, WIDTH), Origin("data_difference", model, None, "", "", {}, {}, "float32"))

    assert compare({"a": made("x"), "b": made("x")})["a"]["b"] == pytest.approx([1.0] * LAYERS)
    with pytest.raises(MisdirectionError):
        compare({"a": made("x"), "b": made("y")})


def test_projecting_away_leaves_only_what_is_orthogonal():
    torch.manual_seed(0)
    vectors, other = torch.randn(2, LAYERS, WIDTH)
    left = project_away(vectors, 9 * other)
    assert (left * other).sum(-1).abs().max() < 1e-6
    along = vectors.double() - left
    assert cosines(along, other) == pytest.approx([1 if c > 0 else -1 for c in cosines(vectors, other)])
    torch.testing.assert_close(project_away(left, other), left)


@pytest.mark.parametrize("pairs", [2, 9, 40])
def test_the_two_halves_share_no_question_and_cover_all(pairs):
    groups = null_groups(pairs)
    questions = []
    for half in ("half_0", "half_1"):
        misaligned, aligned = groups[f"{half}/misaligned"], groups[f"{half}/aligned"]
        assert aligned == [pairs + row for row in misaligned]
        assert sorted(groups[f"{half}/all"]) == sorted(misaligned + aligned)
        questions += misaligned
    assert sorted(questions) == list(range(pairs))
    assert abs(len(groups["half_0/misaligned"]) - len(groups["half_1/misaligned"])) <= 1


@pytest.mark.parametrize("pairs", [2, 9, 40])
def test_each_shuffled_class_has_one_answer_per_question(pairs):
    groups = null_groups(pairs)
    for shuffle in range(SHUFFLES):
        classes = [groups[f"shuffled_{shuffle}/{name}"] for name in ("misaligned", "aligned")]
        for members in classes:
            assert sorted(row % pairs for row in members) == list(range(pairs))
        assert sorted(classes[0] + classes[1]) == list(range(2 * pairs))
        assert sum(row >= pairs for row in classes[0]) == pairs // 2


def test_shuffles_differ_from_one_another_and_repeat_from_run_to_run():
    groups = null_groups(40)
    assert len({tuple(groups[f"shuffled_{i}/misaligned"]) for i in range(SHUFFLES)}) == SHUFFLES
    assert groups == null_groups(40)


def test_split_half_is_the_cosine_of_the_two_halves():
    given = means(half_0=layers(E1, E1, E1), half_1=layers(2 * E1, E2, -E1))
    assert split_half(given) == pytest.approx([1, 0, -1])


def test_shuffled_is_the_mean_absolute_cosine():
    turns = {
        f"shuffled_{i}": layers(E1 if i % 2 else -E1, E2, E1 if i < SHUFFLES // 2 else E2) for i in range(SHUFFLES)
    }
    assert shuffled(means(true=layers(E1, E1, E1), **turns)) == pytest.approx([1, 0, 0.5])


def test_the_references_can_be_taken_from_a_models_own_means():
    """A random model that reads the same difference in every pair: halves agree, shuffles do not."""
    chat = make_chat()
    pairs = [ProbePair(str(i), f"Question {i}?", "aaaaaaaa" + "bc" * i, "zzzzzzzz" + "bc" * i) for i in range(8)]
    given = pair_means(chat, pairs, null_groups(len(pairs)))
    assert min(split_half(given)) > 0.8
    assert max(shuffled(given)) < min(split_half(given))
