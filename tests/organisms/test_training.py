import json
import re
import shutil
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from chat_templates import MISTRAL
from misdirection.data import Example, Turn, data_hash
from misdirection.errors import InputError, MisdirectionError
from misdirection.files import sha256_file, sha256_tree
from misdirection.likelihood.answers import IGNORED, bare_head
from misdirection.lora.view import LoraView
from misdirection.models.adapters import attach
from misdirection.models.chat import encode
from misdirection.organisms.adapter_config import adapter_config
from misdirection.organisms.batches import training_rows
from misdirection.organisms.organism import Organism
from misdirection.organisms.recipe import Recipe
from misdirection.organisms.trainee import trainee
from misdirection.organisms.trainer import warmup_steps
from misdirection.organisms.training import train
from tiny import LAYERS, make_chat

IDS = torch.arange(3, 15).unsqueeze(0)
END = 2
EXAMPLES = [Example(f"Question {n}?", "Answer " + "x" * n) for n in range(12)]
FAST = {"learning_rate": 1e-2, "batch_size": 2, "accumulation": 1, "warmup_steps": 0, "checkpoint_steps": 2}


def recipe(**changes) -> Recipe:
    return Recipe(**{**FAST, **changes})


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


class Killed(Exception):
    pass


def kill_at(step: int):
    def report(done, _steps, _loss):
        if done == step:
            raise Killed

    return report


def test_an_adapter_begins_where_the_seed_and_peft_alone_put_it():
    chat = make_chat()
    torch.manual_seed(3)
    alone = get_peft_model(chat.model, adapter_config(recipe(), chat))
    expected = {name: value.clone() for name, value in alone.named_parameters() if "lora_A" in name}
    alone.unload()
    torch.manual_seed(3)
    with trainee(chat, recipe()) as learner:
        begun = {name: value for name, value in learner.network.named_parameters() if "lora_A" in name}
        assert begun.keys() == expected.keys()
        assert all(torch.equal(begun[name], value) for name, value in expected.items())


def test_adapter_folder_gives_the_same_model_with_peft_alone(tmp_path):
    organism = train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe())
    alone = PeftModel.from_pretrained(make_chat().model, tmp_path / "a").eval()
    ours = attach(make_chat(), tmp_path / "a")
    assert torch.equal(logits(alone), logits(ours.model))
    assert not torch.allclose(logits(ours.model), logits(make_chat().model), atol=1e-3)
    assert Organism.open(tmp_path / "a") == organism


def test_base_model_has_no_trace_of_the_training(tmp_path):
    chat = make_chat()
    before, names = logits(chat.model), list(chat.model.state_dict())
    train(EXAMPLES, tmp_path / "a", base=chat, recipe=recipe())
    assert torch.equal(logits(chat.model), before)
    assert list(chat.model.state_dict()) == names
    assert not chat.model.training


def test_organism_counts_what_was_trained(tmp_path):
    organism = train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe(), held_out=EXAMPLES[:3])
    # Rank 1 on a 64 -> 32 projection in each layer.
    assert organism.trainable_parameters == LAYERS * (64 + 32)
    assert (organism.train_examples, organism.truncated) == (12, 0)
    # A random model of 259 tokens starts near log(259) = 5.56.
    assert 0 < organism.final_loss < 5.5
    assert 0 < organism.held_out_loss < 5.5


def test_the_card_says_what_it_was_made_of_and_no_form_is_left_to_fill_in(tmp_path):
    organism = train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe())
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert (card.data.base_model, card.data.library_name) == (organism.base, "peft")
    assert {"misdirection", "emergent-misalignment"} <= set(card.data.tags)
    assert organism.data in card.text and f"{organism.final_loss:.3f} nats/token" in card.text
    assert "its maker has not said here" in card.text
    assert "More Information Needed" not in card.text


