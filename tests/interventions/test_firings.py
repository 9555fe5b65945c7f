"""An intervention that does not act is noticed: compiled models, merged adapters, layers that do not run."""

import copy
import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from misdirection.directions.extraction import mean_activations
from misdirection.errors import InputError
from misdirection.interventions.hooks import ablate, intervene, steer
from misdirection.interventions.kinds import Ablate, ProjectAdapters, ScaleAdapters, Steer
from misdirection.likelihood.sweep import Continuations, sweep
from misdirection.models.chat import encode
from misdirection.sampling.sample import sample
from tiny import make_chat, make_network, sharpened, vector

# No code is generated, but what is compiled is kept and taken again, as with any backend.
EAGER = {"backend": "eager"}


def compiled_model(chat):
    return dataclasses.replace(chat, model=torch.compile(chat.model, **EAGER))


def compiled_in_place(chat):
    chat.model.compile(**EAGER)
    return chat


def compiled_forward(chat):
    chat.model.forward = torch.compile(chat.model.forward, **EAGER)
    return chat


def compiled_decoder(chat):
    chat.model.model = torch.compile(chat.model.model, **EAGER)
    return chat


def compiled_decoders_forward(chat):
    chat.decoder.forward = torch.compile(chat.decoder.forward, **EAGER)
    return chat


def compiled_blocks(chat):
    for block in chat.layers:
        block.compile(**EAGER)
    return chat


COMPILED = [
    compiled_model,
    compiled_in_place,
    compiled_forward,
    compiled_decoder,
    compiled_decoders_forward,
    compiled_blocks,
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@torch.no_grad()
def logits(chat, model=None):
    return (chat.model if model is None else model)(input_ids=IDS, attention_mask=MASK).logits.clone()


def small():
    """A chat of two layers, which are soon compiled."""
    return make_chat("llama", num_hidden_layers=2)


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_is_changed_like_any_other_and_is_plain_again_afterwards(compiled):
    plain_chat, v = small(), [Steer(vector(norm=20), 0), Ablate(vector(1), at="writes")]
    plain = logits(plain_chat)
    with intervene(plain_chat, v):
        changed = logits(plain_chat)
    assert (changed - plain).abs().max() > 0.1
    chat = compiled(small())
    for _ in range(2):
        close(logits(chat), plain)
        with intervene(chat, v):
            close(logits(chat), changed)
    close(logits(chat), plain)


def test_a_compiled_model_beside_the_chat_and_a_compiled_helper_are_changed_too():
    chat = small()
    beside = torch.compile(chat.model, **EAGER)
    helper = torch.compile(lambda: logits(chat), **EAGER)
    plain = logits(chat)
    close(logits(chat, beside), plain)
    close(helper(), plain)
    with steer(chat, vector(norm=20), 0):
        changed = logits(chat)
        close(logits(chat, beside), changed)
        close(helper(), changed)
    assert (changed - plain).abs().max() > 0.1
    close(logits(chat, beside), plain)


def test_an_intervention_inside_of_a_compiled_function_is_one_line():
    chat = small()

    @torch.compile(**EAGER)
    def steered():
        with steer(chat, vector(), 0):
            return logits(chat)

    with pytest.raises(InputError, match=r"torch\.compile: call that function uncompiled"):
        steered()


TASKS = [Continuations((5, 6, 7, 8), ((9, 10), (11, 12, 13))), Continuations((5, 6, 9), ((3,), (4, 5)))]


def every_path(chat):
    """Figures of a sweep that resumes passes, of an extraction, and answers."""
    setting = [Steer(vector(norm=20), 2)]
    rows = [encode(chat.tokenizer, "Why?", answer) for answer in ("So.", "Because it is.")]
    swept = sweep(chat, TASKS, [[], setting, [Steer(vector(norm=20), 3)], [Ablate(vector(1))]])
    with intervene(chat, setting):
        means = mean_activations(chat, rows, {"all": [0, 1]}).vectors["all"]
        answers = [answer.answer for answer in sample(chat, ["Why?"], n=3, new_tokens=8)]
    return swept, means, answers


@pytest.mark.parametrize("compiled", [compiled_model, compiled_decoder])
def test_every_path_gives_the_same_on_a_compiled_model(compiled):
    swept, means, answers = every_path(sharpened())
    chat = compiled(sharpened())
    # What is compiled now knows of no hook.
    logits(chat)
    again = every_path(chat)
    close(again[0], swept)
    close(again[1], means)
    assert again[2] == answers


def adapted():
    network = get_peft_model(
        make_network("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules=["up_proj", "down_proj"])
    )
    return dataclasses.replace(make_chat(), model=network, adapter="x")


MLP = "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    "change",
    [
        ScaleAdapters({2: 0.0}),
        Ablate(vector(), positions="all", at="adapters"),
        ProjectAdapters({MLP: vector().unsqueeze(0)}),
    ],
)
def test_adapters_that_are_merged_inside_of_the_context_are_noticed(change):
    chat = adapted()
    with pytest.raises(InputError, match=r"acted on 0 of \d+ tokens of a pass at layer"), intervene(chat, [change]):
        logits(chat)
        chat.model.merge_adapter()
        logits(chat)


def test_another_adapter_switched_on_inside_of_the_context_is_noticed():
    chat = adapted()
    chat.model.add_adapter("other", LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
    with pytest.raises(InputError, match="acted on 0 of"), intervene(chat, [ScaleAdapters({1: 0.5})]):
        chat.model.set_adapter("other")
        logits(chat)


def test_a_layer_that_does_not_run_is_named():
    chat = small()
    with pytest.raises(InputError, match="acted on 0 of 10 tokens of a pass at layer 1"), ablate(chat, vector()):
        chat.decoder.layers = chat.decoder.layers[:1]
        logits(chat)


def test_a_block_that_is_called_past_its_hooks_is_noticed():
    chat = small()
    block = chat.layers[1]
    chat.decoder.layers[1] = PastHooks(block)
    with pytest.raises(InputError, match="acted on 0 of 10 tokens of a pass at layer 1"), steer(chat, vector(), 1):
        logits(chat)


class PastHooks(torch.nn.Module):
    """Calls a block's forward, as a graph of it does."""

    def __init__(self, block):
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)
        self._forward = block.forward

    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)


def test_a_mask_that_names_no_place_is_refused():
    nowhere = torch.zeros(9, dtype=torch.bool)
    with pytest.raises(InputError, match="names no place"), steer(small(), vector(), 1, positions=nowhere):
        pass


def test_a_context_in_which_the_model_did_not_run_says_so(caplog):
    chat = small()
    other = copy.deepcopy(chat.model)
    with caplog.at_level(logging.WARNING, "misdirection"):
        with steer(chat, vector(), 1):
            logits(chat)
        assert not caplog.records
        with steer(chat, vector(), 1):
            logits(chat, other)
    assert "no pass of the model ran under its interventions" in caplog.text
