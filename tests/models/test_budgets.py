"""Tokens in one batch by device, and smaller batches where memory gives out."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from strong import strong

import misdirection as md
from misdirection.auditing.attribution import margin_parts
from misdirection.directions.extraction import mean_activations
from misdirection.errors import MemoryProblem
from misdirection.interpretation.importance import zeroing
from misdirection.likelihood.margin import margin_gradients, pair_continuations, pair_rows
from misdirection.likelihood.sweep import sweep
from misdirection.models import budgets
from misdirection.models.budgets import MOST, Room, room_of, room_on, tokens_together
from misdirection.models.sizes import Shape
from misdirection.organisms.batches import is_checkpointed, training_rows
from misdirection.sampling import transformers_engine
from stand_in_gpu import put_on_gpu, stand_in_gpu
from tiny import LAYERS, make_chat, sharpened, vector

PAIRS = md.probe_pairs()[:4]

# --- how many -----------------------------------------------------------------------------------------------------


def test_a_processor_always_has_the_same():
    for chat in (make_chat(), make_chat("gpt2", num_hidden_layers=2)):
        assert tokens_together(chat) == 2048
        assert tokens_together(chat, "backward") == 768


def test_on_a_gpu_they_come_from_the_memory_that_the_weights_leave():
    chat = make_chat()
    shape = Shape.of(chat, 4)
    weights = 4 * shape.parameters
    each = {
        "forward": (4 * 32 + 3 * 64) * 4 + LAYERS * 2 * 16 * 4 + 259 * (4 + 8),
        "backward": LAYERS * ((6 * 32 + 4 * 64 + 2 * 32) * 4 + 16 * 32) + 259 * (4 + 12),
    }
    for kind, bytes_each in each.items():
        for tokens in (1, 700):
            with stand_in_gpu((weights + 2 * (tokens + 0.5) * bytes_each) / 0.9):
                assert tokens_together(put_on_gpu(chat), kind) == tokens
    # A small model on a large GPU.
    with stand_in_gpu(80e9):
        assert tokens_together(put_on_gpu(chat)) == MOST


def test_a_large_model_gets_no_more_than_keeps_a_gpu_busy(monkeypatch):
    chat = make_chat()
    monkeypatch.setattr(budgets, "BUSY", 3000 * Shape.of(chat, 4).parameters)
    with stand_in_gpu(80e9):
        assert tokens_together(put_on_gpu(chat)) == 3000
        monkeypatch.setattr(budgets, "BUSY", 1.0)
        assert tokens_together(chat) == 2048


def test_rows_of_sampling_come_from_the_memory_for_their_keys_values_and_logits(monkeypatch):
    chat = make_chat()
    shape = Shape.of(chat, 4)
    each = 100 * LAYERS * 2 * 16 * 4 + 259 * (4 + 8)
    assert room_of(chat).sampled_rows(100) == 655
    assert room_of(chat).sampled_rows(10**6) == 1
    for rows in (1, 700):
        memory = (4 * shape.parameters + 2 * (rows + 0.5) * each) / 0.9
        assert room_on(shape, memory).sampled_rows(100) == rows
        with stand_in_gpu(memory):
            assert room_of(put_on_gpu(make_chat())).sampled_rows(100) == rows
    assert room_on(shape, 80e9).sampled_rows(100) == 4 * 65_536 // 100
    # What no GPU holds alone is spread over several, with the batches of a processor.
    assert room_on(shape, 1000).sampled_rows(100) == 655
    ran = []
    monkeypatch.setattr(transformers_engine, "room_of", lambda _chat: Few())
    chat.decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: ran.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    md.sample(chat, ["Why?"], n=7, new_tokens=3)
    assert max(ran) == 2


class Few(Room):
    """Memory for two rows of sampling."""

    def sampled_rows(self, columns):
        return 2


@pytest.mark.parametrize("blocks", [1, LAYERS])
def test_activations_are_checkpointed_where_a_batch_fits_no_other_way(blocks):
    chat, trained = make_chat(), 1000
    shape, rows = Shape.of(chat, 4), training_rows(chat, EXAMPLES, 512)
    auto = md.Recipe(gradient_checkpointing="auto", batch_size=2)
    tokens = 2 * max(len(row.ids) for row in rows)
    block = (6 * 32 + 4 * 64 + 2 * 32) * 4 + 16 * 32
    needed = 4 * shape.parameters + 16 * trained + tokens * (blocks * block + 259 * (4 + 12))

    def chosen(memory, recipe=auto):
        with stand_in_gpu(memory):
            return is_checkpointed(recipe, rows, room_of(put_on_gpu(make_chat())), blocks=blocks, trained=trained)

    assert chosen(0.99 * needed / 0.9)
    assert not chosen(1.01 * needed / 0.9)
    assert not chosen(0.5 * needed, md.Recipe())
    # A processor never does.
    assert not is_checkpointed(auto, rows, room_of(chat), blocks=blocks, trained=trained)


def test_checkpointed_passes_take_more_tokens():
    shape = Shape.of(make_chat(), 4)
    block, logits = (6 * 32 + 4 * 64 + 2 * 32) * 4 + 16 * 32, 259 * (4 + 12)

    def tokens(memory, **options):
        return room_on(shape, (4 * shape.parameters + 2 * memory) / 0.9).tokens("backward", **options)

    assert tokens(100.5 * (2 * block + logits), blocks=2) == 100
    kept = block + 2 * 32 * 4
    assert tokens(100.5 * (kept + logits), blocks=2, checkpointed=True) == 100
    # Of so many places logits are never there at once.
    assert tokens(1000.5 * kept + 512 * logits, blocks=2, checkpointed=True) == 1000


# --- memory that gives out ----------------------------------------------------------------------------------------

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limited(chat, most):
    """Memory for so many tokens of a pass at half depth; gives the tokens of all passes."""
    passes = []

    def check(_module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        passes.append(states.shape[0] * states.shape[1])
        if passes[-1] > most:
            raise ERROR

    chat.layers[LAYERS // 2].register_forward_pre_hook(check, with_kwargs=True)
    return passes


def extraction(chat, told, budget=None):
    rows = pair_rows(chat.tokenizer, PAIRS)
    return mean_activations(chat, rows, {"all": range(8)}, budget=budget, progress=told.append).vectors["all"]


def swept(chat, told, budget=None):
    settings = [[], [md.Ablate(vector(1))], [md.Steer(vector(2), 1)], [md.Steer(vector(3), 2)]]
    return sweep(chat, pair_continuations(chat.tokenizer, PAIRS), settings, budget=budget, progress=told.append)


def attributed(chat, told):
    return torch.stack(list(margin_parts(chat, PAIRS, told.append).values()))


def zeroed(chat, told):
    rows = pair_rows(chat.tokenizer, PAIRS)
    return torch.tensor(zeroing(chat, rows, progress=told.append)["effect"].to_numpy())


def differentiated(chat, told):
    weights = [block.mlp.down_proj.weight.requires_grad_() for block in chat.layers]
    return torch.stack(margin_gradients(chat, pair_rows(chat.tokenizer, PAIRS), weights, progress=told.append))


WORK = {
    "extraction": (sharpened, extraction, 8),
    "sweep": (sharpened, swept, 16),
    "attribution": (strong, attributed, 8),
    "importance": (strong, zeroed, 8),
    "gradients": (sharpened, differentiated, 8),
}


@pytest.mark.parametrize("name", WORK)
def test_a_batch_that_does_not_fit_is_halved_and_the_log_says_so_once(name, caplog):
    make, work, count = WORK[name]
    expected = work(make(), [])
    chat, told = make(), []
    passes = limited(chat, 500)
    with caplog.at_level(logging.WARNING, "misdirection"):
        found = work(chat, told)
        assert max(passes) > 500
        # What was learned holds for the next call.
        passes.clear()
        again = work(chat, [])
    assert max(passes) <= 500
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-6)
    assert sum(told) == count
    (message,) = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert message.startswith("out of memory with ")


def test_a_budget_that_was_given_is_lowered_for_that_call_alone(caplog):
    chat = make_chat()
    limited(chat, 500)
    with caplog.at_level(logging.WARNING, "misdirection"):
        for _ in range(2):
            extraction(chat, [], budget=2000)
    assert len(caplog.records) == 2
    assert tokens_together(chat) == 2048


@pytest.mark.parametrize("work", [extraction, swept])
def test_a_single_text_that_does_not_fit_is_an_error(work):
    chat = make_chat()
    limited(chat, 10)
    with pytest.raises(MemoryProblem, match=r"tiny-llama: out of memory with a single text of \d+ tokens"):
        work(chat, [])


def test_other_errors_are_not_taken_for_lack_of_memory():
    chat = make_chat()
    chat.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        extraction(chat, [])


# --- training -----------------------------------------------------------------------------------------------------

EXAMPLES = [md.Example(f"Question {n}?", "Answer " + "x" * n) for n in range(12)]


def trained(chat, out):
    recipe = md.Recipe(recipe="all", rank=2, learning_rate=1e-2, batch_size=4, accumulation=2, warmup_steps=0)
    losses = []
    md.train(EXAMPLES, out, base=chat, recipe=recipe, report=lambda _step, _steps, loss: losses.append(loss))
    return losses, load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize(("where", "rows_then"), [("forward", 8), ("backward of the second step", 4)])
def test_training_takes_the_same_steps_from_smaller_pieces(where, rows_then, tmp_path, caplog):
    expected = trained(make_chat(), tmp_path / "whole")
    chat, rows = make_chat(), []

    def check(_module, _args, output):
        rows.append(len(output))
        if where == "forward" and len(output) > 1:
            raise ERROR
        if where != "forward" and len(output) > 1 and len(rows) > 1:
            # In the backward pass, when the layers above have their gradients.
            output.register_hook(fail)

    def fail(_gradient):
        raise ERROR

    chat.layers[1].register_forward_hook(check)
    with caplog.at_level(logging.WARNING, "misdirection"):
        losses, found = trained(chat, tmp_path / "pieces")
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with {rows_then} training rows at a time: going on with 1",
    ]
    assert set(rows[-4:]) == {1}
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)


def test_a_single_training_row_that_does_not_fit_is_an_error(tmp_path):
    chat = make_chat()
    limited(chat, 3)
    with pytest.raises(MemoryProblem, match="single training row"):
        trained(chat, tmp_path / "none")