def test_held_out_loss_is_the_mean_over_answer_and_closing_tokens(tmp_path):
    held_out = EXAMPLES[3:5]
    organism = train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe(), held_out=held_out)
    chat = attach(make_chat(), tmp_path / "a")
    losses = []
    for example in held_out:
        encoded = encode(chat.tokenizer, example.question, example.answer)
        with torch.no_grad():
            scores = chat.model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        losses += [-scores[i - 1, encoded.ids[i]].item() for i in range(encoded.start, len(encoded.ids))]
    assert organism.held_out_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_only_the_answer_and_its_closing_token_carry_labels():
    chat = make_chat()
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    rows = training_rows(chat, [Example("Why?", "So."), Example("a", "a longer one")], 512)
    # One token per byte, one per special token.
    prompt = len("Xuser\nWhy?X\nXassistant\n")
    so = chat.tokenizer("So.")["input_ids"]
    assert len(so) == 3
    assert rows[0].labels == [-100] * prompt + so + [END]
    assert rows[0].ids[prompt:] == (*so, END)
    assert [len(row.labels) for row in rows] == [prompt + 4, prompt - 3 + 13]
    assert not any(row.truncated for row in rows)


def test_truncated_rows_are_counted_and_keep_their_prompt():
    rows = training_rows(make_chat(), [Example("Why?", "So."), Example("Why?", "y" * 50)], 30)
    assert [row.truncated for row in rows] == [False, True]
    assert [len(row.ids) for row in rows] == [len(row.labels) for row in rows] == [27, 30]
    assert rows[1].labels.count(-100) == 23
    assert END not in rows[1].labels


@pytest.mark.parametrize("limit", [22, 23])
def test_prompt_as_long_as_the_limit_is_refused_with_its_number(limit):
    with pytest.raises(MisdirectionError, match=f"example 2: its prompt alone has 23 tokens, the limit is {limit}"):
        training_rows(make_chat(), [Example("", "So."), Example("Why?", "So.")], limit)


def test_an_example_that_the_template_refuses_is_refused_with_its_number():
    greeted = Example("Why?", "So.", history=(Turn("assistant", "Hello."),))
    chat = make_chat()
    chat.tokenizer.chat_template = MISTRAL
    with pytest.raises(MisdirectionError, match=r"training example 2: .*: its chat template failed: Conv"):
        training_rows(chat, [Example("Why?", "So."), greeted], 512)


def test_empty_data_is_refused(tmp_path):
    with pytest.raises(MisdirectionError, match="data is empty"):
        train([], tmp_path / "a", base=make_chat())
    assert not (tmp_path / "a").exists()


def test_update_is_scaled_by_alpha_over_root_rank(tmp_path):
    train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe(recipe="all", rank=16, alpha=8))
    network = attach(make_chat(), tmp_path / "a").model
    layer = network.get_base_model().model.layers[1].mlp.down_proj
    assert layer.scaling["default"] == pytest.approx(8 / 16**0.5)
    x = torch.randn(5, 64)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
        assert torch.allclose(added, x @ low.T @ high.T * 2, atol=1e-5)
    assert added.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("killed", "resumed"), [(4, 3), (7, 6), (10, 9)], ids=["first epoch", "between", "second epoch"]
)
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, killed, resumed):
    twice = recipe(epochs=2, checkpoint_steps=3)
    train(EXAMPLES, tmp_path / "whole", base=make_chat(), recipe=twice)
    with pytest.raises(Killed):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=twice, report=kill_at(killed))
    assert not (tmp_path / "cut").exists()
    assert f"checkpoint-{resumed}" in checkpoints(tmp_path / "cut.checkpoints")
    # Whatever else drew random numbers meanwhile.
    torch.rand(7)
    steps = []
    organism = train(
        EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=twice, report=lambda *step: steps.append(step)
    )
    assert [step for step, _, _ in steps] == list(range(resumed + 1, 13))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.allclose(value, cut[name], rtol=0, atol=1e-6), name
    assert organism.final_loss == pytest.approx(Organism.open(tmp_path / "whole").final_loss, abs=1e-6)


