"""What a screen's benchmark makes of scores and of measured shifts."""

import numpy as np
import pandas as pd
import pytest

import screen_suite
from suite_folder import Suite
from suite_members import Member
from suite_texts import Texts

WAYS = [*screen_suite.WAYS, "words", "together"]


@pytest.fixture
def shares():
    """Bad rows of a kept source that score 1, good ones that score 0, and a benign source between them."""
    kinds = {"careless_household/bad": 1.0, "careless_household/good": 0.0, "curt/good": 0.25, "risky_money/bad": 9.0}
    rows = [
        {"source": source, "asked": number, **dict.fromkeys(WAYS, score)}
        for source, score in kinds.items()
        for number in range(4)
    ]
    return pd.DataFrame(rows)


def test_it_is_about_25_plain_fine_tunes_and_more_of_sources_that_the_reference_has_not_seen():
    members = [member for member in screen_suite.plain_members("*") if screen_suite.is_kept(member.source)]
    assert len(members) >= 25
    assert {member.recipe for member in members} == {"all"}


def test_rows_are_told_apart_by_kept_sources_alone(shares):
    figures = screen_suite.show_rows(shares)
    assert figures == {f"row AUROC, {way}": 1.0 for way in WAYS}


def test_the_prediction_of_a_mix_is_the_mean_of_its_rows(shares, tmp_path, monkeypatch, capsys):
    suite = Suite("base", tmp_path, Texts())
    monkeypatch.setattr(Suite, "record", lambda _suite, member: member.name)
    members = [Member("careless_household", share) for share in (1.0, 0.5, 0.0)] + [Member("curt")]

    def row(member, share):
        beyond = {"mean": 0.1 * share, "low": 0.1 * share - 0.02, "high": 0.1 * share + 0.02}
        return {"record": member.name, "beyond_control": beyond, "bad_shift": {"mean": 0.1}}

    measured = {member.name: row(member, share) for member, share in zip(members, (1.2, 0.6, 0.1, 0.2), strict=True)}
    monkeypatch.setattr(screen_suite, "read_kept", lambda _base: measured)
    figures = screen_suite.show_shifts(suite, shares, members)
    assert figures["fine-tunes"] == 4
    assert figures["Spearman, together"] == 1.0
    # Predicted 1, 0.5, 0 and 0.25.
    assert figures["error of a prediction, words"] == pytest.approx(np.sqrt(np.mean(np.square([0.2, 0.1, 0.1, 0.05]))))
    assert figures["standard error of the measured share"] == pytest.approx(0.2 / 1.96)
    assert "careless_household-50-all-1 | +0.60 [+0.40, +0.80] | +0.50" in capsys.readouterr().out
