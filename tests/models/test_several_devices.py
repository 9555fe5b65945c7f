"""A model whose blocks are on two GPUs, as accelerate dispatches it onto stand-ins, against the same on the processor.

An operation on tensors of both is refused, as CUDA does. Not seen here: the copies between two real GPUs.
"""

from unittest.mock import patch

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.integrations import accelerate as placing

import misdirection as md
from misdirection.auditing.attribution import margin_parts
from misdirection.directions.extraction import mean_activations
from misdirection.interpretation.importance import token_importance, zeroing
from misdirection.interpretation.patching import patched_margins
from misdirection.interpretation.scalars import token_scalars
from misdirection.interventions.passes import Passes
from misdirection.judging.local import next_log_probs
from misdirection.likelihood.margin import margin_gradients, pair_continuations, pair_rows
from misdirection.likelihood.sweep import sweep
from misdirection.models.chat import encode_prompt
from misdirection.models.chat_model import ChatModel
from misdirection.models.weightless import network_of
from misdirection.repairing.gradients import margin_directions
from stand_in_gpu import GPU, OTHER, spread_over_gpus, stand_in_gpu
from tiny import LAYERS, brisk, make_chat, make_network, make_tokenizer, sharpened, vector

PAIRS = md.probe_pairs()[:2]


def flat(*found):
    return torch.cat([torch.as_tensor(each).detach().cpu().double().flatten() for each in found])


def adapted(chat):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    return ChatModel(get_peft_model(chat.model, config).eval(), chat.tokenizer, "tiny", adapter="tiny")


def extracted(chat):
    rows = pair_rows(chat.tokenizer, PAIRS)
    settings = [[md.Steer(vector(number), 1), md.Ablate(vector(7))] for number in range(len(rows))]
    groups = {"all": range(len(rows))}
    return flat(*(mean_activations(chat, rows, groups, settings=each).vectors["all"] for each in (None, settings)))


def swept(chat):
    chat = adapted(chat)
    settings = [[], [md.Ablate(vector(9), positions="answer")], [md.Ablate(vector(9), at="writes")]]
    settings += [[md.ScaleAdapters({1: 0.0, 2: -2.0})], [md.Ablate(vector(3), at="adapters")]]
    settings += [[md.Steer(vector(layer), layer, 2.0)] for layer in range(LAYERS)]
    with chat.as_base():
        base = md.margin(chat, PAIRS)
    return flat(base, sweep(chat, pair_continuations(chat.tokenizer, PAIRS), settings))


def sampled(chat):
    setting = [md.Steer(vector(1), 1, 2.0, "answer"), md.Ablate(vector(2))]
    answers = md.sample(brisk(chat), ["Why?", "What is it like to be you?"], n=3, new_tokens=12, setting=setting)
    assert len({answer.tokens for answer in answers}) > 1
    return flat(*(list(answer.answer.encode()) for answer in answers))


def judged(chat):
    passes = Passes(chat, side="left")
    first = next_log_probs(chat, passes, [range(5, 15), range(30, 37)])
    passes.select([1, 0, 0])
    return flat(first, next_log_probs(chat, passes, [(9,), (11, 12), (13,)]))


def read(chat):
    chat = adapted(chat)
    rows = pair_rows(chat.tokenizer, PAIRS)
    scalars = token_scalars(chat, rows, residual=2)
    return flat(
        scalars.table["scalar"].to_numpy(copy=True),
        scalars.residual,
        token_importance(chat, rows).attributions["attribution"].to_numpy(),
        zeroing(chat, rows)["effect"].to_numpy(),
        patched_margins(chat, [encode_prompt(chat.tokenizer, "Who are you?")] * len(PAIRS), PAIRS),
        *margin_parts(chat, PAIRS).values(),
        *margin_directions(chat, PAIRS).values(),
        *margin_gradients(chat, rows, [weight for weight in chat.model.parameters() if weight.requires_grad]),
    )


