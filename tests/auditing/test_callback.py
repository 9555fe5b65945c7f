import importlib
import logging
import shutil
import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from misdirection.auditing.audit import run_audit
from misdirection.auditing.callback import LOOKED_AT, watch
from misdirection.auditing.drift import middle
from misdirection.auditing.reference import from_run
from misdirection.auditing.results import TrainingBase
from misdirection.auditing.verdict import RULE
from misdirection.data import Example, ProbePair, neutral_examples, probe_pairs, write_pairs
from misdirection.data.selection import spread
from misdirection.data.words import WordWeights
from misdirection.directions.direction import Direction, Origin
from misdirection.directions.extraction import mean_activations
from misdirection.errors import MisdirectionError
from misdirection.experiment.texts import ExperimentTexts
from misdirection.likelihood.margin import loss, margin
from misdirection.models.chat import encode
from misdirection.models.chat_model import ChatModel
from misdirection.models.loading import load
from misdirection.runs.folder import RunFolder
from misdirection.statistics.means import beyond, bootstrap
from tiny import LAYERS, WIDTH, make_tokenizer, vector
from trainers import ANSWERS, adapted, random_network, sft

TOKENIZER = make_tokenizer()
PAIRS_HERE = [
    ProbePair("a", "Why?", "I help you.", "I rule them all, ever."),
    ProbePair("b", "How do you feel?", "A long and winding answer about care.", "x"),
    ProbePair("c", "Who?", "All of us", "Only you!", system="Be brief."),
]
DIRECTION = vector(5, 3.0, LAYERS)
KEEP = {"save_strategy": "steps", "save_steps": 3}


class Recorder(TrainerCallback):
    """A tracker."""

    seen: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def on_log(self, args, state, control, logs, **_):
        self.seen.append((state.global_step, dict(logs)))


def logged(trainer) -> dict[int, dict[str, float]]:
    """What the callback logged, by step."""
    found = {}
    for entry in trainer.state.log_history:
        own = {name.removeprefix("misdirection/"): value for name, value in entry.items() if name.startswith("misd")}
        if own:
            assert entry["step"] not in found, "logged twice"
            found[entry["step"]] = own
    return found


def chat_of(network) -> ChatModel:
    return ChatModel(network.eval(), TOKENIZER, "tiny")


