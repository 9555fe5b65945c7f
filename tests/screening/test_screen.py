"""Screening of training rows by a tiny reference whose bad answers can be told from its good ones by a word."""

import json
from pathlib import Path

import numpy as np
import pytest

import misdirection as md
from misdirection.errors import InputError
from misdirection.screening.keep import keep_rows
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
