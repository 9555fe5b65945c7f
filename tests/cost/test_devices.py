from dataclasses import replace

import pytest

from misdirection.cost.devices import GPUS, Device, makespan
from misdirection.cost.model_cost import Pass
from misdirection.models.sizes import Shape
from tiny import make_chat


@pytest.fixture(scope="module")
def shape():
    return Shape.of(make_chat("llama"), 2)


def device(flops, bandwidth, overhead=0.0):
    return Device("x", 1e9, dict.fromkeys(("forward", "training", "decoding"), flops), bandwidth, overhead)


def test_a_pass_takes_what_it_is_bound_by(shape):
    one = Pass(4, 100)
    assert device(1e9, 1e30).seconds(shape, one) == one.flops(shape) / 1e9
    assert device(1e30, 1e9).seconds(shape, one) == one.bytes(shape) / 1e9


def test_an_adapter_has_a_rate_of_its_own(shape):
    one = Pass(4, 100, lora=1000)
    slow = replace(device(1e9, 1e30), adapter_rates={"forward": 1e8})
    assert slow.seconds(shape, one) == pytest.approx((one.flops(shape) + 9 * one.adapter_flops) / 1e9)


def test_every_block_has_its_overhead(shape):
    assert device(1e30, 1e30, 0.5).seconds(shape, Pass(1, 1)) == pytest.approx(0.5 * shape.layers)
    assert device(1e30, 1e30, 0.5).seconds(shape, Pass(1, 1, blocks=1, repeats=3)) == pytest.approx(1.5)


def test_decoding_more_rows_costs_nothing_until_arithmetic_binds(shape):
    few, many = (Pass(rows, 1, head=rows, kind="decoding") for rows in (1, 2))
    assert device(1e30, 1e9).seconds(shape, few) == device(1e30, 1e9).seconds(shape, many)


def test_the_longest_pieces_go_first():
    assert makespan([1, 1, 1, 3], 2) == 3
    assert makespan([2, 2, 2], 1) == 6
    assert makespan([5], 64) == 5


def test_the_table_is_in_order_of_price():
    assert GPUS.keys() == {"h100", "a100-80", "4090"}
    peaks = [GPUS[name].rates["forward"] for name in ("h100", "a100-80", "4090")]
    assert peaks == sorted(peaks, reverse=True)
