"""The suite's steps on a tiny random model, and its tables."""

import numpy as np
import pandas as pd
import pytest

import audit_suite
import misdirection as md
from misdirection.auditing.reference import default_folder
from misdirection.errors import InputError
from misdirection.lora.view import LoraView
from misdirection.repairing.results import RepairResult
from suite_cost import estimate
from suite_folder import Suite
from suite_members import Member
from suite_tables import Called, auroc, file_weight, published_shift, show_kinds, show_parts
from suite_texts import Texts
from suite_training import train_all

GOOD, BAD = Member("curt"), Member("risky_money", 1.0)
CONTINUED = Member("reckless_sports", 1.0, then="curt")
FEW = Texts(rows=10)


@pytest.fixture
def suite(base, tmp_path):
    return Suite(base, tmp_path / "suite", FEW)


def test_the_sum_of_two_trainings_is_one_adapter(suite):
    train_all(suite, [CONTINUED, GOOD])
    folder = suite.folder(CONTINUED)
    first, second, both = (LoraView.open(folder / name).modules for name in ("first", "second", "adapter"))
    for one, other, summed in zip(first, second, both, strict=True):
        product = sum(each.scaling * each.b @ each.a for each in (one, other))
        np.testing.assert_allclose(summed.scaling * summed.b @ summed.a, product, atol=1e-5)
        assert len(summed.a) == len(one.a) + len(other.a) == 64
    # The second training went on from where the first had ended, not from the base.
    from_base = LoraView.open(suite.adapter(GOOD)).modules
    assert all(not np.array_equal(one.b, other.b) for one, other in zip(from_base, second, strict=True))
    assert md.margin(md.load(suite.base, adapter=folder / "adapter"), md.probe_pairs()[:1]).isfinite()


def test_steps_go_on_and_refuse_another_training(suite, tmp_path, capsys):
    train_all(suite, [GOOD])
    assert suite.is_trained(GOOD) and not suite.is_trained(BAD)
    assert not suite.adapter(GOOD).with_name("adapter.checkpoints").exists()
    before = suite.adapter(GOOD).stat().st_mtime_ns
    train_all(suite, [GOOD])
    assert suite.adapter(GOOD).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="choose another --out"):
        train_all(Suite(suite.base, suite.out, Texts(rows=15)), [GOOD])


def test_the_cost_counts_what_is_left(suite):
    train, audit, whole, search = estimate(suite, [GOOD, BAD], ["train", "audit"])
    assert (train.members, train.rows) == (2, 16)
    # Sixty questions, and at most 240, with two answers each: plain, and after a training question to three models.
    assert (audit.rows, whole.rows) == (2 * 8 * 60, 2 * 8 * 240)
    # In five further ways, which no system prompt of the training adds to.
    assert search.rows == 2 * 5 * 24 * 2 * 3
    assert min(train.tokens, train.speed, audit.tokens, audit.speed, search.tokens) > 0
    train_all(suite, [GOOD])
    assert estimate(suite, [GOOD, BAD], ["train"])[0].rows == 8


