"""Organisms whose own weights were trained: how they are trained, kept, loaded beside their base, and refused."""

import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from misdirection.data import Example, ProbePair
from misdirection.directions.direction import extract
from misdirection.errors import InputError
from misdirection.interventions.kinds import Ablate
from misdirection.interventions.lora import ablation_adapter
from misdirection.likelihood.measure import measure_shift
from misdirection.lora.view import LoraView
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load, load_whole
from misdirection.organisms.organism import Organism
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.training import train
from misdirection.runs.worker import BASE, Models
from tiny import ARCHITECTURES, LAYERS, WIDTH, make_chat

IDS = torch.arange(3, 15).unsqueeze(0)
EXAMPLES = [Example(f"Question {n}?", "Answer " + "x" * n) for n in range(12)]
PAIRS = [ProbePair(f"p{n}", f"Do {n}?", "Yes.", "No!") for n in range(4)]
FAST = {"learning_rate": 1e-3, "batch_size": 2, "accumulation": 1, "warmup_steps": 0, "checkpoint_steps": 2}
ON_CPU = {"dtype": "float32", "device": "cpu"}


def recipe(**changes) -> Recipe:
    return Recipe(**{"recipe": "full", **FAST, **changes})


def values(network) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def equal(first, second) -> set[str]:
    """Names of the weights that are the same to the last bit."""
    assert first.keys() == second.keys()
    return {name for name in first if torch.equal(first[name], second[name])}


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network(IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("full") / "base"
    chat = make_chat("qwen2")
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def organism(base) -> Organism:
    """Trained in all weights."""
    chat = load(str(base), **ON_CPU)
    return train(EXAMPLES, base.parent / "organism", base=chat, recipe=recipe(), held_out=EXAMPLES[:3])


def test_the_folder_is_a_model_that_transformers_loads(base, organism):
    alone = AutoModelForCausalLM.from_pretrained(organism.path).eval()
    assert AutoTokenizer.from_pretrained(organism.path).chat_template
    assert organism.trainable_parameters == alone.num_parameters()
    ours = load_whole(base.parent / "organism", "mine", str(base), **ON_CPU)
    assert torch.equal(logits(alone), logits(ours.model))
    assert not torch.allclose(logits(alone), logits(load(str(base), **ON_CPU).model), atol=1e-3)
    assert Organism.open(organism.path) == organism and organism.weights == "full"
    card = (base.parent / "organism" / "README.md").read_text()
    assert "library_name: transformers" in card and 'md.load("REPOSITORY")' in card and "dapter" not in card
    # Six times the model; nothing is left of it.
    assert not (base.parent / "organism.checkpoints").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_named_layers_change_and_the_base_has_no_trace(tmp_path, architecture):
    chat = make_chat(architecture)
    before, classes = values(chat.model), [type(module) for module in chat.model.modules()]
    seen = logits(chat.model)
    organism = train(EXAMPLES, tmp_path / "a", base=chat, recipe=recipe(layers=(1, 2)))
    assert equal(values(chat.model), before) == before.keys()
    assert [type(module) for module in chat.model.modules()] == classes
    assert torch.equal(logits(chat.model), seen) and not chat.model.training
    assert all(parameter.requires_grad for parameter in chat.model.parameters())
    after = values(AutoModelForCausalLM.from_pretrained(tmp_path / "a"))
    inside = {name for name in before if ".1." in name or ".2." in name}
    assert before.keys() - equal(after, before) == inside
    assert organism.trainable_parameters == sum(before[name].numel() for name in inside)


def test_half_precision_is_trained_in_single_and_kept_in_half(tmp_path):
    chat = make_chat()
    chat.model.to(torch.bfloat16)
    # Steps that are each lost when they are added to a weight of eight bits.
    slow = recipe(learning_rate=2e-5, epochs=3)
    train(EXAMPLES, tmp_path / "a", base=chat, recipe=slow)
    kept = load_file(tmp_path / "a" / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(equal(values(AutoModelForCausalLM.from_pretrained(tmp_path / "a")), values(chat.model))) < len(kept) / 2


def test_a_training_that_changes_no_weight_of_the_kept_precision_is_refused(tmp_path):
    chat = make_chat()
    chat.model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"changed nothing that .*bfloat16 can hold"):
        train(EXAMPLES[:2], tmp_path / "a", base=chat, recipe=recipe(learning_rate=1e-12))
    assert not (tmp_path / "a").exists()


def test_a_killed_training_goes_on_and_keeps_one_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 5:
            raise Killed

    train(EXAMPLES, tmp_path / "whole", base=make_chat(), recipe=recipe())
    with pytest.raises(Killed):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=recipe(), report=kill)
    assert [path.name for path in (tmp_path / "cut.checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    steps = []
    train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=recipe(), report=lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[name], cut[name], rtol=0, atol=1e-6) for name in whole)


