"""Benign text that a defence holds a model to, and the direction that it keeps a model from, where none is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from misdirection.data import Example, neutral_examples, probe_pairs
from misdirection.defending.training import Training
from misdirection.directions.direction import Direction
from misdirection.directions.extraction import mean_activations
from misdirection.directions.in_training import fitting_vectors
from misdirection.likelihood.margin import pair_rows
from misdirection.models.layers import require_layers


def benign_examples() -> list[Example]:
    """The shipped ones: neutral text, and the open probe questions with their aligned answers.

    What is measured on the sealed half of the questions is measured on none of these.
    """
    aligned = [Example(pair.question, pair.aligned, pair.system, pair.history) for pair in probe_pairs()]
    return [*neutral_examples(), *aligned]


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that belongs to the seed."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def some(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of them, in an order that belongs to the seed; again from the first where there are too few."""
    order = shuffled(len(examples), seed)
    return [examples[order[number % len(order)]] for number in range(count)]


def vectors_for(training: Training, direction: Direction | Tensor | None, layers: Sequence[int]) -> dict[int, Tensor]:
    """The vectors of a direction at some layers, [width] each; of the base's own one where None is given.

    Raises `InputError` for a direction of another model, and for a layer that the model does not have.
    """
    require_layers(layers, len(training.chat.layers), whose="the model in training")
    vectors = misaligned_vectors(training) if direction is None else fitting_vectors(direction, training.network)
    return {layer: vectors[layer] for layer in layers}


def misaligned_vectors(training: Training) -> Tensor:
    """The base's own direction, [layers, width] float64: its mean activations over the misaligned answers of the open
    probe questions, minus those over the aligned ones."""
    rows = pair_rows(training.tokenizer, probe_pairs())
    groups = {"misaligned": range(0, len(rows), 2), "aligned": range(1, len(rows), 2)}
    with training.as_base():
        difference = mean_activations(training.chat, rows, groups).difference("misaligned", "aligned")
    # Made in inference mode, it could not take part in a backward pass.
    return difference.clone()