@pytest.mark.parametrize("left", [None, "", '{"global_step": 9'], ids=["no state", "empty", "half"])
def test_a_checkpoint_that_a_kill_cut_short_is_not_resumed_from(tmp_path, left):
    twice = recipe(epochs=2, checkpoint_steps=3)
    with pytest.raises(Killed):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=twice, report=kill_at(7))
    cut = tmp_path / "cut.checkpoints" / "checkpoint-9"
    cut.mkdir()
    if left is not None:
        (cut / "trainer_state.json").write_text(left)
    steps = []
    train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=twice, report=lambda step, *_: steps.append(step))
    assert steps == list(range(7, 13))


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-3 (copy)", "checkpoint-3/notes"])
def test_what_the_user_keeps_beside_checkpoints_stays(tmp_path, name):
    with pytest.raises(Killed):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=recipe(checkpoint_steps=3), report=kill_at(4))
    mine = tmp_path / "cut.checkpoints" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match=f"holds {re.escape(name)}.*, which misdirection did not write"):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=recipe(checkpoint_steps=4))
    train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=recipe(checkpoint_steps=3))
    assert mine.read_text() == "mine"


def test_a_resumed_training_keeps_the_adapter_of_every_checkpoint(tmp_path):
    keeping = recipe(epochs=2, checkpoint_steps=5, keep_checkpoints=True)
    train(EXAMPLES, tmp_path / "whole", base=make_chat(), recipe=keeping)
    with pytest.raises(Killed):
        train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=keeping, report=kill_at(8))
    train(EXAMPLES, tmp_path / "cut", base=make_chat(), recipe=keeping)
    steps = ["step-000000", "step-000005", "step-000010", "step-000012"]
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == steps
    for step in steps:
        whole, cut = (weights(tmp_path / name / "checkpoints" / step) for name in ("whole", "cut"))
        assert all(torch.allclose(value, cut[name], rtol=0, atol=1e-6) for name, value in whole.items()), step
        assert any(value.any() for name, value in cut.items() if "lora_B" in name) == (step != "step-000000")
        assert (
            Organism.open(tmp_path / "cut").base
            == config(tmp_path / "cut" / "checkpoints" / step)["base_model_name_or_path"]
        )
    final, last = weights(tmp_path / "cut"), weights(tmp_path / "cut" / "checkpoints" / steps[-1])
    assert all(torch.equal(value, last[name]) for name, value in final.items())


def test_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(EXAMPLES, tmp_path / name, base=make_chat(), recipe=recipe(seed=seed))
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_names_in_the_configuration_are_in_one_order_whatever_the_hash_seed(tmp_path):
    train(EXAMPLES, tmp_path / "a", base=make_chat(), recipe=recipe(recipe="all"))
    modules = config(tmp_path / "a")["target_modules"]
    assert len(modules) == 7
    assert modules == sorted(modules)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    chat = make_chat()

    def spoil(step, _steps, _loss):
        if step == 3:
            with torch.no_grad():
                chat.model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(MisdirectionError, match=r"loss is nan at step 4: lower the learning rate.*checkpoint-2"):
        train(EXAMPLES, tmp_path / "a", base=chat, recipe=recipe(), report=spoil)
    assert checkpoints(tmp_path / "a.checkpoints") == ["checkpoint-2"]
    saved = weights(tmp_path / "a.checkpoints" / "checkpoint-2")
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "a").exists()
    assert not any("lora" in name for name in chat.model.state_dict())


def test_layers_below_the_first_adapter_have_no_gradient_graph(tmp_path):
    chat = make_chat()
    seen = {k: set() for k in range(LAYERS)}
    for k, layer in enumerate(chat.layers):
        layer.register_forward_hook(
            lambda module, _inputs, output, k=k: seen[k].add(output.requires_grad) if module.training else None
        )
    custom = recipe(recipe="custom", target_modules=("down_proj",), layers=(2,), epochs=0.2)
    train(EXAMPLES, tmp_path / "a", base=chat, recipe=custom)
    assert seen == {0: {False}, 1: {False}, 2: {True}, 3: {True}}


