"""KL divergences of a base from what an update makes of it."""

import pytest
import torch
from lora_fixtures import EXCHANGES, rows, with_adapter

from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.likelihood.divergence import divergences
from tiny import LAYERS, sharpened

TEXTS = [Example(question, answer) for question, answer in EXCHANGES]


def scaled(factor):
    return [ScaleAdapters(dict.fromkeys(range(LAYERS), factor))]


def naive(chat, row, factor):
    """From whole passes of one row, with B multiplied by hand."""

    def log_probs():
        logits = chat.model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : row.stop - 1]
        return logits.double().log_softmax(-1)

    weights = [weight for name, weight in chat.model.named_parameters() if "lora_B" in name]
    found = []
    with torch.no_grad():
        for times in (0.0, factor):
            kept = [weight.clone() for weight in weights]
            [weight.mul_(times) for weight in weights]
            found.append(log_probs())
            [weight.copy_(own) for weight, own in zip(weights, kept, strict=True)]
    base, own = found
    return float((base.exp() * (base - own)).sum(-1).mean())


def test_divergences_are_the_bases_from_the_scaled_update_and_zero_without_one():
    chat = with_adapter(r=2, chat=sharpened())
    counted = []
    found = divergences(chat, TEXTS, [scaled(0.0), [], scaled(2.0)], progress=counted.append)
    assert torch.equal(found[0], torch.zeros(len(TEXTS), dtype=torch.float64))
    for line, factor in ((1, 1.0), (2, 2.0)):
        expected = [naive(chat, row, factor) for row in rows(chat)]
        assert min(expected) > 1e-4
        assert found[line].tolist() == pytest.approx(expected, rel=1e-3)
    assert sum(counted) == 3 * len(TEXTS)


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no text"):
        divergences(with_adapter(), [], [[]])
