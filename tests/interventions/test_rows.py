"""Each row of a batch with interventions of its own: the same as each row alone, to 1e-5 in float32."""

import pytest
import torch

from misdirection.directions.extraction import mean_activations
from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene, intervene_rows
from misdirection.interventions.kinds import Ablate, Clamp, Steer
from misdirection.models.chat import encode
from tiny import ALL_ARCHITECTURES, LAYERS, make_chat, padded, run, sharpened, vector

V, W, MEAN = vector(0), vector(1, 5.0), vector(2, 3.0)
SHARED = Ablate(V)
SETTINGS = [
    [],
    [Steer(V, 1, 2.0)],
    [Steer(W, 3, -1.0)],
    [Steer(W.double(), 1, 0.5)],
    [Steer(V, 2, 4.0, keep_norm=True)],
    [Steer(V, 0, 1.5, "all")],
    [SHARED],
    [Ablate(W, (0, 3), 0.5, "all", toward=MEAN)],
    [Ablate(W, (1,), toward=MEAN)],
    [Ablate(vector(3, 1.0, 2))],
    [Ablate(vector(4, 1.0, 3), (2,), 0.7)],
    [Ablate(V, positions="all", at="writes")],
    [Ablate(W, positions="all", at="writes", strength=0.5)],
    [Clamp(V, -0.05, 0.05)],
    [Clamp(W, low=0.2, layers=(1, 2))],
    [SHARED, Steer(W, 1)],
    [Steer(W, 1), SHARED],
    [Steer(V, 1, positions="prompt"), Clamp(W, 0.0, 0.0, positions="answer")],
    [Steer(V, 1, positions="answer")],
    [Steer(W, 2, positions=torch.tensor([False, True, False, True, True]))],
    [Clamp(V, high=0.0, positions=torch.arange(99) % 3 == 0), Steer(V, 3), Ablate(W, (3,)), Steer(W, 0)],
]
TEXTS = [text for text, _ in zip(["Why is it so?", "Hi", "And then?"] * 9, SETTINGS, strict=False)]
STARTS = [3 + number % 20 for number in range(len(SETTINGS))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@torch.no_grad()
def test_rows_of_every_kind_equal_each_row_alone(architecture, side):
    chat = sharpened(architecture)
    ids, mask = padded(chat, side, TEXTS)
    _, plain = run(chat, ids, mask)
    with intervene_rows(chat, SETTINGS, answer_starts=STARTS):
        together, logits = run(chat, ids, mask)
    for number, setting in enumerate(SETTINGS):
        real = mask[number].bool()
        row, own = padded(chat, side, TEXTS[number : number + 1])
        with intervene(chat, setting, answer_starts=STARTS[number : number + 1]):
            alone, own_logits = run(chat, row, own)
        torch.testing.assert_close(together[:, number, real], alone[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[number, real], own_logits[0], atol=1e-4, rtol=1e-5)
        assert not setting or (logits - plain)[number, real].abs().max() > 1e-3


@torch.no_grad()
def test_rows_that_carry_nothing_are_left_to_the_last_bit():
    chat = sharpened()
    ids, mask = padded(chat, "left", TEXTS[:3])
    before, _ = run(chat, ids, mask)
    with intervene_rows(chat, [[], [Steer(W, 1), Ablate(V)], []]):
        after, _ = run(chat, ids, mask)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, 1], before[:, 1])


@torch.no_grad()
def test_rows_may_share_one_list():
    chat, setting = sharpened(), [Steer(W, 1), Ablate(V, at="writes")]
    ids, mask = padded(chat)
    with intervene_rows(chat, [setting, setting]):
        shared = run(chat, ids, mask)[1]
    with intervene(chat, setting):
        assert torch.equal(run(chat, ids, mask)[1], shared)


@pytest.mark.parametrize("settings", [SETTINGS[1:4], SETTINGS[1:2], [SETTINGS[1]] * 3])
def test_another_number_of_rows_is_refused(settings):
    chat = make_chat()
    ids, mask = padded(chat)
    message = f"this pass has 2 rows, but interventions or answer starts for {len(settings)}"
    with intervene_rows(chat, settings), pytest.raises(MisdirectionError, match=message):
        run(chat, ids, mask)


def test_another_number_of_answer_starts_is_refused():
    chat = make_chat()
    ids, mask = padded(chat)
    with intervene(chat, SETTINGS[1], answer_starts=[1, 2, 3]), pytest.raises(MisdirectionError, match="for 3"):
        run(chat, ids, mask)


@pytest.mark.parametrize(("setting", "message"), [([Steer(V, LAYERS)], "out of range"), ([Ablate(0 * V)], "is zero")])
def test_one_bad_row_is_refused(setting, message):
    with pytest.raises(MisdirectionError, match=message), intervene_rows(make_chat(), [[], SETTINGS[1], setting]):
        pass


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("positions", ["all", "not_first"])
def test_mean_activations_are_those_of_the_changed_model(chat, positions, budget):
    rows = [encode(chat.tokenizer, question, "So it is.") for question in ("Why?", "And when is it not so?")]
    setting = [Steer(W, 1, 1.0, positions), Ablate(V, None, 1.0, positions)]
    with intervene(chat, setting):
        found = mean_activations(chat, rows, {"all": [0, 1]}, budget=budget).vectors["all"]
        by_row = []
        for row in rows:
            with torch.no_grad():
                outputs, _ = run(chat, torch.tensor([row.ids]), torch.ones(1, len(row.ids), dtype=torch.long))
            by_row.append(outputs[:, 0, row.start : row.stop].double())
    torch.testing.assert_close(found, torch.cat(by_row, 1).mean(1), atol=1e-5, rtol=1e-5)
    assert (found @ V.double()).abs().max() < 1e-5


@pytest.mark.parametrize("kinds", [(0, 2), (1, 3)])
def test_interventions_on_different_layers_may_be_given_in_any_order(chat, kinds):
    ones = [
        Steer(vector(0, 3.0), 1),
        Ablate(vector(1), (2,)),
        Clamp(vector(2), high=0.1, layers=(3,)),
        Ablate(vector(3), (0,)),
    ]
    first, second = (ones[number] for number in kinds)
    found = []
    for order in ([first, second], [second, first]):
        with intervene(chat, order):
            found.append(run(chat, *padded(chat)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    plain = run(chat, *padded(chat))
    assert (found[0][1] - plain[1]).abs().max() > 1e-3
