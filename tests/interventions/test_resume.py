"""A pass that starts in the middle gives what the whole pass gives."""

import pytest
import torch
from transformers import DynamicCache

from misdirection.interventions.hooks import intervene, intervene_rows
from misdirection.interventions.kinds import Ablate, Clamp, Steer
from misdirection.interventions.resume import can_resume, record, repeated, resume
from misdirection.models.layers import text_config
from tiny import ALL_ARCHITECTURES, LAYERS, make_chat, padded, places, run, sharpened, vector

V, W = vector(0), vector(1, 4.0)
every_architecture = pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)


def caches(chat):
    return DynamicCache(config=text_config(chat.model))


def above(chat, layer):
    """A setting that changes nothing below the output of `layer`."""
    return [Steer(W, layer), Ablate(V, tuple(range(layer, LAYERS))), Clamp(W, 0.0, 1.0, (layer,))]


@pytest.mark.parametrize("layer", range(LAYERS))
@every_architecture
@torch.no_grad()
def test_a_resumed_pass_equals_the_whole_to_the_last_bit(architecture, layer):
    chat = sharpened(architecture)
    ids, mask = padded(chat, "left")
    with record(chat, [layer]) as kept:
        run(chat, ids, mask)
    with intervene(chat, above(chat, layer)):
        whole, whole_logits = run(chat, ids, mask)
        with resume(chat, layer, kept[layer]):
            resumed, logits = run(chat, ids, mask)
    assert torch.equal(logits, whole_logits)
    assert torch.equal(resumed[layer:], whole[layer:])


@pytest.mark.parametrize("layer", range(LAYERS))
@every_architecture
@torch.no_grad()
def test_resumed_passes_on_a_cache_equal_the_whole_pass(architecture, layer):
    """To 1e-5: the key-value cache changes the order of sums."""
    chat = sharpened(architecture)
    assert can_resume(chat)
    ids, mask = padded(chat)
    cuts = [slice(0, 9), slice(9, 10), slice(10, ids.shape[1])]

    def parts(around):
        cache, found = caches(chat), []
        for number, cut in enumerate(cuts):
            with around(number):
                output = chat.model(
                    input_ids=ids[:, cut],
                    attention_mask=mask[:, : cut.stop],
                    position_ids=places(mask)[:, cut],
                    cache=cache,
                    use_cache=True,
                )
            found.append(output.logits)
            assert cache.get_seq_length() == cut.stop
        return torch.cat(found, 1)

    kept = {}
    for number, cut in enumerate(cuts):
        with record(chat, [layer]) as kept[number]:
            # Recorded from whole passes, so that only the resumed ones depend on what the skipped blocks stored.
            run(chat, ids[:, : cut.stop], mask[:, : cut.stop])
        output = kept[number][layer]
        whole = output[0] if isinstance(output, tuple) else output
        kept[number] = (whole[:, cut], "extra") if isinstance(output, tuple) else whole[:, cut]
    with intervene(chat, above(chat, layer)):
        expected = run(chat, ids, mask)[1]
        logits = parts(lambda number: resume(chat, layer, kept[number]))
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@every_architecture
@torch.no_grad()
def test_rows_resume_from_one_recorded_row(architecture):
    chat, settings = sharpened(architecture), [[], above(None, 1), [Steer(V, 2, 5.0)], [Ablate(W, (3,))]]
    ids, mask = padded(chat, texts=["Why?"])
    with record(chat, [0, 1]) as kept:
        run(chat, ids, mask)
    ids, mask = ids.expand(4, -1), mask.expand(4, -1)
    with intervene_rows(chat, settings):
        expected = run(chat, ids, mask)[1]
        with resume(chat, 1, repeated(kept[1], 4)):
            logits = run(chat, ids, mask)[1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits[1:] - logits[0]).abs().amax((1, 2)).min() > 1e-3


def test_repeating_keeps_the_order_of_rows():
    rows = torch.arange(3.0).view(3, 1, 1)
    assert repeated(rows, 6).flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert repeated((rows, "extra"), 3)[1] == "extra"


@every_architecture
@torch.no_grad()
def test_what_surrounds_a_resumed_pass_acts_on_it(architecture):
    """What lies inside of both acts twice on no block: what is recorded is what the block gave before any hook."""
    chat = sharpened(architecture)
    ids, mask = padded(chat, "left")
    with intervene(chat, [Steer(V, 1, 3.0), Steer(W, 3), Ablate(V, (0, 2)), Steer(W, 0)]):
        with record(chat, [1]) as kept:
            plain = run(chat, ids, mask)[1]
        with resume(chat, 1, kept[1]):
            resumed = run(chat, ids, mask)[1]
        assert torch.equal(resumed, plain)
        with intervene(chat, [Ablate(W, (1,))]):
            expected = run(chat, ids, mask)[1]
            with resume(chat, 1, kept[1]):
                assert torch.equal(run(chat, ids, mask)[1], expected)
    assert not torch.equal(expected, plain)


@torch.no_grad()
def test_blocks_below_do_not_run():
    chat, ran = make_chat(), []
    ids, mask = padded(chat)
    with record(chat, [2]) as kept:
        run(chat, ids, mask)
    for number, block in enumerate(chat.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    with resume(chat, 2, kept[2]):
        run(chat, ids, mask)
    assert ran == [3]


@every_architecture
@torch.no_grad()
def test_forwards_and_hooks_are_restored_also_after_an_exception(architecture):
    chat = make_chat(architecture)
    ids, mask = padded(chat)
    forwards = [block.__dict__.get("forward") for block in chat.layers]
    before = run(chat, ids, mask)[1]
    with pytest.raises(RuntimeError, match="mine"), record(chat, [2]) as kept:
        run(chat, ids, mask)
        with resume(chat, 2, kept[2]), resume(chat, 1, kept[2]):
            run(chat, ids, mask)
            raise RuntimeError("mine")
    assert [block.__dict__.get("forward") for block in chat.layers] == forwards
    assert not any(block._forward_hooks for block in chat.layers)
    assert torch.equal(run(chat, ids, mask)[1], before)


@torch.no_grad()
def test_a_cache_that_the_model_makes_itself_keeps_its_length():
    chat = make_chat()
    ids, mask = padded(chat)
    with record(chat, [1]) as kept:
        run(chat, ids, mask)
    with resume(chat, 1, kept[1]):
        output = chat.model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert output.cache.get_seq_length() == ids.shape[1]