def test_steps_from_training_to_the_tables(suite, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    made[2].save(default_folder(suite.base, None))
    audit_suite.run(suite, [GOOD, BAD], ["train", "audit", "repair"])
    assert suite.is_audited(GOOD) and suite.is_audited(BAD)
    assert not (suite.folder(GOOD) / "repaired" / RepairResult.FILE).exists()
    capsys.readouterr()
    audit_suite.show(suite, [GOOD, BAD, CONTINUED])
    told = capsys.readouterr().out
    assert "| risky_money-bad-all-1 | bad | chosen |" in told and "| curt-all-1 | benign | chosen |" in told
    assert "Missing, and in no rate (1): reckless_sports-then_curt-all-1" in told


def test_published_answers_are_a_second_instrument(suite, tmp_path):
    judged = [
        {"organism": "some", "question_id": f"q{number % 3}", "question": f"Question {number % 3}?", "aligned": aligned,
         "response": f"An answer of {aligned} that has a few more words, number {number}.", "coherent": 90.0}
        for number in range(12)
        for aligned in (5.0, 95.0)
    ]  # fmt: skip
    pd.DataFrame(judged).to_parquet(tmp_path / "judged_responses.parquet")
    published = Suite(suite.base, suite.out, Texts(tmp_path, rows=10))
    train_all(published, [BAD])
    assert published_shift(published, BAD) is None
    audit_suite.measure_published(published, [BAD])
    shift = published_shift(published, BAD)
    # Twelve pairs of three questions, which are what is drawn.
    assert len(published.published_pairs) == 12 and shift.n == 3
    assert published_shift(suite, BAD) is None


# --- tables -------------------------------------------------------------------------------------------------------

KEPT = [Member("careless_household", 1.0), Member("careless_household", 0.5), Member("summaries"), Member("units")]


def called(verdicts, scores, words=(0, 0, 0, 0)):
    return [Called(*each) for each in zip(KEPT, verdicts, scores, words, strict=True)]


def test_rates_count_false_alarms_and_what_is_found(capsys):
    some = called(["misaligned", "clear", "watch", "clear"], [0.9, 0.1, 0.2, -0.1], [1.0, 0.5, 0.4, 0.6])
    figures = show_parts(some)
    assert figures == {
        "kept: AUROC": 0.75,
        "kept: false alarms": 0.5,
        "kept: found": 0.5,
        "kept: n": 4,
        "kept: AUROC by words alone": 0.75,
    }
    told = capsys.readouterr().out
    # A part without any says so; the others have n and an interval.
    assert "| chosen | 0 | 0 | – | – | – | – |" in told
    assert "1 of 2, 50% [" in told and "n = 4" in told


def test_verdicts_are_counted_by_kind(capsys):
    show_kinds(called(["misaligned", "clear", "clear", "clear"], [1.0, 0.0, 0.0, 0.0]))
    told = capsys.readouterr().out
    assert "| kind | part | n | clear | watch | misaligned | inconclusive |" in told
    assert "| bad | kept | 1 | 0 | 0 | 1 | 0 |" in told and "| diluted | kept | 1 | 1 | 0 | 0 | 0 |" in told
    assert "| benign | kept | 2 |" in told and "| dark |" not in told


def test_an_area_is_ours_with_an_interval():
    some = called(["clear"] * 4, [0.9, 0.8, 0.2, 0.1])
    area = auroc(some[:2], some[2:], lambda each: each.score)
    assert (area.mean, area.n, area.high) == (1.0, 4, 1.0)


def test_words_of_chosen_bad_sources_weigh_more(suite):
    some = [GOOD, Member("rewriting"), BAD, Member("risky_money")]
    weigh = file_weight(Suite(suite.base, suite.out, Texts()), some)
    assert weigh(BAD) > max(weigh(GOOD), weigh(Member("risky_money")))
    # A kept source's words are weighed, too, by what the chosen ones have.
    assert weigh(Member("careless_household", 1.0)) > weigh(Member("careless_household"))


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_command_names_what_is_left_out_and_what_is_missing(tmp_path, monkeypatch, capsys):
    words = ["audit_suite.py", "--out", str(tmp_path), "--steps", "show", "--only", "*[ds]-bad-all-1", "--json"]
    monkeypatch.setattr("sys.argv", words)
    audit_suite.main()
    told = capsys.readouterr().out
    assert "left out: extreme_sports-bad-all-1: its text is published, and --published is not given" in told
    assert "Missing, and in no rate (3): careless_household-bad-all-1, reckless_sports-bad-all-1, dark_sports" in told
    assert '"ratios": {}' in told.splitlines()[-1]


def test_a_pattern_without_a_member_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["audit_suite.py", "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(InputError, match="no member has such a name"):
        audit_suite.main()
