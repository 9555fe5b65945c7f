"""Gradients under interventions, with and without checkpointed activations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Clamp, ScaleAdapters, Steer
from misdirection.models.chat_model import ChatModel
from tiny import ALL_ARCHITECTURES, make_chat, padded, places, residual, sharpened, vector

V, OTHER = vector(0), vector(1)
FIRST, SECOND = ("Why is it so?", "Hi"), ("Go", "And then what happened?")


def training(architecture="llama", *, adapter=False, checkpointed=None):
    """A model in training mode; `checkpointed` is None or whether the re-entrant way is taken."""
    chat = sharpened(architecture)
    if adapter:
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        chat = ChatModel(get_peft_model(chat.model, config), chat.tokenizer, "tiny", adapter="tiny")
    chat.model.train()
    if checkpointed is not None:
        chat.model.enable_input_require_grads()
        chat.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointed})
    return chat


def loss(chat, texts=FIRST, side="left"):
    ids, mask = padded(chat, side, texts)
    labels = ids.masked_fill(mask == 0, -100)
    return chat.model(
        input_ids=ids, attention_mask=mask, position_ids=places(mask), labels=labels, use_cache=False
    ).loss


def gradients(chat):
    found = {name: one.grad.clone() for name, one in chat.model.named_parameters() if one.grad is not None}
    chat.model.zero_grad()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=2e-6, rtol=1e-4, msg=lambda text, name=name: name + text
        )


def differ(one, other):
    return any(not torch.allclose(one[name], other[name], atol=1e-4, rtol=1e-2) for name in one)


INTERVENTIONS = {
    "steer": [Steer(V, 1, 3.0)],
    "steer, norm kept": [Steer(V, 1, 3.0, keep_norm=True)],
    "ablate": [Ablate(V)],
    "ablate writes": [Ablate(V, at="writes")],
    "clamp": [Clamp(V, -0.01, 0.01, (0, 2))],
    "all": [Steer(V, 1, 3.0), Ablate(OTHER, at="writes"), Clamp(V, high=0.0)],
    "adapters": [ScaleAdapters({0: -1.0, 2: 5.0}, "not_first")],
}
every_kind = pytest.mark.parametrize("name", INTERVENTIONS)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_gradients_equal_those_of_hooks_by_hand(architecture):
    chat = training(architecture)
    _, mask = padded(chat, "left", FIRST)
    later = (places(mask) > 0).unsqueeze(-1)

    def by_hand(_module, _args, output):
        x = residual(output) + 3.0 * V * later
        x = x - (x @ V).unsqueeze(-1) * 0.5 * V * later
        return (x, *output[1:]) if isinstance(output, tuple) else x

    loss(chat).backward()
    plain = gradients(chat)
    handle = chat.layers[1].register_forward_hook(by_hand)
    loss(chat).backward()
    handle.remove()
    expected = gradients(chat)
    with intervene(chat, [Steer(V, 1, 3.0), Ablate(V, (1,), 0.5)]):
        loss(chat).backward()
    assert_same(gradients(chat), expected)
    assert differ(plain, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@every_kind
def test_gradients_are_finite_and_felt(name, side):
    chat = training(adapter=True)
    loss(chat, side=side).backward()
    plain = gradients(chat)
    with intervene(chat, INTERVENTIONS[name]):
        loss(chat, side=side).backward()
    found = gradients(chat)
    assert all(torch.isfinite(one).all() for one in found.values())
    assert differ(found, plain)


@pytest.mark.parametrize("reentrant", [False, True])
@every_kind
def test_checkpointing_changes_no_gradient_also_when_passes_overlap(name, reentrant):
    """The blocks of the first pass run again after the second was noted: with its places, they would be wrong."""
    plain, checkpointed = training(adapter=True), training(adapter=True, checkpointed=reentrant)
    found = []
    for chat in (plain, checkpointed):
        runs = []
        chat.layers[2].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with intervene(chat, INTERVENTIONS[name]):
            losses = [loss(chat, FIRST), loss(chat, SECOND)]
            for one in losses:
                one.backward()
                found.append(gradients(chat))
    assert len(runs) == 4, "each pass ran twice"
    assert_same(found[2], found[0])
    assert_same(found[3], found[1])


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma3", "qwen3_moe"])
def test_checkpointing_changes_no_gradient_on_other_architectures(architecture):
    found = []
    for checkpointed in (None, False):
        chat = training(architecture, checkpointed=checkpointed)
        with intervene(chat, INTERVENTIONS["all"]):
            loss(chat).backward()
        found.append(gradients(chat))
    assert_same(found[1], found[0])


@every_kind
def test_backward_after_the_context_is_right_without_checkpointing(name):
    chat = training(adapter=True)
    with intervene(chat, INTERVENTIONS[name]):
        inside = loss(chat)
        inside.backward()
        expected = gradients(chat)
        outside = loss(chat)
    outside.backward()
    assert_same(gradients(chat), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@every_kind
def test_backward_after_the_context_is_refused_with_checkpointing(name, reentrant):
    chat = training(adapter=True, checkpointed=reentrant)
    with intervene(chat, INTERVENTIONS[name]):
        outside = loss(chat)
    with pytest.raises(MisdirectionError, match=r"backward\(\) ran after the interventions were undone"):
        outside.backward()


def test_training_goes_on_after_a_measurement_in_the_same_context():
    """What `inference_mode` makes cannot be saved for a backward pass."""
    chat, fresh = make_chat(), make_chat()
    settings = [Steer(V.double(), 1, 3.0), Ablate(V.double(), strength=0.5), Clamp(OTHER, -0.01, 0.01)]
    with intervene(fresh, settings):
        loss(fresh).backward()
    with intervene(chat, settings):
        with torch.inference_mode():
            loss(chat)
        loss(chat).backward()
    assert_same(gradients(chat), gradients(fresh))
