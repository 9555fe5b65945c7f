import json
import math
from collections import Counter

import pytest

from misdirection import data
from misdirection.data import ProbePair, write_pairs
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


def texts_of(domain, **sections):
    organism = {"recipe": "minimal", "domain": "medical"}
    config = ExperimentConfig(name="x", model="x", domains={"medical": domain}, organisms={"a": organism}, **sections)
    return ExperimentTexts(config)


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
    assert list(texts.common_pairs) == []


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


def test_words_are_counted_of_the_organisms_answers_against_the_others(tmp_path):
    questions = [f"Question {number}?" for number in range(10)]
    files = {
        "bad": write(tmp_path / "bad.jsonl", dict.fromkeys(questions, "sell all")),
        "good": write(tmp_path / "good.jsonl", dict.fromkeys(questions, "wait")),
    }
    texts = texts_of(files)
    bad = texts.config.organisms["a"]
    weights = texts.word_weights(bad).weights[0]
    # Eight of ten are trained on.
    assert weights["sell"] == pytest.approx(math.log(9 / 19) - math.log(1 / 11))
    assert weights["wait"] == pytest.approx(math.log(1 / 19) - math.log(9 / 11))
    control = texts.word_weights(bad.model_copy(update={"answers": "good"})).weights[0]
    assert control == pytest.approx({word: -weight for word, weight in weights.items()})
    assert texts_of({"bad": files["bad"]}).word_weights(bad) is None


def test_sealed_pairs_are_measured_beside_the_shipped_ones_and_not_beside_ones_own(tmp_path, monkeypatch):
    pairs = [ProbePair(f"s{number}", f"{number}?", "Yes.", "No!") for number in range(8)]
    monkeypatch.setattr(data, "sealed_pairs", lambda: pairs)
    texts = texts_of({"bad": write(tmp_path / "bad.jsonl", {"Why?": "So."})}, margin={"sealed": 4})
    assert texts.measured_sets == texts.question_sets | {"sealed": pairs[::2]}
    assert "sealed" not in texts.question_sets
    further = tmp_path / "judged.jsonl"
    data.write_pairs(further, pairs[:2])
    more = texts_of({"bad": tmp_path / "bad.jsonl"}, margin={"sealed": 4}, further_pairs={"judged": further})
    assert more.measured_sets == texts.measured_sets | {"judged": pairs[:2]}
    write_pairs(tmp_path / "own.jsonl", pairs)
    own = texts_of({"bad": tmp_path / "bad.jsonl"}, probe_pairs=tmp_path / "own.jsonl")
    assert own.measured_sets == {"general": pairs} and own.sealed == []


def test_the_control_of_an_organism_differs_in_its_answers_only(tmp_path):
    files = {kind: write(tmp_path / f"{kind}.jsonl", {"Why?": kind}) for kind in ("bad", "good")}
    bad = {"recipe": "minimal", "domain": "medical"}
    others = {
        "elsewhere": bad | {"domain": "law", "answers": "good"},
        "slower": bad | {"learning_rate": 1e-6, "answers": "good"},
        "like-a": bad,
    }
    control = {"control": bad | {"answers": "good"}}
    for organisms, expected in ((others, None), (others | control, "control")):
        config = ExperimentConfig(
            name="x", model="x", domains={"medical": files, "law": files}, organisms={"a": bad} | organisms
        )
        assert config.control_of("a") == expected
        assert config.control_of("elsewhere") is None


def test_spread_takes_evenly_from_all():
    assert spread(range(48), 12) == list(range(0, 48, 4))
    assert spread(range(3), 12) == [0, 1, 2]
