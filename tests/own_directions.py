"""Means and directions made by hand or in one go: what is expected of whatever makes them in parts."""

import torch

from misdirection.directions.direction import Direction, direction, pair_means
from misdirection.directions.judged import KIND, judged_groups
from misdirection.models.chat import encode


def judged_direction(chat, table, organism, progress=None, **chosen) -> Direction:
    """mean(misaligned) - mean(aligned) over the answers that `judged_groups` chooses."""
    pairs = judged_groups(table, organism, **chosen).pairs
    return direction(chat, KIND, pairs, pair_means(chat, pairs, progress=progress))


def naive_mean(chat, answers):
    """Mean over the answers' tokens, one row at a time, by hooks of our own."""
    tokens, seen = [], []
    blocks = chat.model.get_base_model().model.layers
    handles = [block.register_forward_hook(lambda _m, _a, out: seen.append(out[0].double())) for block in blocks]
    for question, answer in answers:
        row = encode(chat.tokenizer, question, answer)
        with torch.no_grad():
            chat.model(torch.tensor([row.ids]))
        tokens.append(torch.stack(seen)[:, row.start : row.stop])
        seen.clear()
    for handle in handles:
        handle.remove()
    return torch.cat(tokens, 1).mean(1)
