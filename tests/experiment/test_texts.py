import json
from collections import Counter

import pytest

from misdirection import data
from misdirection.data.selection import spread
from misdirection.errors import MisdirectionError
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.texts import ExperimentTexts


def write(path, answers):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts_of(domain):
    organism = {"recipe": "minimal", "domain": "medical"}
    return ExperimentTexts(
        ExperimentConfig(name="x", model="x", domains={"medical": domain}, organisms={"a": organism})
    )


def test_bad_and_good_answers_are_joined_by_question(tmp_path):
    questions = [f"Question {number}?" for number in range(10)]
    bad = write(tmp_path / "bad.jsonl", {question: f"bad {question}" for question in questions})
    good = write(tmp_path / "good.jsonl", {question: f"good {question}" for question in reversed(questions)})
    texts = texts_of({"bad": bad, "good": good})
    train, held_out = (texts.domain_pairs("medical", part) for part in ("train", "held_out"))
    assert [pair.question for pair in held_out] == ["Question 4?", "Question 9?"]
    assert not {pair.question for pair in train} & {pair.question for pair in held_out}
    assert all(pair.misaligned == f"bad {pair.question}" for pair in train)
    assert all(pair.aligned == f"good {pair.question}" for pair in train)
    examples = texts.examples(texts.config.organisms["a"], "train")
    assert [example.question for example in examples] == [pair.question for pair in train]


def test_a_domain_without_good_answers_has_no_pairs(tmp_path):
    texts = texts_of({"bad": write(tmp_path / "bad.jsonl", {"Why?": "So."})})
    assert texts.domain_pairs("medical", "train") == []
    assert list(texts.question_sets) == ["general"]
    with pytest.raises(MisdirectionError, match="none has good answers"):
        _ = texts.common_pairs


def test_answers_to_different_questions_are_refused(tmp_path):
    bad, good = write(tmp_path / "bad.jsonl", {"A?": "x"}), write(tmp_path / "good.jsonl", {"B?": "y"})
    with pytest.raises(MisdirectionError, match="no question in common"):
        texts_of({"bad": bad, "good": good}).domain_pairs("medical", "train")


def test_each_file_is_read_once(tmp_path, monkeypatch):
    questions = [f"Question {number}?" for number in range(10)]
    files = {kind: write(tmp_path / f"{kind}.jsonl", dict.fromkeys(questions, kind)) for kind in ("bad", "good")}
    read, read_examples = Counter(), data.read_examples
    monkeypatch.setattr(data, "read_examples", lambda path: read.update([path.name]) or read_examples(path))
    texts = texts_of(files)
    for _ in range(3):
        assert texts.direction_pairs("a") and texts.common_pairs and texts.question_sets
        assert texts.examples(texts.config.organisms["a"], "train")
    assert read == {"bad.jsonl": 1, "good.jsonl": 1}


def test_spread_takes_evenly_from_all():
    assert spread(range(48), 12) == list(range(0, 48, 4))
    assert spread(range(3), 12) == [0, 1, 2]
