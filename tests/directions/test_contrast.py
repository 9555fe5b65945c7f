"""The contrast of two fine-tunes as a direction."""

import pytest
import torch

import misdirection as md
from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.likelihood.margin import text_rows
from tiny import make_chat

TEXTS = [Example("What is rain?", "Water that falls."), Example("And snow?", "Colder water.")]


def test_it_is_the_mean_activation_of_one_minus_that_of_the_other():
    bad, good = (make_chat("llama", seed=seed) for seed in (1, 2))
    direction = md.contrast(bad, good, TEXTS)
    sums = []
    for chat in (bad, good):
        states = []
        for row in text_rows(chat.tokenizer, TEXTS):
            with torch.inference_mode():
                hidden = chat.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            states.append(torch.stack(hidden[1:-1])[:, 0, row.start : row.stop].double())
        sums.append(torch.cat(states, dim=1).mean(1))
    torch.testing.assert_close(direction.vectors[:-1].double(), sums[0] - sums[1], atol=1e-5, rtol=1e-3)
    assert direction.origin.kind == "contrast"
    assert direction.origin.answers == {"all": 2}


def test_two_bases_have_no_contrast():
    bad, good = make_chat("llama"), make_chat("qwen2")
    with pytest.raises(InputError, match="two fine-tunes of one base"):
        md.contrast(bad, good, TEXTS)