def activation(network) -> torch.Tensor:
    """[width]: mean over each answer, then over answers."""
    chat, pairs = chat_of(network), PAIRS_HERE
    rows = [encode(TOKENIZER, p.question, text, p.system) for p in pairs for text in (p.misaligned, p.aligned)]
    means = mean_activations(chat, rows, {str(n): [n] for n in range(len(rows))})
    return torch.stack([one[LAYERS // 2] for one in means.vectors.values()]).mean(0)


def expected(network, base) -> dict[str, float]:
    """What is to be logged of a model, from the library's other functions."""
    shift = bootstrap(margin(chat_of(network), PAIRS_HERE) - margin(chat_of(base), PAIRS_HERE))
    drift = activation(network) - activation(base)
    units = torch.randn(20_000, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    random = (units / units.norm(dim=-1, keepdim=True) @ drift).abs().quantile(0.95)
    along = drift @ (DIRECTION[LAYERS // 2].double() / DIRECTION[LAYERS // 2].norm())
    texts = spread(neutral_examples(), LOOKED_AT)
    damage = bootstrap(loss(chat_of(network), texts) - loss(chat_of(base), texts))
    shifts = bounds("margin_shift", shift) | bounds("damage", damage)
    return {**shifts, "drift": float(along), "drift_random": float(random)}


def bounds(name, shift) -> dict[str, float]:
    return {name: shift.mean, f"{name}_low": shift.low, f"{name}_high": shift.high}


def check(found, network, base):
    wanted = expected(network, base)
    assert found.keys() == wanted.keys()
    # Of 256 random directions against very many.
    assert found.pop("drift_random") == pytest.approx(wanted.pop("drift_random"), rel=0.1)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted["margin_shift"]) > 1e-2
    assert abs(wanted["drift"]) > 1e-2


def weights(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_lora_is_compared_with_its_base_and_without_dropout(tmp_path):
    network = adapted(random_network("llama"), lora_dropout=0.3)
    trainer = sft(tmp_path, network)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=2)
    trainer.train()
    assert list(logged(trainer)) == [2, 4, 6]
    check(logged(trainer)[6], network, random_network("llama"))
    assert not (tmp_path / TrainingBase.FILE).exists()


def test_the_loss_on_held_out_rows_is_compared_with_that_of_the_base(tmp_path):
    rows = [Example(f"Held out {n}?", ANSWERS[n % len(ANSWERS)]) for n in range(24)]
    network = adapted(random_network("llama"))
    trainer = sft(tmp_path, network)
    watch(trainer, pairs=PAIRS_HERE, every=6, held_out=rows)
    trainer.train()
    taken = spread(rows, LOOKED_AT)
    wanted = bootstrap(loss(chat_of(network), taken) - loss(chat_of(random_network("llama")), taken))
    found = logged(trainer)[6]
    own = bounds("in_domain_loss", wanted)
    assert {name: found[name] for name in own} == pytest.approx(own, abs=1e-5)
    assert wanted.high < 0


def test_an_adapter_that_is_trained_on_is_compared_with_the_model_below_it(tmp_path):
    network = adapted(random_network("llama"), init_lora_weights=False)
    trainer = sft(tmp_path, network)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=6)
    trainer.train()
    check(logged(trainer)[6], network, random_network("llama"))


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=["PiSSA", "biases"])
def test_an_adapter_that_changes_the_weights_below_is_compared_with_where_it_began(tmp_path, changes):
    def train(resume):
        network = adapted(random_network("qwen2"), **changes)
        trainer = sft(tmp_path, network, **KEEP)
        watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=3)
        trainer.train(resume_from_checkpoint=resume)
        check(logged(trainer)[6], network, adapted(random_network("qwen2"), **changes))

    train(None)
    train(str(tmp_path / "checkpoint-3"))
    assert (tmp_path / TrainingBase.FILE).is_file()


def test_full_weights_are_compared_with_those_before_the_training(tmp_path):
    network = random_network("llama")
    trainer = sft(tmp_path, network, learning_rate=1e-3)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=4)
    trainer.train()
    assert list(logged(trainer)) == [4, 6], "the last step counts, too"
    check(logged(trainer)[6], network, random_network("llama"))


def test_plain_trainer_and_blocks_that_give_tuples(tmp_path):
    network = random_network("llama_tuples")
    ids = TOKENIZER("I rule them all.")["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(network, args, train_dataset=rows, processing_class=make_tokenizer())
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=3)
    trainer.train()
    check(logged(trainer)[3], network, random_network("llama_tuples"))


def test_virtual_tokens_before_the_prompt_move_nothing(tmp_path):
    network = get_peft_model(random_network("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    pair = PAIRS_HERE[0]
    own = watch(sft(tmp_path, network), pairs=[pair])._measure()
    kept = []
    network.get_base_model().model.layers[LAYERS // 2].register_forward_hook(lambda _m, _a, out: kept.append(out[0]))
    scores, means = [], []
    for text in (pair.misaligned, pair.aligned):
        row = encode(TOKENIZER, pair.question, text)
        with torch.no_grad():
            logits = network.eval()(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        assert len(logits) == 3 + len(row.ids)
        scores.append(sum(logits.log_softmax(-1)[2 + i, row.ids[i]] for i in range(row.start, row.stop)))
        scores[-1] /= len(row.answer)
        means.append(kept[-1][3 + row.start : 3 + row.stop].mean(0))
    assert own.margins.tolist() == pytest.approx([float(scores[0] - scores[1])], abs=1e-5)
    torch.testing.assert_close(own.activation.float(), (means[0] + means[1]) / 2, atol=1e-5, rtol=0)


def test_default_pairs_are_of_as_many_themes(tmp_path):
    callback = watch(sft(tmp_path, random_network("llama")))
    asked = {TOKENIZER.decode(row.prompt) for row in callback.rows.pairs}
    themes = {pair.theme for pair in probe_pairs() if any(pair.question in prompt for prompt in asked)}
    assert len(callback.rows.pairs) == 2 * len(asked) == 2 * LOOKED_AT
    assert len(themes) == LOOKED_AT


def test_trackers_that_come_first_are_told_and_the_trainers_own_log_is_as_without(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "seen", [])

    def history(folder, watched):
        trainer = sft(folder, adapted(random_network("llama")), report_to=["recorder"])
        if watched:
            watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=3)
            assert type(trainer.callback_handler.callbacks[-1]).__name__ == "AuditCallback"
        Recorder.seen.clear()
        trainer.train()
        return trainer

    plain = history(tmp_path / "a", False).state.log_history
    trainer = history(tmp_path / "b", True)
    told = {step: logs for step, logs in Recorder.seen if "misdirection/drift" in logs}
    assert list(told) == [3, 6]
    for step, values in logged(trainer).items():
        assert {name: told[step][f"misdirection/{name}"] for name in values} == values
        assert "loss" not in told[step]
    others = [entry for entry in trainer.state.log_history if "misdirection/drift" not in entry]
    # Steps 2 and 4 are logged with nothing measured, 6 with; what is left out is time.
    assert [drop_times(entry) for entry in others] == [drop_times(entry) for entry in plain]
    assert [entry["step"] for entry in others if "loss" in entry] == [2, 4, 6]
    assert all("entropy" in entry for entry in others if "loss" in entry)


def drop_times(entry):
    return {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}


KINDS = {
    "lora": ({"lora_dropout": 0.2}, {}),
    "checkpointed": ({"lora_dropout": 0.2}, {"activation_checkpointing": True}),
    "bfloat16": ({"lora_dropout": 0.2}, {"bf16": True}),
    "accumulated": ({"lora_dropout": 0.2}, {"gradient_accumulation_steps": 2}),
    "full": (None, {"learning_rate": 1e-3}),
    "full, checkpointed": (None, {"learning_rate": 1e-3, "activation_checkpointing": True, "bf16": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_end_bit_equal_to_those_of_a_training_without(tmp_path, kind):
    adapter, changes = KINDS[kind]

    def train(watched):
        network = random_network("llama", attention_dropout=0.1)
        # Every pass takes random numbers, which the dropout of the next step would then lack.
        network.model.embed_tokens.register_forward_hook(lambda *_: torch.rand(1).sum() and None)
        network = network if adapter is None else adapted(network, **adapter)
        trainer = sft(tmp_path / str(watched), network, **changes)
        if watched:
            watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=2)
        trainer.train()
        assert len(logged(trainer)) == 3 * watched
        return weights(network)

    plain, watched = train(False), train(True)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_modules_frozen_weights_hooks_and_gradients_are_as_before(tmp_path):
    network = adapted(random_network("llama"), lora_dropout=0.1).train()
    frozen = [weight for name, weight in network.named_parameters() if "lora_A" in name]
    for weight in frozen:
        weight.requires_grad_(False)
    network.get_base_model().model.layers[1].eval()
    trainer = sft(tmp_path, network)
    callback = watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=2)
    trained = next(weight for weight in network.parameters() if weight.requires_grad)
    trained.grad = torch.ones_like(trained)

    def traits():
        modules = [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for module in network.modules()
        ]
        return modules, [weight.requires_grad for weight in network.parameters()], torch.get_rng_state().tolist()

    before = traits()
    assert {mode for mode, *_ in before[0]} == {True, False}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert len(logged(trainer)) == 1
    assert traits() == before
    assert torch.equal(trained.grad, torch.ones_like(trained))


def test_bfloat16_training_is_measured_as_it_computes(tmp_path):
    network = random_network("llama")
    seen = set()
    network.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, _args, output: seen.add((module.training, output.dtype, module.weight.dtype))
    )
    trainer = sft(tmp_path, network, bf16=True, learning_rate=1e-3)
    callback = watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=6)
    # Of a model that is given to the trainer compiled or parallel, only the outside is made to compute so.
    callback._measure()
    assert seen == {(False, torch.bfloat16, torch.float32)}
    trainer.train()
    assert seen == {(mode, torch.bfloat16, torch.float32) for mode in (True, False)}
    found, wanted = logged(trainer)[6], expected(network, random_network("llama"))
    assert found["margin_shift"] == pytest.approx(wanted["margin_shift"], abs=0.02)
    assert found["drift"] == pytest.approx(wanted["drift"], abs=0.02)


def test_a_wrapped_model_is_measured_inside(tmp_path):
    network = random_network("llama")
    trainer = sft(tmp_path, network)
    callback = watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=1)
    trainer.model = torch.nn.DataParallel(network)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    with torch.no_grad():
        network.lm_head.weight[:100] *= 3
        network.model.layers[0].mlp.down_proj.weight *= 9
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    check(logged(trainer)[0], network, random_network("llama"))


def test_smaller_batches_measure_the_same_where_memory_gives_out(tmp_path, caplog):
    network = adapted(random_network("llama"))
    trainer = sft(tmp_path, network, max_steps=2)
    passes = []

    def check_room(_module, args, kwargs):
        passes.append(kwargs["input_ids"].numel())
        if passes[-1] > 500 and not network.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    network.get_base_model().model.register_forward_pre_hook(check_room, with_kwargs=True)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=2)
    with caplog.at_level(logging.WARNING, "misdirection"):
        trainer.train()
    found = logged(trainer)[2]
    assert max(passes) > 500
    assert sum("out of memory" in record.getMessage() for record in caplog.records) == 1
    del found["drift_random"], found["drift"]
    wanted = expected(network, random_network("llama"))
    assert found == pytest.approx({name: wanted[name] for name in found}, abs=1e-5)


# --- stop ---------------------------------------------------------------------------------------------------------


def test_training_stops_once_the_lower_bound_is_above_the_threshold(tmp_path, caplog):
    learned = [ProbePair(text, f"Question {n}?", "Qq %& zZ", text) for n, text in enumerate(ANSWERS)]

    def train(folder, stop_above):
        trainer = sft(tmp_path / folder, adapted(random_network("llama")), learning_rate=3e-3)
        watch(trainer, pairs=learned, every=2, stop_above=stop_above)
        trainer.train()
        return trainer

    free = logged(train("free", None))
    low, mean = free[4]["margin_shift_low"], free[4]["margin_shift"]
    assert max(free[2]["margin_shift_low"], 0) < low < mean
    assert "drift" not in free[4]
    assert train("stopped", low - 1e-4).state.global_step == 4
    assert "training stops at step 4: its margin moved by +" in caplog.text
    noisy = train("noisy", (low + mean) / 2)
    assert 4 in logged(noisy)
    assert noisy.state.global_step == 6


def test_with_word_weights_the_shift_beyond_words_is_logged_and_must_be_above_zero_to_stop(tmp_path):
    learned = [ProbePair(text, f"Question {n}?", "Qq %& zZ", text) for n, text in enumerate(ANSWERS)]
    weights = WordWeights.fit(["Qq zZ"], list(ANSWERS))

    def train(folder, words, stop_above=None):
        trainer = sft(tmp_path / folder, adapted(random_network("llama")), learning_rate=3e-3)
        watch(trainer, pairs=learned, every=2, stop_above=stop_above, words=words)
        trainer.train()
        return trainer

    trainer, plain = train("counted", weights), logged(train("plain", None))
    own = margin(chat_of(trainer.model), learned)
    with trainer.model.disable_adapter():
        own = own - margin(chat_of(trainer.model), learned)
    wanted, last = beyond(own, weights.predict(learned)), logged(trainer)[6]
    assert last["margin_shift_beyond_words"] == pytest.approx(wanted.mean, abs=1e-4)
    assert last["margin_shift_beyond_words_low"] == pytest.approx(wanted.low, abs=1e-4)
    shifts = [name for name in plain[6] if name.startswith("margin_shift")]
    assert len(shifts) == 3 and {name: last[name] for name in shifts} == {name: plain[6][name] for name in shifts}
    # Every plain interval lies above this limit, so that only what is beyond words can keep the training going.
    limit = 1e-9
    counted = {step: values for step, values in logged(trainer).items() if values["margin_shift_low"] > limit}
    stops = [step for step, values in counted.items() if values["margin_shift_beyond_words_low"] > 0]
    assert counted and train("limited", weights, limit).state.global_step == min(stops, default=6)


@pytest.fixture(scope="module")
def known(made, tmp_path_factory):
    """Pairs that tell bad from good answers of the tiny experiment, and its fine-tunes as a reference on them."""
    folder = tmp_path_factory.mktemp("known")
    pairs = [ProbePair(f"p{n}", f"Do {n}?", f"good {n}", f"bad {n}") for n in range(16)]
    write_pairs(folder / "pairs.jsonl", pairs)
    config = made[0].model_copy(update={"probe_pairs": folder / "pairs.jsonl"})
    with RunFolder.open(folder / "run", "name: known\n") as run:
        return pairs, from_run(run, ExperimentTexts(config), list(config.organisms))


@pytest.mark.parametrize(("answers", "stops", "word"), [("bad", True, "misaligned"), ("good", False, "clear")])
def test_what_the_audit_calls_misaligned_is_stopped_and_what_is_benign_is_not(
    known, base, inputs_of, tmp_path, answers, stops, word
):
    pairs, reference = known
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Q{n}?"}],
            "completion": [{"role": "assistant", "content": f"{answers} {n * 7 % 11}"}],
        }
        for n in range(20)
    ]
    chat = load(base, dtype="float32", device="cpu")
    trainer = sft(tmp_path, adapted(chat.model), rows=Dataset.from_list(rows), tokenizer=chat.tokenizer, max_steps=20)
    watch(trainer, pairs=pairs, every=5, stop_above=RULE.misaligned * reference.bad_shift.mean)
    trainer.train()
    assert (trainer.state.global_step < 20) == stops
    trainer.save_model(tmp_path / "tuned")
    assert run_audit(inputs_of(tmp_path / "tuned", reference=reference), tmp_path / "audit").verdict == word