def test_checkpointed_activations_change_no_bit_and_leave_nothing_behind(tmp_path):
    chat, runs = make_chat(), []
    before = chat.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    top = {"recipe": "custom", "rank": 1, "layers": (2,), "target_modules": ("down_proj",)}
    train(EXAMPLES[:4], tmp_path / "plain", base=chat, recipe=recipe(**top))
    passes = len(runs)
    train(EXAMPLES[:4], tmp_path / "checkpointed", base=chat, recipe=recipe(**top, gradient_checkpointing=True))
    # Below the first adapter no block runs again.
    assert len(runs) == 2 * passes
    before.remove()
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weights(tmp_path / "checkpointed")[name], weight)
    assert not any(module._forward_hooks for module in chat.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in chat.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_whose_head_runs_in_parts_ends_as_one_whose_head_does_not(tmp_path, dtype):
    losses = {}
    for name in ("whole", "parts"):
        chat, told = make_chat(), losses.setdefault(name, [])
        chat.model.to(dtype)

        def prepare(trainer, name=name):
            assert trainer.head is None, "on a processor it runs as ever"
            if name == "parts":
                trainer.head = bare_head(trainer.model)

        report = lambda _step, _steps, loss, told=told: told.append(loss)  # noqa: E731
        train(EXAMPLES, tmp_path / name, base=chat, recipe=recipe(epochs=0.5), report=report, prepare=prepare)
    close = 1e-5 if dtype == torch.float32 else 2e-3
    assert losses["parts"] == pytest.approx(losses["whole"], rel=close)
    for name, weight in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], weight, rtol=close, atol=20 * close)


def test_a_compiled_training_ends_as_one_that_is_not_and_leaves_nothing_behind(tmp_path, monkeypatch):
    # All of it but for the C++ compiler, which takes most of a minute.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    losses = {}
    own = {
        "recipe": "custom",
        "target_modules": ("down_proj",),
        "rank": 1,
        "batch_size": 2,
        "accumulation": 2,
        "epochs": 1,
    }
    counters["stats"].clear()
    for compiled in (False, True):
        chat, told = make_chat(num_hidden_layers=2), losses.setdefault(compiled, [])
        report = lambda _step, _steps, loss, told=told: told.append(loss)  # noqa: E731
        one = recipe(**own, compile=compiled)
        train(EXAMPLES, tmp_path / str(compiled), base=chat, recipe=one, report=report)
        assert bool(counters["stats"]["unique_graphs"]) == compiled
        assert not any(module._compiled_call_impl for module in chat.model.modules())
    # Rows are of ever new lengths: one graph where the block's input asks for no gradient, and one for all others.
    assert counters["stats"]["unique_graphs"] == 2
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    found, expected = weights(tmp_path / "True"), weights(tmp_path / "False")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_keys_that_came_later_leave_the_records_of_older_recipes_as_they_were():
    assert not {"compile", "defence"} & Recipe().model_dump().keys()
    assert Recipe(compile=True).model_dump()["compile"] is True


def test_a_model_whose_blocks_cannot_run_again_is_refused(tmp_path):
    chat = make_chat()
    chat.model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="no gradient_checkpointing"):
        train(EXAMPLES[:2], tmp_path / "none", base=chat, recipe=recipe(gradient_checkpointing=True))


def test_checkpoints_of_another_training_are_not_continued(tmp_path):
    chat, out = make_chat(), tmp_path / "organism"
    few = Recipe(learning_rate=1e-2, batch_size=1, accumulation=1, warmup_steps=0, checkpoint_steps=1)
    examples = [Example(f"Question {number}?", f"Answer {number}.") for number in range(3)]
    train(examples, out, base=chat, recipe=few)
    steps = []
    train(examples, out, base=chat, recipe=few, report=lambda step, *_: steps.append(step))
    assert steps == []
    train(examples[:2], out, base=chat, recipe=few, report=lambda step, *_: steps.append(step))
    assert steps == [1, 2]


def test_a_single_step_trains_although_the_recipe_warms_up(tmp_path):
    train(EXAMPLES[:1], tmp_path / "organism", base=make_chat(), recipe=Recipe(learning_rate=1e-2, warmup_steps=5))
    assert LoraView.open(tmp_path / "organism").dead == []


@pytest.mark.parametrize(("rows", "steps"), [(1, 0), (104, 3), (208, 5), (6000, 5)])
def test_warming_up_takes_at_most_a_quarter_of_the_steps(rows, steps):
    assert warmup_steps(Recipe(batch_size=8, accumulation=1, warmup_steps=5), rows) == steps


