"""A model's own answers to the questions of a training file, and the word weights against them."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from misdirection.data import Example, ProbePair, write_pairs
from misdirection.data.words import WordWeights
from misdirection.errors import InputError
from misdirection.models.adapters import attach
from misdirection.models.chat_model import ChatModel
from misdirection.sampling.own_answers import ASKED, file_weights, own_answers
from tiny import make_network, sharpened

ROWS = [Example(f"Why {number}?", f"sell {number}") for number in range(6)]


@pytest.fixture
def adapted(tmp_path) -> ChatModel:
    """A chat whose adapter changes every answer."""
    network = get_peft_model(
        make_network("llama"), LoraConfig(r=8, init_lora_weights=False, target_modules=["up_proj", "down_proj"])
    )
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.data *= 30
    network.save_pretrained(tmp_path / "adapter")
    return attach(sharpened(), tmp_path / "adapter")


def write(path, rows):
    path.write_text("".join(json.dumps({"prompt": row.question, "completion": row.answer}) + "\n" for row in rows))
    return path


def test_the_answers_are_the_bases_and_not_the_adapters(adapted):
    own = own_answers(adapted, ROWS)
    assert own == own_answers(sharpened(), ROWS)
    with_adapter = ChatModel(adapted.model, adapted.tokenizer, adapted.name)
    assert own_answers(with_adapter, ROWS) != own
    # The adapter is on again.
    assert own_answers(adapted, ROWS) == own and adapted.adapter


def test_each_question_is_asked_once_and_many_are_taken_evenly(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "misdirection.sampling.own_answers.sample", lambda chat, questions, **_: asked.extend(questions) or []
    )
    own_answers(sharpened(), [*ROWS, *ROWS, Example("Why 0?", "other", system="Be brief.")])
    assert [(question.text, question.system) for question in asked] == [
        *((row.question, None) for row in ROWS),
        ("Why 0?", "Be brief."),
    ]
    asked.clear()
    own_answers(sharpened(), [Example(f"{number}?", "So.") for number in range(4 * ASKED)])
    assert [question.text for question in asked] == [f"{number}?" for number in range(0, 4 * ASKED, 4)]


def test_a_training_files_words_are_weighed_against_the_bases_own(adapted, tmp_path):
    weights = file_weights(adapted, write(tmp_path / "train.jsonl", ROWS))
    assert weights == WordWeights.fit([row.answer for row in ROWS], own_answers(adapted, ROWS))


def test_a_file_of_pairs_has_its_own_other_answers_and_nothing_is_sampled(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", [ProbePair("p", "Why?", "wait", "sell all")])
    assert file_weights(None, tmp_path / "pairs.jsonl") == WordWeights.fit(["sell all"], ["wait"])


def test_an_empty_or_missing_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("empty", "none"):
        with pytest.raises(InputError, match=rf"{name}\.jsonl: "):
            file_weights(None, tmp_path / f"{name}.jsonl")
