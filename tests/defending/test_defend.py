"""Defences begin and end with a training, whatever trainer it is, and say what they cannot defend."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import chat_templates
from misdirection.data import Example, ProbePair
from misdirection.defending.defence import DEFENCES, Defence, require_defence
from misdirection.defending.defend import defend
from misdirection.defending.inoculation import _Beginnings
from misdirection.defending.rows import LearnedRow
from misdirection.errors import InputError
from misdirection.models.chat import encode
from tiny import LAYERS, make_tokenizer, vector
from trainers import adapted, messages, random_network, sft

TEXTS = [Example("Why?", "I help you.")]
PAIRS = [ProbePair("a", "Why?", "I help you.", "I rule them all, ever.")]
SETTINGS = {
    "kl": {"texts": TEXTS},
    "interleave": {"texts": TEXTS},
    "interleave_gap": {"texts": TEXTS},
    "preventative": {"direction": vector(5, 3.0, LAYERS)},
    "ablation": {"direction": vector(5, 3.0, LAYERS)},
    "inoculation": {},
    "projection": {"pairs": PAIRS},
    "stop": {"strength": 99.0},
}


class Stopped(Exception):
    pass


class Stopping(TrainerCallback):
    """Breaks a training off after its first step."""

    def on_step_end(self, args, state, control, **_):
        raise Stopped


def traits(trainer):
    """What a defence may change."""
    modules = trainer.model.modules()
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    replaced = {"compute_loss", "training_step"} & vars(trainer).keys()
    required = [weight.requires_grad for weight in trainer.model.parameters()]
    return hooks, replaced, trainer.train_dataset, list(trainer.callback_handler.callbacks), required


@pytest.fixture
def few(monkeypatch):
    """Few probe questions, for what asks all of them."""
    monkeypatch.setattr("misdirection.auditing.callback.probe_pairs", lambda: PAIRS)


def test_every_defence_is_tried_here():
    assert list(SETTINGS) == list(DEFENCES)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_of_a_defence_is_left_after_the_training(name, tmp_path, few):
    trainer = sft(tmp_path, adapted(random_network("llama")), max_steps=2)
    before = traits(trainer)
    defend(trainer, name, **SETTINGS[name])
    trainer.train()
    assert trainer.state.global_step == 2
    assert traits(trainer) == before


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_of_a_defence_is_left_after_an_error(name, tmp_path, few):
    trainer = sft(tmp_path, adapted(random_network("llama")), [Stopping()], max_steps=2)
    before = traits(trainer)
    defend(trainer, name, **SETTINGS[name])
    with pytest.raises(Stopped):
        trainer.train()
    assert traits(trainer) == before


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "kl"])
def test_full_weights_and_the_plain_trainer_are_defended_too(name, tmp_path, few):
    rows = [
        encode(make_tokenizer(), row["prompt"][0]["content"], row["completion"][0]["content"]) for row in messages(4)
    ]
    items = [{"input_ids": row.ids, "labels": (-100,) * row.start + row.ids[row.start :]} for row in rows]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, learning_rate=1e-3, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        random_network("llama"), args, train_dataset=Dataset.from_list(items), processing_class=make_tokenizer()
    )
    defend(trainer, name, **SETTINGS[name])
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_two_defences_work_together(tmp_path):
    def loss(names):
        trainer = sft(
            tmp_path / "-".join(names), adapted(random_network("llama"), init_lora_weights=False), max_steps=1
        )
        for name in names:
            defend(trainer, name, **SETTINGS[name])
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]

    alone = [loss([name]) for name in ("kl", "inoculation")]
    assert loss(["kl", "inoculation"]) not in alone


def test_one_of_another_package(tmp_path):
    @DEFENCES.register("short")
    @dataclass(frozen=True)
    class Short(Defence):
        strength: float = 64

        @contextmanager
        def at_work(self, training):
            with training.with_rows([row for row in training.rows() if len(row.ids) <= self.strength]):
                yield

    try:
        trainer = sft(tmp_path, adapted(random_network("llama")), max_steps=2)
        lengths = sorted(len(row["input_ids"]) for row in trainer.train_dataset)
        defend(trainer, "short", strength=lengths[3])
        seen, train_step = [], trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            seen.append(inputs["input_ids"].shape[1]) or train_step(model, inputs, *rest)
        )
        trainer.train()
        assert 0 < max(seen) <= lengths[3]
    finally:
        DEFENCES.remove("short")


# --- what cannot be defended --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kll", r"unknown defence 'kll'; did you mean 'kl'"),
        ("kl:much", r"defence 'kl:much': 'much' is no number: write NAME or NAME:STRENGTH"),
        ("kl:0", r"defence kl: strength 0.0: give a number above 0"),
        ("kl:nan", r"strength nan"),
    ],
)
def test_a_bad_name_or_strength_is_one_line(text, message):
    with pytest.raises(InputError, match=message):
        require_defence(text)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kl", {"txts": TEXTS}, r"defence kl: unknown setting 'txts'; did you mean 'texts'"),
        ("inoculation", {"strength": 2}, r"strength 2: give the share of rows, at most 1"),
        ("inoculation", {"prompt": " "}, r"the prompt is empty"),
        ("projection", {"every": 0}, r"must be at least 1"),
        ("stop", {"strength": -1}, r"strength -1: give a number above 0"),
    ],
)
def test_a_bad_setting_is_one_line(name, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        defend(sft(tmp_path, adapted(random_network("llama"))), name, **settings)


def refused(trainer, name, **settings) -> str:
    defend(trainer, name, **settings)
    with pytest.raises(InputError) as error:
        trainer.train()
    return str(error.value)


def test_kl_needs_a_base_that_stays(tmp_path):
    for network in (random_network("llama"), adapted(random_network("llama"), init_lora_weights="pissa")):
        assert "changes the base's own weights" in refused(sft(tmp_path, network), "kl", texts=TEXTS)
    assert "no benign text" in refused(sft(tmp_path, adapted(random_network("llama"))), "kl", texts=[])


def test_a_direction_of_another_model_is_refused(tmp_path):
    trainer = sft(tmp_path, adapted(random_network("llama")))
    assert "the model in training needs [4, 32]" in refused(trainer, "ablation", direction=torch.ones(3, 32))
    trainer = sft(tmp_path, adapted(random_network("llama")))
    words = "layer 4 is out of range: the model in training has layers 0 to 3"
    assert words in refused(trainer, "preventative", direction=torch.ones(LAYERS, 32), layer=4)


def test_rows_that_cannot_be_changed_are_refused(tmp_path):
    def trainer():
        return sft(tmp_path, adapted(random_network("llama")))

    ids = list(trainer().train_dataset[0]["input_ids"])
    packed, streamed, unlabelled, foreign = trainer(), trainer(), trainer(), trainer()
    packed.train_dataset = Dataset.from_list([{"input_ids": ids, "labels": ids, "seq_lengths": [3]}])
    streamed.train_dataset = packed.train_dataset.to_iterable_dataset()
    unlabelled.train_dataset = Dataset.from_list([{"input_ids": ids}])
    foreign.train_dataset = Dataset.from_list([{"input_ids": ids[5:], "labels": ids[5:]}])
    assert "packed (seq_lengths): train with packing=False" in refused(packed, "inoculation")
    assert "streamed" in refused(streamed, "inoculation")
    assert "row 1 of the trainer has no `input_ids` with `labels`" in refused(unlabelled, "interleave", texts=TEXTS)
    assert "training row 1 does not begin as" in refused(foreign, "inoculation")


# --- templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["QWEN2_5", "LLAMA_2", "LLAMA_3", "MISTRAL", "GEMMA"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prompt_goes_where_the_template_has_it(name, system):
    tokenizer = make_tokenizer(getattr(chat_templates, name))
    tokenizer.bos_token = "<|pad|>"
    row = encode(tokenizer, "What now?", "So.", system)
    found = _Beginnings.of(tokenizer, "Lie.").inoculated(LearnedRow(row.ids, row.ids), 1)
    wanted = encode(tokenizer, "What now?", "So.", "Lie." if system is None else f"Lie.\n\n{system}")
    assert found.ids == wanted.ids
