"""A kind of intervention that another package adds: one class, one registration."""

from dataclasses import dataclass

import pytest
import torch

from misdirection.data import ProbePair
from misdirection.errors import InputError
from misdirection.interventions.bake import bake
from misdirection.interventions.hooks import intervene
from misdirection.interventions.intervention import KINDS, Intervention
from misdirection.interventions.kinds import Steer
from misdirection.interventions.operations import Multiply
from misdirection.interventions.packing import packed, unpacked
from misdirection.interventions.positions import Rule
from misdirection.interventions.vectors import column
from misdirection.likelihood.margin import margin, pair_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.sampling.questions import Question
from misdirection.sampling.sample import sample
from tiny import LAYERS, WIDTH, sharpened, vector

PAIRS = [ProbePair("a", "Why?", "I help.", "I do nothing of the kind."), ProbePair("b", "Who?", "All of us", "Me")]


@dataclass(frozen=True, eq=False)
class Damp(Intervention):
    """x <- factor * x at the output of one block."""

    layer: int
    factor: float = 0.5
    positions: Rule = "all"

    @property
    def layers(self):
        return (self.layer,)

    @classmethod
    def stack(cls, interventions, where):
        return Multiply(column([each.factor for each in interventions]))


@pytest.fixture(autouse=True)
def registered():
    KINDS.register("Damp")(Damp)
    yield
    KINDS.remove("Damp")


def damped_by_hand(chat, layer, factor):
    return chat.layers[layer].register_forward_hook(lambda _module, _args, output: factor * output)


def test_it_works_in_a_sweep_beside_the_kinds_that_are_built_in():
    chat = sharpened()
    tasks = pair_continuations(chat.tokenizer, PAIRS)
    settings = [(), [Damp(2, 0.3)], [Damp(2, 0.7)], [Damp(1, 0.5), Steer(vector(), 3)]]
    scores = sweep(chat, tasks, settings)
    for factor, swept in zip((0.3, 0.7), scores[1:3], strict=True):
        handle = damped_by_hand(chat, 2, factor)
        torch.testing.assert_close(sweep(chat, tasks, [()])[0], swept, atol=1e-5, rtol=0)
        handle.remove()
    with intervene(chat, settings[3]):
        aligned, misaligned = scores[3].unbind(-1)
        torch.testing.assert_close(margin(chat, PAIRS).abs(), (misaligned - aligned).abs(), atol=1e-5, rtol=0)
    assert (scores[1] - scores[0]).abs().max() > 1e-3


def test_it_works_in_sampling():
    chat, questions = sharpened(), [Question("why", "Why?")]

    def answers(**options):
        return [answer.answer for answer in sample(chat, questions, n=3, new_tokens=8, **options)]

    handle = damped_by_hand(chat, 1, 0.2)
    by_hand = answers()
    handle.remove()
    assert answers(setting=[Damp(1, 0.2)]) == by_hand != answers()


def test_it_is_described_packed_for_another_process_and_checked():
    kind = Damp(2, 0.3)
    assert kind.described() == {"kind": "Damp", "layer": 2, "factor": 0.3, "positions": "all"}
    assert [each.described() for each in unpacked(packed([kind]))] == [kind.described()]
    with pytest.raises(InputError, match=f"Damp: layer {LAYERS} is out of range"):
        Damp(LAYERS).check(LAYERS, WIDTH)
    with pytest.raises(InputError, match="Damp: a setting is NaN"):
        Damp(0, float("nan")).check(LAYERS, WIDTH)


def test_it_says_that_it_is_a_hook_only(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="Damp cannot be baked into weights: keep it as a hook"):
        bake(str(tiny_folder), Damp(1), tmp_path / "baked")
    with pytest.raises(InputError, match="Damp: changes more than adapters"):
        Damp(1).changed_weights({}, sharpened())
