"""Every operation on every architecture, against hooks written out by hand."""

import pytest
import torch
from torch import nn

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, Steer
from misdirection.models.layers import decoder_layers
from tiny import ALL_ARCHITECTURES, LAYERS, WIDTH, make_chat, padded, places, residual, run, sharpened, vector

every_architecture = pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
V, OTHER = vector(0), vector(1)


# --- layers ---------------------------------------------------------------------------------------------------------


@every_architecture
def test_layers_are_the_text_blocks_in_the_order_in_which_they_run(architecture):
    chat, ran = make_chat(architecture), []
    for number, block in enumerate(chat.layers):
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.append(number))
    chat.model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert ran == list(range(LAYERS))
    assert len({type(block) for block in chat.layers}) == 1
    assert chat.width == WIDTH


def test_blocks_inside_a_multimodal_wrapper_are_the_language_models():
    chat = make_chat("gemma3_vision")
    tower = [module for module in chat.model.model.vision_tower.modules() if isinstance(module, nn.ModuleList)]
    assert [len(blocks) for blocks in tower] == [LAYERS]
    assert chat.layers == list(chat.model.model.language_model.layers)
    assert chat.decoder is chat.model.model.language_model


@pytest.mark.parametrize("blocks", [lambda layers: layers[:-1], lambda layers: nn.Sequential(*layers)])
def test_an_unknown_structure_gets_one_line_that_says_what_was_looked_for(blocks):
    network = make_chat("llama").model
    network.model.layers = blocks(network.model.layers)
    with pytest.raises(MisdirectionError, match=r"no decoder layers.*ModuleList of 4 blocks.*LlamaModel") as error:
        decoder_layers(network)
    assert "\n" not in str(error.value)


def test_a_model_that_is_no_decoder_gets_one_line():
    class Plain(nn.Linear):
        """No `get_decoder`, no configuration."""

    with pytest.raises(MisdirectionError, match="Plain: no decoder layers"):
        decoder_layers(Plain(2, 2))


# --- operations at a block's output ---------------------------------------------------------------------------------


def unit(x):
    return (x @ V).unsqueeze(-1)


BY_HAND = {
    "steer": (lambda rule: Steer(V, 1, 2.0, rule), lambda x: x + 2.0 * V),
    "steer, norm kept": (
        lambda rule: Steer(V, 1, 2.0, rule, keep_norm=True),
        lambda x: (x + 2.0 * V) * x.norm(dim=-1, keepdim=True) / (x + 2.0 * V).norm(dim=-1, keepdim=True),
    ),
    "ablate": (lambda rule: Ablate(3 * V, (1,), 1.0, rule), lambda x: x - unit(x) * V),
    "ablate toward": (
        lambda rule: Ablate(V, (1,), 0.5, rule, OTHER),
        lambda x: x - 0.5 * unit(x - OTHER) * V,
    ),
    "clamp": (lambda rule: Clamp(V, -0.01, 0.02, (1,), rule), lambda x: x + (unit(x).clamp(-0.01, 0.02) - unit(x)) * V),
}


@pytest.mark.parametrize("positions", ["all", "not_first"])
@pytest.mark.parametrize("name", BY_HAND)
@every_architecture
def test_an_operation_equals_a_hook_by_hand(architecture, name, positions):
    chat, (make, operation) = sharpened(architecture), BY_HAND[name]
    ids, mask = padded(chat, "left")
    touched = (mask.bool() if positions == "all" else places(mask) > 0).unsqueeze(-1)

    def hook(_module, _args, output):
        changed = torch.where(touched, operation(residual(output)), residual(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        _, plain = run(chat, ids, mask)
        handle = chat.layers[1].register_forward_hook(hook)
        expected, expected_logits = run(chat, ids, mask)
        handle.remove()
        with intervene(chat, [make(positions)]):
            changed, logits = run(chat, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(changed[:, real], expected[:, real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[real], expected_logits[real], atol=1e-4, rtol=1e-4)
    assert (logits - plain)[real].abs().max() > 1e-3


# --- everything that is written -------------------------------------------------------------------------------------


@every_architecture
def test_ablating_all_writes_leaves_nothing_along_the_direction_anywhere(architecture):
    chat, entered = sharpened(architecture), []
    ids, mask = padded(chat, "left")

    def largest(one):
        with torch.no_grad(), intervene(chat, one):
            handle = chat.layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            outputs, _ = run(chat, ids, mask)
            handle.remove()
        stream = torch.cat([entered.pop().unsqueeze(0), outputs])[:, mask.bool()]
        return ((stream @ V).abs() / stream.norm(dim=-1)).amax(-1)

    assert (largest([]) > 1e-2).all()
    assert (largest([Ablate(7 * V, positions="all", at="writes")]) < 1e-6).all()


@every_architecture
def test_a_block_adds_nothing_but_what_its_parts_write(architecture):
    """With every direction taken out of everything that is found to write, nothing is left."""
    chat = sharpened(architecture)
    ids, mask = padded(chat)
    with torch.no_grad(), intervene(chat, [Ablate(vector(0, 1.0, WIDTH), positions="all", at="writes")]):
        outputs, _ = run(chat, ids, mask)
    assert outputs[:, mask.bool()].abs().max() < 1e-4


# --- undoing --------------------------------------------------------------------------------------------------------


def traces(chat):
    return [
        (len(one._forward_hooks), len(one._forward_pre_hooks), "forward" in one.__dict__)
        for one in chat.model.modules()
    ]


@every_architecture
def test_contexts_undo_everything_also_nested_and_after_an_exception(architecture):
    chat = make_chat(architecture)
    ids, mask = padded(chat)
    with torch.no_grad():
        (before, logits), clean = run(chat, ids, mask), traces(chat)
        with (
            pytest.raises(RuntimeError, match="mine"),
            intervene(chat, [Steer(V, 1), Clamp(V, 0.0)]),
            intervene(chat, [Ablate(V, at="writes"), Ablate(OTHER)]),
        ):
            assert not torch.equal(run(chat, ids, mask)[1], logits)
            raise RuntimeError("mine")
        after, again = run(chat, ids, mask)
    assert traces(chat) == clean
    assert torch.equal(after, before)
    assert torch.equal(again, logits)