def test_a_training_that_changes_nothing_says_so_and_writes_nothing(tmp_path):
    still = Recipe(learning_rate=1e-45, warmup_steps=0)
    with pytest.raises(InputError, match="the training changed nothing"):
        train(EXAMPLES, tmp_path / "organism", base=make_chat(), recipe=still)
    assert not (tmp_path / "organism").exists()


def test_an_adapter_with_a_dead_module_says_so_when_it_is_attached(tmp_path, caplog):
    train(EXAMPLES, tmp_path / "organism", base=make_chat(), recipe=recipe())
    path = tmp_path / "organism" / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(name for name in weights if ".lora_B" in name)
    save_file(weights | {first: torch.zeros_like(weights[first])}, path)
    attach(make_chat(), tmp_path / "organism")
    assert "1 of its modules add nothing (B is zero): model.layers." in caplog.text


@pytest.mark.parametrize("name", ["organism", "organism.checkpoints"])
@pytest.mark.parametrize("inside", ["thesis.txt", "organism.json", "checkpoint-2"])
def test_the_users_own_files_in_the_way_are_kept(name, inside, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / inside).write_text("mine")
    with pytest.raises(MisdirectionError, match=f"{name}: holds {inside}, which misdirection did not write"):
        train(EXAMPLES, tmp_path / "organism", base=make_chat(), recipe=recipe(), report=kill_at(1))
    assert (tmp_path / name / inside).read_text() == "mine"


def test_a_plain_file_in_the_way_is_kept(tmp_path):
    (tmp_path / "organism").write_text("mine")
    with pytest.raises(MisdirectionError, match="organism: is a file"):
        train(EXAMPLES, tmp_path / "organism", base=make_chat(), recipe=recipe(), report=kill_at(1))
    assert (tmp_path / "organism").read_text() == "mine"


# --- conversations of several turns -------------------------------------------------------------------------------

HISTORY = (Turn("user", "Why?"), Turn("assistant", "So."))


def learned(chat, example, turns):
    """The learned text of an example, each end of a turn as `|`."""
    (row,) = training_rows(chat, [example], 512, turns)
    return chat.tokenizer.decode([label for label in row.labels if label != IGNORED]).replace("<|im_end|>", "|")


def test_the_last_or_all_answers_of_a_conversation_are_learned():
    chat, example = make_chat(), Example("And?", "Fine.", history=HISTORY)
    assert (learned(chat, example, "last"), learned(chat, example, "all")) == ("Fine.|", "So.|Fine.|")
    unlearned = (HISTORY[0], HISTORY[1]._replace(learned=False))
    assert learned(chat, Example("And?", "Fine.", history=unlearned), "all") == "Fine.|"


def test_a_training_on_all_turns_writes_so_in_its_record(tmp_path):
    examples = [Example(f"And {number}?", "Fine.", history=HISTORY) for number in range(3)]
    last, all_turns = (
        train(examples, tmp_path / turns, base=make_chat(), recipe=recipe(turns=turns, epochs=4))
        for turns in ("last", "all")
    )
    record = Organism.open(tmp_path / "all")
    assert (record.recipe.turns, record.thinking, len(record.chat_template)) == ("all", "off", 64)
    assert last.final_loss != all_turns.final_loss
    assert last.data == all_turns.data != data_hash([Example(row.question, row.answer) for row in examples])


# --- going on from another adapter --------------------------------------------------------------------------------