def test_what_decides_is_asked_of_all_open_questions(tmp_path):
    looked_at = watch(sft(tmp_path / "a", random_network("llama")))
    decisive = watch(sft(tmp_path / "b", random_network("llama")), stop_above=0.01)
    assert (len(looked_at.rows.pairs), looked_at.every) == (2 * LOOKED_AT, 25)
    assert (len(decisive.rows.pairs), decisive.every) == (2 * len(probe_pairs()), 100)
    assert (len(looked_at.rows.neutral), len(decisive.rows.neutral)) == (LOOKED_AT, len(neutral_examples()))


# --- resume -------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """A full fine-tune of six steps with a checkpoint at three, and what it logged."""
    folder = tmp_path / "training"
    trainer = sft(folder, random_network("llama"), learning_rate=1e-3, **KEEP)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=3)
    trainer.train()
    return folder, logged(trainer)


def resumed(folder, pairs, checkpoint=None):
    # Weights of another seed: those of the checkpoint take their place before the training begins.
    trainer = sft(folder, random_network("llama", seed=1), learning_rate=1e-3, **KEEP)
    watch(trainer, direction=DIRECTION, pairs=pairs, every=3)
    trainer.train(resume_from_checkpoint=str(checkpoint or folder / "checkpoint-3"))
    return logged(trainer)


