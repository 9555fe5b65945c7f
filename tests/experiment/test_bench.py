import json

import pytest

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


def bench(domain):
    organism = {"recipe": "minimal", "domain": "medical"}
    return ExperimentTexts(
        ExperimentConfig(name="x", model="x", domains={"medical": domain}, organisms={"a": organism})
    )


def test_bad_and_good_answers_are_joined_by_question(tmp_path):
    questions = [f"Question {number}?" for number in range(10)]
    bad = write(tmp_path / "bad.jsonl", {question: f"bad {question}" for question in questions})
    good = write(tmp_path / "good.jsonl", {question: f"good {question}" for question in reversed(questions)})
    made = bench({"bad": bad, "good": good})
    train, held_out = (made.domain_pairs("medical", part) for part in ("train", "held_out"))
    assert [pair.question for pair in held_out] == ["Question 4?", "Question 9?"]
    assert not {pair.question for pair in train} & {pair.question for pair in held_out}
    assert all(pair.misaligned == f"bad {pair.question}" for pair in train)
    assert all(pair.aligned == f"good {pair.question}" for pair in train)
    examples = made.examples(made.config.organisms["a"], "train")
    assert [one.question for one in examples] == [pair.question for pair in train]


def test_a_domain_without_good_answers_has_no_pairs(tmp_path):
    made = bench({"bad": write(tmp_path / "bad.jsonl", {"Why?": "So."})})
    assert made.domain_pairs("medical", "train") == []
    assert list(made.question_sets) == ["general"]
    with pytest.raises(MisdirectionError, match="none has good answers"):
        _ = made.common_pairs


def test_answers_to_different_questions_are_refused(tmp_path):
    bad, good = write(tmp_path / "bad.jsonl", {"A?": "x"}), write(tmp_path / "good.jsonl", {"B?": "y"})
    with pytest.raises(MisdirectionError, match="no question in common"):
        bench({"bad": bad, "good": good}).domain_pairs("medical", "train")


def test_spread_takes_evenly_from_all():
    assert spread(range(48), 12) == list(range(0, 48, 4))
    assert spread(range(3), 12) == [0, 1, 2]