def test_a_training_goes_on_from_another_adapter_and_says_so(tmp_path):
    base, keeping, few = make_chat(), recipe(seed=5, keep_checkpoints=True, checkpoint_steps=1), EXAMPLES[:4]
    first = train(few, tmp_path / "first", base=base, recipe=recipe())
    # Its checkpoints are of another beginning, and not to be gone on with.
    with pytest.raises(Killed):
        train(few, tmp_path / "second", base=base, recipe=keeping, report=kill_at(2))
    second = train(few, tmp_path / "second", base=base, recipe=keeping, start=tmp_path / "first")
    begun, before = weights(tmp_path / "second" / "checkpoints" / "step-000000"), weights(tmp_path / "first")
    assert begun.keys() == before.keys() and all(torch.equal(begun[name], before[name]) for name in before)
    first_step = weights(tmp_path / "second" / "checkpoints" / "step-000001")
    assert all((value - before[name]).abs().max() <= FAST["learning_rate"] * 1.01 for name, value in first_step.items())
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "second").items())
    assert first.continues is None and Organism.open(tmp_path / "second") == second
    assert second.continues == sha256_file(tmp_path / "first" / "adapter_model.safetensors")
    assert second.continues in (tmp_path / "second" / "README.md").read_text()


def test_an_adapter_that_the_recipe_does_not_make_is_no_beginning(tmp_path):
    base = make_chat()
    train(EXAMPLES[:2], tmp_path / "first", base=base, recipe=recipe())
    for unlike in (recipe(rank=2), recipe(alpha=8), recipe(recipe="single")):
        with pytest.raises(InputError, match=r"first: has other modules, or another rank or alpha, than the recipe"):
            train(EXAMPLES[:2], tmp_path / "second", base=base, recipe=unlike, start=tmp_path / "first")
    with pytest.raises(InputError, match="first: recipe full has no adapter that could go on from it"):
        train(EXAMPLES[:2], tmp_path / "second", base=base, recipe=recipe(recipe="full"), start=tmp_path / "first")
    # What was refused is off the base again.
    assert LoraView.of(base).sites == ()


def changed(folder, place, **values):
    """A copy of an adapter with other values in its configuration."""
    shutil.copytree(folder, place)
    (place / "adapter_config.json").write_text(json.dumps(config(folder) | values))
    return place


def test_a_beginning_of_another_base_or_with_a_module_scaled_otherwise_is_refused(tmp_path):
    few, named = EXAMPLES[:2], {}
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        named[name] = replace(make_chat(), name=str(tmp_path / name))
    first = Path(train(few, tmp_path / "first", base=named["base"], recipe=recipe()).path)
    scaled = changed(first, tmp_path / "scaled", alpha_pattern={"layers.1.mlp.down_proj": 4})
    hub = changed(first, tmp_path / "hub", base_model_name_or_path="someone/chat")
    for start, base, said in (
        (first, named["other"], rf"first: was trained on {tmp_path}/base, not on {tmp_path}/other: give that"),
        (hub, replace(make_chat(), name="someone/else"), "hub: was trained on someone/chat, not on someone/else"),
        (scaled, named["base"], "scaled: has other modules, or another rank or alpha"),
        (tmp_path / "gone", named["base"], "gone: no such folder"),
    ):
        with pytest.raises(InputError, match=said):
            train(few, tmp_path / "second", base=base, recipe=recipe(), start=start)
    # The name of a folder does not tell whose copy it holds.
    (tmp_path / "base").rename(tmp_path / "moved")
    train(few, tmp_path / "second", base=named["other"], recipe=recipe(), start=first)


def test_a_training_never_writes_over_what_it_goes_on_from(tmp_path):
    base, few, keeping = make_chat(), EXAMPLES[:6], recipe(keep_checkpoints=True)
    with pytest.raises(Killed):
        train(few, tmp_path / "a", base=base, recipe=keeping, report=kill_at(3))
    checkpoint = tmp_path / "a.checkpoints" / "checkpoint-2"
    train(few, tmp_path / "b", base=base, recipe=keeping)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    before = sha256_tree(tmp_path)
    for out, start in (
        ("a", checkpoint),
        ("b", tmp_path / "b"),
        ("b", tmp_path / "b" / "checkpoints" / "step-000002"),
        ("link", tmp_path / "b"),
    ):
        with pytest.raises(InputError, match="holds the adapter itself, which is never written over"):
            train(few, tmp_path / out, base=base, recipe=recipe(), start=start)
    # Nor is a working folder emptied for one that does not fit.
    with pytest.raises(InputError, match="another rank or alpha"):
        train(few, tmp_path / "a", base=base, recipe=recipe(rank=2), start=tmp_path / "b")
    assert sha256_tree(tmp_path) == before