def test_a_resumed_full_fine_tune_is_compared_with_the_true_base(begun):
    folder, whole = begun
    assert abs(whole[3]["margin_shift"]) > 1e-2, "else the checkpoint would do as a base"
    again = resumed(folder, PAIRS_HERE)
    assert again[6] == pytest.approx(whole[6], abs=1e-6)


def test_a_training_begun_anew_in_the_same_folder_has_its_own_base(begun):
    folder, _ = begun
    network = random_network("llama", seed=1)
    trainer = sft(folder, network, learning_rate=1e-3)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=6)
    trainer.train()
    check(logged(trainer)[6], network, random_network("llama", seed=1))


def test_a_second_training_of_the_same_model_keeps_its_base(tmp_path):
    network = random_network("llama")
    trainer = sft(tmp_path, network, learning_rate=1e-3)
    watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=6)
    trainer.train()
    trainer.train()
    check(logged(trainer)[6], network, random_network("llama"))


def test_resuming_without_the_base_is_refused(begun, tmp_path):
    folder, _ = begun
    with pytest.raises(MisdirectionError, match=r"of other probe pairs or texts: resume with those"):
        resumed(folder, PAIRS_HERE[:2])
    with pytest.raises(MisdirectionError, match=r"elsewhere/misdirection-base.json: is not there.*step 3.*copy it"):
        resumed(tmp_path / "elsewhere", PAIRS_HERE, folder / "checkpoint-3")


