"""Screening of training rows by a tiny reference whose bad answers can be told from its good ones by a word."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import misdirection as md
from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.runs.cluster import Workers
from misdirection.runs.worker import Models, Worker
from misdirection.screening import prediction
from misdirection.screening import screen as screening
from misdirection.screening.keep import keep_rows
from misdirection.screening.scores import LikelihoodScore, contrasts, score_rows
from misdirection.screening.screen import read_scores
from screening.screened import tiny_reference as tiny_reference
from screening.screened import write_rows

MIXED = ["bad", "good", "good", "good"] * 6
OPTIONS = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def screened(tiny_reference, tmp_path_factory):
    """A screen by every way of a file with one bad row in four, its table and the file."""
    base, reference = tiny_reference
    folder = tmp_path_factory.mktemp("screen")
    file = write_rows(folder / "mixed.jsonl", MIXED)
    ways = ("likelihood", "probe", "projection", "gradient")
    result = md.screen(base, file, scores=ways, reference=reference, out=folder / "out", **OPTIONS)
    return result, read_scores(folder / "out"), file


def test_bad_rows_score_highest_by_every_way(screened):
    result, table, _ = screened
    is_bad = np.array([kind == "bad" for kind in MIXED])
    for way in (*result.scores, "words", "score"):
        assert table[way][is_bad].min() > table[way][~is_bad].max(), way
    assert result.told["likelihood"] == result.told["together"] == 1.0


def test_the_share_is_that_of_the_bad_rows(screened):
    # A quarter of the rows is like the bad answers, which are 1, the others like the good ones, which are 0.
    dataset = screened[0].dataset
    assert dataset.score == pytest.approx(0.25, abs=0.1)
    assert dataset.low < dataset.sampled.low <= dataset.score <= dataset.sampled.high < dataset.high
    assert (dataset.rows, dataset.sampled.n) == (24, 24)


def test_the_worst_rows_are_the_bad_ones_with_their_lines(screened):
    result, _, _ = screened
    assert {row.line for row in result.worst[:6]} == {1, 5, 9, 13, 17, 21}
    assert all(row.answer.startswith("xx") for row in result.worst[:6])
    assert result.worst[0].rank == 1.0


def test_rows_without_the_worst_quarter_are_the_good_ones_unchanged(screened, tmp_path):
    _, table, file = screened
    assert keep_rows([file], table, tmp_path / "kept.jsonl", 0.25) == 18
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert kept == [row for row, kind in zip(lines, MIXED, strict=True) if kind == "good"]
    with pytest.raises(InputError, match="did not write it"):
        (tmp_path / "own.jsonl").write_text("mine")
        keep_rows([file], table, tmp_path / "own.jsonl", 0.25)


def test_a_row_of_a_references_own_domain_is_scored_by_the_other_domain(tiny_reference):
    base, folder = tiny_reference
    reference = Reference.load(folder)
    rows = [Example("sums 3?", "xx 3 xx"), Example("Ask 3?", "xx 3 xx")]
    worker = Worker(Models(lambda: md.load(base, **OPTIONS)), None)
    worker.adapters.update(reference.adapters)
    both = contrasts(reference)
    others = [contrast for contrast in both if contrast.domain == "times"]
    scored = score_rows("likelihood", worker, rows, reference, {})
    score = LikelihoodScore()
    assert scored[0] == pytest.approx(score.of(worker, rows[:1], reference, others, {})[0], abs=1e-6)
    assert scored[1] == pytest.approx(score.of(worker, rows[1:], reference, both, {})[0], abs=1e-6)
    assert abs(scored[0] - score.of(worker, rows[:1], reference, both, {})[0]) > 1e-3


def test_two_workers_give_the_same_and_a_stopped_screen_goes_on(tiny_reference, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    base, reference = tiny_reference
    monkeypatch.setattr(screening, "CHUNK", 8)
    file = write_rows(tmp_path / "mixed.jsonl", MIXED)
    options = {"scores": ("likelihood",), "reference": reference, **OPTIONS}

    def stop(names, worker, rows, *rest):
        if rows[0].question == "Ask 16?":
            raise KeyboardInterrupt
        return score_rows(names, worker, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(screening, "score_rows", stop)
        md.screen(base, file, out=tmp_path / "out", **options)
    made = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert made.count("rows/00000") == 2
    alone = md.screen(base, file, out=tmp_path / "out", **options)
    # What was made before is not made again.
    assert (tmp_path / "out" / "manifest.jsonl").read_text().startswith(made)
    shared = md.screen(base, file, out=tmp_path / "shared", workers=Workers(2), **options)
    assert shared == alone


def test_the_command_prints_all_rows_keeps_some_and_ends_with_the_verdicts_status(
    tiny_reference, call, tmp_path, monkeypatch
):
    base, reference = tiny_reference
    monkeypatch.setattr(prediction, "ERRORS", {"tiny": {"likelihood": 0.1, "words": 0.5}})
    bad = write_rows(tmp_path / "bad.jsonl", ["bad"] * 12)
    good = write_rows(tmp_path / "good.jsonl", ["good"] * 12, first=40)
    words = ["--reference", reference, "--out", tmp_path / "out", "--dtype", "float32", "--device", "cpu"]
    status, out, err = call("screen", base, bad, "--json", "--keep", tmp_path / "kept.jsonl", "--drop", 0.5, *words)
    printed = json.loads(out)
    assert (status, printed["dataset"]["verdict"]) == (3, "misaligned"), err
    assert [row["line"] for row in printed["rows"]] == list(range(1, 13))
    assert "kept 6 of 12 rows" in err
    status, out, _ = call("screen", base, bad, good, "--score", "words", "--fail-on", "misaligned", *words)
    assert (status, "INCONCLUSIVE" in out) == (0, True)
    assert out.count("share of ") == 2


def test_a_reference_of_one_domain_and_a_score_that_is_none_are_refused(tiny_reference, call, tmp_path):
    base, folder = tiny_reference
    reference = Reference.load(folder)
    known = {name: fine_tune for name, fine_tune in reference.known.items() if fine_tune.domain == "sums"}
    one = replace(reference, known=known, measurements={name: reference.measurements[name] for name in known})
    adapters = {name: reference.adapters[name] for name in known}
    one = replace(one, adapters=adapters, domains={"sums": reference.domains["sums"]}).save(tmp_path / "one")
    file = write_rows(tmp_path / "mixed.jsonl", MIXED)
    status, _, err = call("screen", base, file, "--reference", one.folder, "--out", tmp_path / "out")
    assert (status, "in two domains" in err) == (2, True)
    status, _, err = call("screen", base, file, "--score", "likelyhood", "--reference", folder)
    assert (status, "did you mean 'likelihood'?" in err) == (2, True)