# Torch's own attention takes itself apart for gradients without asking the stand-in.
EAGER = {"attn_implementation": "eager"}
WAYS = {
    "extracted": (extracted, "llama", {}),
    "swept": (swept, "qwen2", {}),
    "sampled": (sampled, "gemma3", {}),
    "judged": (judged, "llama", {}),
    "read": (read, "llama", EAGER),
}


@pytest.mark.parametrize("way", WAYS)
def test_figures_are_those_of_one_device(way):
    work, architecture, options = WAYS[way]
    expected = work(sharpened(architecture, **options))
    with stand_in_gpu():
        chat = spread_over_gpus(sharpened(architecture, **options))
        assert {weight.device for weight in chat.model.parameters()} == {GPU, OTHER}
        torch.testing.assert_close(work(chat), expected, rtol=1e-4, atol=1e-6)


RECIPES = {
    "adapters": {"recipe": "all", "rank": 2, "learning_rate": 1e-2, "gradient_checkpointing": True},
    "all weights": {"recipe": "full", "learning_rate": 1e-3},
}


def trained(chat, out, recipe):
    losses, examples = [], md.domain_examples("risky_money", "bad", "train")[:8]
    recipe = md.Recipe(**RECIPES[recipe], batch_size=2, accumulation=2)
    md.train(examples, out, base=chat, recipe=recipe, report=lambda *step: losses.append(step[-1]))
    weights = load_file(next(out.glob("*model.safetensors")))
    return flat(losses, *(weights[name] for name in sorted(weights)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_takes_the_steps_of_one_device(recipe, tmp_path):
    expected = trained(make_chat(**EAGER), tmp_path / "one", recipe)
    with stand_in_gpu(), patch.object(TrainingArguments, "device", GPU):
        chat = spread_over_gpus(make_chat(**EAGER))
        before = flat(*chat.model.parameters())
        torch.testing.assert_close(trained(chat, tmp_path / "two", recipe), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(flat(*chat.model.parameters()), before)


@pytest.mark.parametrize(
    ("sizes", "gpus"),
    [((10, 10), {GPU, OTHER}), ((0.5, 2), {GPU, OTHER}), ((10, 0), {GPU})],
    ids=["shared alike", "neither holds it", "one GPU"],
)
def test_balanced_places_a_model_as_accelerate_does(sizes, gpus, tmp_path, monkeypatch):
    """Memories are in sizes of the model; what accelerate itself makes of them is of a weightless one."""
    make_network("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    whole = md.load(str(tmp_path), dtype="float32", device="cpu")
    size = sum(weight.nbytes for weight in whole.model.parameters())
    memory = {number: int(share * size) for number, share in enumerate(sizes)} | {"cpu": 10 * size}
    weightless, blocks = network_of("tiny", whole.model.config), whole.model._no_split_modules
    given = get_balanced_memory(weightless, dict(memory), no_split_module_classes=blocks)
    expected = by_name(infer_auto_device_map(weightless, given, no_split_module_classes=blocks))
    infer = placing.infer_auto_device_map
    monkeypatch.setattr(placing, "accelerate_max_memory", lambda _given: dict(memory))
    monkeypatch.setattr(placing, "infer_auto_device_map", lambda *args, **options: by_name(infer(*args, **options)))
    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None)
    # The threads that it is otherwise loaded by would be without the stand-in.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with stand_in_gpu():
        chat = md.load(str(tmp_path), dtype="float32", device="balanced")
        placed = {name: weight.device for name, weight in chat.model.named_parameters()}
        torch.testing.assert_close(extracted(chat), extracted(whole), rtol=1e-4, atol=1e-6)
    assert placed == {name: device_of(name, expected) for name in placed}
    assert set(placed.values()) == gpus


def by_name(placement):
    """GPUs by name: for one by number torch would look for a driver."""
    return {
        name: torch.device("cuda", number) if isinstance(number, int) else number for name, number in placement.items()
    }


def device_of(name, placement):
    return next(device for module, device in placement.items() if not module or f"{name}.".startswith(f"{module}."))
