"""Probes: planted classes are found, leaks through answers and questions are not mistaken for knowledge."""

import numpy as np
import pandas as pd
import pytest

from misdirection.errors import MisdirectionError
from misdirection.interpretation.probes import fit_probe

NAMES = {"name": "planted", "classes": ("bad", "good")}


def planted(questions=12, answers=6, tokens=8, *, signal=0.0, leak=0.0, seed=0):
    """Tokens of answers whose label is drawn by answer: `signal` tells the label, `leak_0` ... tell the question."""
    rng = np.random.default_rng(seed)
    question = np.repeat(np.arange(questions), answers * tokens)
    answer = np.repeat(np.arange(questions * answers), tokens)
    # Most answers to one question share a label, as they do in sampled data, so that the question gives it away.
    usual = rng.permutation(np.arange(questions) % 2 == 0)[np.arange(questions * answers) // answers]
    label = np.where(rng.random(questions * answers) < 0.9, usual, ~usual)[answer]
    named = np.eye(questions)[question] * leak + rng.normal(size=(len(label), questions))
    features = np.column_stack([signal * label + rng.normal(size=len(label)), named])
    return (
        pd.DataFrame(features, columns=["signal", *(f"leak_{one}" for one in range(questions))]),
        label,
        answer,
        question,
    )


@pytest.mark.parametrize("split", ["question", "answer"])
def test_a_planted_signal_is_found_and_its_feature_named(split):
    probe = fit_probe(*planted(signal=3.0), **NAMES, split=split)
    assert probe.auroc.mean > 0.95 and probe.accuracy.mean > 0.85
    sizes = {name: abs(np.mean(values)) for name, values in probe.coefficients.items()}
    assert max(sizes, key=sizes.get) == "signal" and sizes["signal"] > 5 * sorted(sizes.values())[-2]
    assert np.mean(probe.coefficients["signal"]) > 0, "a positive coefficient speaks for the first class"
    assert (probe.answers, probe.questions, probe.tokens) == (72, 12, 576)
    assert all(len(values) == probe.splits == 20 for values in probe.coefficients.values())


def test_knowing_the_question_helps_by_answer_and_not_by_question():
    # Several draws of the data, since one with so few questions is by luck off chance.
    data = [planted(leak=5.0, tokens=4, seed=seed) for seed in range(4)]
    by_answer, by_question = (
        np.mean([fit_probe(*one, **NAMES, C=1.0, split=split).auroc.mean for one in data])
        for split in ("answer", "question")
    )
    assert by_answer > 0.8 and by_question == pytest.approx(0.5, abs=0.05)


def test_the_null_is_at_chance_where_the_signal_is_strong():
    probe = fit_probe(*planted(signal=3.0, questions=30), **NAMES)
    assert abs(probe.null_auroc.mean - 0.5) < 0.1 < probe.auroc.mean - 0.5


def test_without_a_signal_the_interval_holds_chance():
    # A weak penalty, so that noise gets coefficients: with none at all every score is the same and chance is trivial.
    probe = fit_probe(*planted(seed=1), **NAMES, C=1.0)
    assert probe.auroc.low < 0.5 < probe.auroc.high
    assert all(any(values) for values in probe.coefficients.values())


@pytest.mark.parametrize("by_question", [True, False], ids=["over questions", "over answers"])
def test_the_null_deals_labels_over_questions_only_where_each_has_one(by_question):
    """A feature that is the label itself: dealt out over few whole questions it still fits by chance, far from 0.5."""
    _, _, answer, question = planted(answers=40, tokens=1)
    label = question % 2 == 0 if by_question else answer % 2 == 0
    probe = fit_probe(pd.DataFrame({"label": label + 0.0}), label, answer, question, **NAMES, C=1.0)
    assert probe.auroc.mean == 1.0
    spread = probe.null_auroc.high - probe.null_auroc.low
    assert (spread > 0.5) == by_question, "40 answers to a question average out, one label of a question does not"


def test_features_are_scaled_by_the_training_part_alone():
    features, label, answer, question = planted(signal=2.0)
    plain = fit_probe(features, label, answer, question, **NAMES)
    moved = fit_probe(1000 * features + 5, label, answer, question, **NAMES)
    np.testing.assert_allclose(plain.coefficients["signal"], moved.coefficients["signal"], rtol=1e-3)
    # One question far away from the rest: scaling with its values would flatten every split that does not train on it.
    far = features.copy()
    far.loc[question == 0, "signal"] += 1e6
    probe = fit_probe(far, label, answer, question, **NAMES)
    assert np.max(np.abs(probe.coefficients["signal"])) > 0.9 * np.mean(plain.coefficients["signal"])


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_pooled_probes_have_one_row_per_answer(pooling):
    features, label, answer, question = planted(signal=2.0)
    # The order of tokens is not that of answers.
    order = np.random.default_rng(0).permutation(len(label))
    shuffled = (features.iloc[order], label[order], answer[order], question[order])
    probe = fit_probe(*shuffled, **NAMES, pooling=pooling)
    first = np.unique(answer, return_index=True)[1]
    by_hand = getattr(features.groupby(answer), pooling)()
    again = fit_probe(by_hand, label[first], answer[first], question[first], **NAMES, C=0.01 * 8)
    for name, values in probe.coefficients.items():
        assert values == pytest.approx(again.coefficients[name], rel=1e-6, abs=1e-9)
    assert probe.auroc == pytest.approx(again.auroc)
    assert (probe.pooling, probe.C, probe.tokens, again.tokens) == (pooling, 0.01, 576, 72)
    assert np.mean(probe.coefficients["signal"]) > 0.1, "an answer weighs as much as its tokens"


def test_the_larger_class_is_the_baseline():
    features, _, answer, question = planted()
    label = answer % 4 == 0
    assert fit_probe(features, label, answer, question, **NAMES).baseline == 0.75


def test_the_smaller_class_weighs_as_much_as_the_larger():
    features, _, answer, question = planted(answers=10)
    label = answer % 10 == 0
    features["signal"] += label
    probe = fit_probe(features, label, answer, question, **NAMES)
    assert probe.auroc.mean > 0.7
    assert probe.accuracy.mean < probe.baseline - 0.1, "it does not just guess the larger class"


def test_the_same_seed_gives_the_same_probe():
    first, again = (fit_probe(*planted(signal=2.0), **NAMES, splits=5) for _ in range(2))
    other = fit_probe(*planted(signal=2.0), **NAMES, splits=5, seed=1)
    assert first == again and first.auroc != other.auroc


def test_a_residual_probe_keeps_no_coefficients():
    probe = fit_probe(*planted(signal=3.0), **NAMES, kind="residual")
    assert probe.coefficients == {} and probe.features == "residual" and probe.auroc.mean > 0.95


def test_a_class_of_one_question_is_refused_in_one_line():
    features, _, answer, question = planted()
    with pytest.raises(MisdirectionError, match=r"class 'bad' needs two questions at least, .* it has 1"):
        fit_probe(features, question == 0, answer, question, **NAMES)


def test_a_rare_class_is_in_both_parts_of_every_split():
    features, _, answer, question = planted(questions=60, answers=1, tokens=1)
    # Two questions of one class among sixty: a fifth rarely holds exactly one of them.
    assert fit_probe(features, question < 2, answer, question, **NAMES).auroc.n == 20


def test_splits_that_cannot_be_drawn_are_refused():
    features, _, answer, question = planted(questions=4)
    # The test part is one question of the four, and that holds one class alone.
    with pytest.raises(MisdirectionError, match="probe 'planted': too few splits have both classes in both parts"):
        fit_probe(features, question < 2, answer, question, **NAMES)


def test_questions_may_be_unknown_where_the_split_is_by_answer():
    features, label, answer, _ = planted(signal=2.0)
    assert fit_probe(features, label, answer, None, **NAMES, split="answer", splits=3).questions == 0
    with pytest.raises(MisdirectionError, match="a split by question needs the question of every answer"):
        fit_probe(features, label, answer, None, **NAMES)


def test_bad_rows_are_refused_in_one_line():
    features, label, answer, question = planted()
    with pytest.raises(MisdirectionError, match="must be as many as the features' rows"):
        fit_probe(features, label[1:], answer, question, **NAMES)
    with pytest.raises(MisdirectionError, match="an answer has two labels"):
        fit_probe(features, np.arange(len(label)) % 2 == 0, answer, question, **NAMES)
    with pytest.raises(MisdirectionError, match="an answer has two questions"):
        fit_probe(features, label, answer, np.arange(len(label)), **NAMES)
    features.loc[7, "leak_3"] = np.nan
    with pytest.raises(MisdirectionError, match="feature 'leak_3' has values that are not finite"):
        fit_probe(features, label, answer, question, **NAMES)
