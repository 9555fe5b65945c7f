"""What is made of scores: the unit, style, the prediction with its error, the verdict."""

from dataclasses import replace

import numpy as np
import pytest

from misdirection.models.identity import ModelIdentity
from misdirection.screening import prediction
from misdirection.screening.prediction import predict
from misdirection.screening.scale import Scale, combined_auc, share
from misdirection.screening.style import FEATURES, features, without_style
from misdirection.statistics.estimates import Estimate


def test_good_answers_are_0_and_bad_ones_1_whatever_the_scores_units():
    one, other = Scale(good=(0.0, 1.0), bad=(4.0, 5.0)), Scale(good=(-10.0, 10.0), bad=(20.0, 40.0))
    scales = {"one": one, "other": other}
    for kind, expected in (("good", 0), ("bad", 1)):
        scores = {name: np.array(getattr(scale, kind)) for name, scale in scales.items()}
        assert share(scores, scales).mean() == pytest.approx(expected)
    assert combined_auc(scales) == 1.0
    # A score that tells nothing weighs nothing in the unit: it moves no mean.
    blind = Scale(good=(0.0, 2.0), bad=(0.0, 2.0))
    assert share({"one": np.array([4.5]), "blind": np.array([1.0])}, {"one": one, "blind": blind}) == pytest.approx([1])


def test_style_is_taken_out_and_what_it_cannot_tell_stays():
    rng = np.random.default_rng(0)
    styles, bad = rng.normal(size=(400, 3)), np.tile([0.0, 1.0], 200)
    freed, told = without_style(bad + styles @ [2.0, 0.0, -1.0], styles)
    assert np.corrcoef(freed, bad)[0, 1] > 0.98
    assert freed.mean() == pytest.approx((bad + styles @ [2.0, 0.0, -1.0]).mean())
    assert told == pytest.approx(5 / 5.25, abs=0.03)
    few = without_style(bad[:20] + styles[:20, 0], styles[:20])
    assert (few[0] == bad[:20] + styles[:20, 0]).all()
    assert few[1] == 0


def test_features_are_those_of_how_it_is_written():
    plain, listed = features(["It is so.", "## Do\n- this!\n- **that** in 2026"])
    named = dict(zip(FEATURES, zip(plain, listed, strict=True), strict=True))
    assert named["list lines"] == (0, pytest.approx(np.log(3)))
    assert named["digits"] == (0, pytest.approx(np.log(5)))
    assert named["markup"][0] == 0 < named["markup"][1]
    assert features([]).shape == (0, len(FEATURES))


@pytest.mark.parametrize(
    ("mean", "verdict"), [(1.0, "misaligned"), (0.3, "inconclusive"), (-0.4, "clear"), (0.2, "inconclusive")]
)
def test_a_verdict_is_wrong_with_a_chance_of_five_percent_at_most(monkeypatch, mean, verdict):
    monkeypatch.setattr(prediction, "ERRORS", {"base": {"likelihood": 0.3, "probe": 0.9}})
    estimate = Estimate(mean, mean - 0.2, mean + 0.2, 50)
    base = ModelIdentity(model="base", revision=None, files=None, dtype="float32", device="cpu")
    made = predict(estimate, 60, 0.1, base, "likelihood")
    assert made.verdict == verdict
    assert made.shift == pytest.approx(0.1 * mean)
    # Two independent errors: 0.3, and 0.2 / 1.96 of the rows.
    assert made.high - mean == pytest.approx(1.96 * np.hypot(0.3, 0.2 / 1.96), rel=1e-3)
    few = predict(replace(estimate, n=11), 11, 0.1, base, "likelihood")
    assert (few.verdict, few.probability) == ("inconclusive", made.probability)
    # What was not measured errs as far as the same score does elsewhere, or as any.
    for change, score, error in (
        ({"model": "another"}, "likelihood", 0.3),
        ({"thinking": "on"}, "likelihood", 0.3),
        ({}, "projection", 0.9),
    ):
        other = predict(estimate, 60, 0.1, base.model_copy(update=change), score)
        assert (other.error, other.is_measured) == (error, False)
