"""Parts of a change by component, against the change itself."""

import pytest
import torch
from lora_fixtures import with_adapter
from peft import IA3Config, LoraConfig, get_peft_model

from misdirection.auditing.attribution import adapted_layers, by_layer, is_attributed, margin_parts
from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.likelihood.margin import margin
from misdirection.models.budgets import BUDGETS
from tiny import make_chat

PAIRS = [ProbePair(f"p{n}", "Why?" * (n + 1), "Because.", "No, " + "never " * n) for n in range(3)]


def weak(**options):
    """Small enough that the way from base to fine-tune is nearly quadratic."""
    return with_adapter(**{"strength": 0.02} | options)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_parts_add_up_to_the_shift_of_each_pair(rank):
    chat = weak(r=rank, target_modules="all-linear", strength=0.002)
    parts = margin_parts(chat, PAIRS)
    shift = margin(chat, PAIRS)
    with chat.as_base():
        shift = shift - margin(chat, PAIRS)
    assert shift.abs().min() > 1e-5
    total = torch.stack(list(parts.values())).sum(0)
    torch.testing.assert_close(total, shift, atol=0, rtol=0.05)
    assert {part.shape for part in parts.values()} == {(3,)}


def test_a_module_that_adds_nothing_has_no_part_and_each_row_its_own(monkeypatch):
    chat = weak()
    with torch.no_grad():
        chat.layers[1].mlp.down_proj.lora_B["default"].weight.zero_()
    parts = by_layer(chat, margin_parts(chat, PAIRS))
    assert list(parts) == [0, 2, 3]
    monkeypatch.setitem(BUDGETS, "backward", 1)
    alone = by_layer(chat, margin_parts(chat, PAIRS))
    for layer, part in parts.items():
        torch.testing.assert_close(part, alone[layer], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(target_modules=["q_proj"], init_lora_weights=False), True),
        (LoraConfig(target_modules=["q_proj"]), False),
        (LoraConfig(target_modules=["lm_head"], init_lora_weights=False), False),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True), False),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), False),
    ],
)
def test_what_is_no_lora_that_adds_something_in_the_blocks_has_no_parts(config, expected, tmp_path):
    get_peft_model(make_chat().model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    assert is_attributed(tmp_path) == expected


def test_progress_counts_answers():
    done = []
    margin_parts(weak(), PAIRS, done.append)
    assert sum(done) == 2 * len(PAIRS)


def test_a_model_without_an_adapter_in_its_blocks_is_refused():
    with pytest.raises(InputError):
        adapted_layers(make_chat())
