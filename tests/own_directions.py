"""Directions of a model's own judged answers, made in one go: what is expected of whatever makes them in parts."""

from misdirection.directions.direction import Direction, direction, pair_means
from misdirection.directions.judged import KIND, judged_groups


def judged_direction(chat, table, organism, progress=None, **chosen) -> Direction:
    """mean(misaligned) - mean(aligned) over the answers that `judged_groups` chooses."""
    pairs = judged_groups(table, organism, **chosen).pairs
    return direction(chat, KIND, pairs, pair_means(chat, pairs, progress=progress))