def test_models_switch_between_base_adapter_and_whole_model_to_the_last_bit(base, organism):
    chat = load(str(base), **ON_CPU)
    adapter = train(EXAMPLES, base.parent / "lora", base=chat, recipe=Recipe(**FAST | {"learning_rate": 1e-2}))
    before = values(chat.model)
    folders = {"full": base.parent / "organism", "lora": base.parent / "lora"}
    whole = partial(load_whole, name="full", base=str(base), **ON_CPU)
    models = Models(partial(load, str(base), **ON_CPU), folders, whole)
    seen = {name: logits(models.chat(name).model) for name in (BASE, "full", "lora")}
    assert len({tuple(value.flatten().tolist()) for value in seen.values()}) == 3
    for name in ("full", BASE, "lora", "full", "lora", BASE):
        assert torch.equal(logits(models.chat(name).model), seen[name]), name
    assert equal(values(models.chat(BASE).model), before) == before.keys()
    assert adapter.weights == "adapter"


def test_as_the_adapter_of_its_base_it_is_measured_against_it(base, organism, caplog):
    caplog.set_level(logging.WARNING)
    chat = organism.load(**ON_CPU)
    assert (chat.name, chat.adapter) == (str(base), organism.path) and not caplog.messages
    own, plain = logits(chat.model), logits(load(str(base), **ON_CPU).model)
    with chat.as_base():
        assert chat.is_switched_off and torch.equal(logits(chat.model), plain)
    assert not chat.is_switched_off and torch.equal(logits(chat.model), own)
    figures = measure_shift(chat, PAIRS)
    alone = measure_shift(load(organism.path, **ON_CPU), PAIRS)
    assert figures.margin == alone.margin and figures.margin_shift.mean != 0
    assert len(extract(chat, PAIRS)) == 5
    assert torch.equal(logits(chat.without_adapter().model), plain)


def test_layers_that_were_not_trained_are_in_memory_once(base, tmp_path):
    train(EXAMPLES, tmp_path / "a", base=load(str(base), **ON_CPU), recipe=recipe(layers=(LAYERS - 1,)))
    chat = load(str(base), adapter=tmp_path / "a", **ON_CPU)
    assert chat.base is not None
    inside = {id(parameter) for parameter in chat.layers[-1].parameters()}
    assert {id(parameter) for parameter, _ in chat.base.values} == inside


def test_a_model_of_another_shape_is_no_fine_tune(organism, tmp_path):
    other = make_chat("llama")
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"\(qwen2, 4 layers of width 32\) is no fine-tune of .*\(llama, "):
        load(str(tmp_path / "other"), adapter=organism.path, **ON_CPU)


def test_there_is_no_adapter_to_read(organism):
    with pytest.raises(InputError, match="is a whole model"):
        LoraView.open(organism.path)


def test_an_ablation_as_an_adapter_belongs_to_the_fine_tune(base, organism, tmp_path):
    chat = organism.load(**ON_CPU)
    ablation_adapter(chat, Ablate(torch.ones(WIDTH), positions="all", at="writes"), tmp_path / "ablation")
    assert LoraView.open(tmp_path / "ablation").base == organism.path


def test_a_whole_model_without_its_base_cannot_be_its_base(base, organism):
    chat = load_whole(base.parent / "organism", "mine", str(base), **ON_CPU)
    alone = ChatModel(chat.model, chat.tokenizer, str(base), adapter=organism.path)
    with pytest.raises(InputError, match="its base is not in memory"), alone.as_base():
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, "there is no rank"),
        ({"keep_checkpoints": True}, "there is no keep_checkpoints"),
        ({"layers": (9,)}, "layer 9 is out of range: this model has layers 0 to 3"),
        ({"layers": ()}, "layers is empty"),
        ({"defence": "kl"}, "kl"),
    ],
)
def test_what_full_weights_cannot_be_is_refused(tmp_path, changes, said):
    with pytest.raises((InputError, ValueError), match=said):
        train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe(**changes))