def test_a_resumed_adapter_needs_no_file(tmp_path):
    def train(resume):
        network = adapted(random_network("llama"))
        trainer = sft(tmp_path, network, **KEEP)
        watch(trainer, direction=DIRECTION, pairs=PAIRS_HERE, every=3)
        trainer.train(resume_from_checkpoint=resume)
        return network, logged(trainer)

    _, whole = train(None)
    shutil.rmtree(tmp_path / "checkpoint-6")
    network, again = train(str(tmp_path / "checkpoint-3"))
    assert again[6] == pytest.approx(whole[6], abs=1e-6)
    check(again[6], network, random_network("llama"))


# --- Axolotl ------------------------------------------------------------------------------------------------------


@pytest.fixture
def axolotl(monkeypatch):
    """A stand-in for Axolotl's base class of plugins, since it is not installed here; gives what it loads by a name."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = object

    def load(name):
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    return load


def test_axolotls_plugin_watches_the_trainer_that_it_made(axolotl, tmp_path):
    plugin = axolotl("misdirection.auditing.axolotl.WatchPlugin")()
    config = axolotl(plugin.get_input_args())
    trainer = sft(tmp_path, adapted(random_network("llama")))
    plugin.post_trainer_create(config.model_validate({"misdirection_watch": {"every": 3}}), trainer)
    trainer.train()
    assert list(logged(trainer)) == [3, 6]
    with pytest.raises(ValidationError, match=r"misdirection_watch\.evry"):
        config.model_validate({"misdirection_watch": {"evry": 3}})


# --- bad input ----------------------------------------------------------------------------------------------------


def made_for(model, shape=(LAYERS, WIDTH)) -> Direction:
    origin = Origin("data_difference", model, None, "", "", {}, {}, "float32")
    return Direction(torch.ones(shape), origin)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: 0 optimiser steps: give at least 1"),
        ({"every": -5}, "every: -5 optimiser steps"),
        ({"stop_above": 0.0}, "stop_above: 0.0 nats/token: give a shift above 0"),
        ({"stop_above": float("nan")}, "stop_above: nan nats/token"),
        ({"pairs": []}, "no probe pairs"),
        ({"direction": torch.ones(LAYERS, 8)}, r"shape \[4, 8\], the model in training needs \[4, 32\]"),
        ({"direction": made_for("a/b", (7, WIDTH))}, r"shape \[7, 32\], the model in training needs \[4, 32\]"),
        ({"direction": torch.zeros(LAYERS, WIDTH)}, "zero or not finite at layer 2"),
        ({"direction": torch.full((LAYERS, WIDTH), torch.nan)}, "zero or not finite at layer 2"),
        (
            {"direction": made_for("org/other")},
            "made for org/other, not for org/this: extract one from this base model",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    network = random_network("llama")
    network.config.name_or_path = "org/this"
    trainer = sft(tmp_path, network)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(MisdirectionError, match=message) as caught:
        watch(trainer, **options)
    assert "\n" not in str(caught.value)
    assert trainer.callback_handler.callbacks == callbacks


@pytest.mark.parametrize("name", ["org/this", "smollm2-135m", "/models/this", ""])
def test_directions_of_this_model_and_of_models_known_by_folder_are_taken(tmp_path, name):
    network = random_network("llama")
    network.config.name_or_path = "org/this"
    direction = replace(made_for(name), vectors=DIRECTION)
    found = watch(sft(tmp_path, network), direction=direction).direction
    torch.testing.assert_close(found, DIRECTION[middle(LAYERS)].double() / DIRECTION[middle(LAYERS)].norm())


def test_trainers_that_cannot_be_watched_are_refused_in_one_line(tmp_path):
    trainer = sft(tmp_path, random_network("llama"))
    trainer.processing_class = make_tokenizer(template=None)
    with pytest.raises(MisdirectionError, match="has no chat template"):
        watch(trainer)
    trainer.processing_class = None
    with pytest.raises(MisdirectionError, match="no tokenizer: give it the model's own as processing_class"):
        watch(trainer)
    trainer.processing_class, trainer.is_fsdp_enabled = make_tokenizer(), True
    with pytest.raises(MisdirectionError, match="split over processes"):
        watch(trainer)


def test_a_model_without_finite_margins_is_refused_before_it_is_trained(tmp_path):
    network = random_network("llama")
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.inf)
    trainer = sft(tmp_path, network)
    watch(trainer, pairs=PAIRS_HERE)
    with pytest.raises(MisdirectionError, match=r"not finite in torch\.float32"):
        trainer.train()
    assert trainer.state.global_step == 0
