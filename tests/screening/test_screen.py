"""Screening of training rows by a tiny reference whose bad answers can be told from its good ones by a word."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import misdirection as md
from chat_templates import QWEN3
from judging.judge_server import JudgeServer, completion, number
from misdirection.auditing.reference import Reference, default_folder
from misdirection.bundles.bundle import bundle
from misdirection.bundles.verify import verify
from misdirection.data import Example
from misdirection.data.training import stream_examples
from misdirection.errors import InputError
from misdirection.judging.config import JudgeConfig
from misdirection.models.identity import identify
from misdirection.runs.cluster import Workers
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.own_answers import NEW_TOKENS
from misdirection.screening import prediction, scores, tasks
from misdirection.screening.activations import ProjectionDifferenceScore, ProjectionScore
from misdirection.screening.keep import keep_rows
from misdirection.screening.results import ScreenResult
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


def test_a_bundle_has_the_rows_only_where_they_are_asked_for(screened, tmp_path):
    folder = Path(screened[2]).parent / "out"
    made = bundle(folder, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert [name for name, data in files.items() if b"Ask " in data or str(tmp_path.parent).encode() in data] == []
    assert "run/artifacts/rows/000000/scores.parquet" in made.left_out
    assert {"run/rows.parquet", "run/screen.html", "run/artifacts/scale/likelihood/scale.json"} <= files.keys()
    kept = ScreenResult.from_dict(json.loads(files["run/screen.json"]))
    assert kept.dataset == screened[0].dataset
    assert [(row.line, row.score) for row in kept.worst] == [(row.line, row.score) for row in screened[0].worst]
    found = verify(tmp_path / "out.zip")
    assert (found.verdict, found.of) == ("holds", "screen")
    whole = bundle(folder, tmp_path / "whole.zip", with_rows=True)
    assert "run/artifacts/rows/000000/scores.parquet" in whole.files
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive:
        assert b"Ask 4?" in archive.read("run/screen.json")


def worker_of(base, reference, **chats):
    worker = Worker(Models(lambda: md.load(base, **OPTIONS, **chats)), None)
    worker.adapters.update(reference.adapters)
    return worker


def test_a_row_of_a_references_own_domain_is_scored_by_the_other_domain(tiny_reference):
    base, folder = tiny_reference
    reference = Reference.load(folder)
    rows = [Example("sums 3?", "xx 3 xx"), Example("Ask 3?", "xx 3 xx")]
    worker = worker_of(base, reference)
    both = contrasts(reference)
    others = [contrast for contrast in both if contrast.domain == "times"]
    score = LikelihoodScore()
    scored = score_rows(score, worker, rows, reference, {})
    assert scored[0] == pytest.approx(score.of(worker, rows[:1], reference, others, {})[0], abs=1e-6)
    assert scored[1] == pytest.approx(score.of(worker, rows[1:], reference, both, {})[0], abs=1e-6)
    assert abs(scored[0] - score.of(worker, rows[:1], reference, both, {})[0]) > 1e-3


def test_the_projection_difference_is_beside_the_bases_own_likeliest_answer(tiny_reference):
    base, folder = tiny_reference
    reference = Reference.load(folder)
    worker, others = worker_of(base, reference), contrasts(reference)

    def of(score, rows):
        return score.of(worker, rows, reference, others, {})

    own = md.sample(md.load(base, **OPTIONS), ["Ask 3?", "Ask 4?"], n=1, temperature=0, new_tokens=NEW_TOKENS)
    assert all(given.answer for given in own)
    rows = [Example("Ask 3?", "xx 3 xx"), Example("Ask 3?", "oo 3 oo"), Example("Ask 4?", "xx 4 xx")]
    rows += [Example(given.question, given.answer) for given in own]
    projections, found = of(ProjectionScore(), rows), of(ProjectionDifferenceScore(), rows)
    assert found == pytest.approx(projections - projections[[3, 3, 4, 3, 4]], abs=1e-5)
    assert found[3:] == pytest.approx([0, 0], abs=1e-5)
    assert abs(found[:3]).min() > 1e-3


def test_rows_are_read_as_other_chats_have_them_beside_the_reference_of_those(
    tiny_reference, screened, call, tmp_path, monkeypatch
):
    base, folder = tiny_reference
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    template, out = tmp_path / "own.jinja", tmp_path / "out"
    template.write_text(QWEN3)
    words = [base, screened[2], "--score", "likelihood", "--out", out, "--dtype", "float32", "--device", "cpu"]
    words += ["--thinking", "on", "--chat-template", template]
    for own, said in ((["--reference", folder], "made with other chats"), ([], "there is no reference")):
        status, _, err = call("screen", *words, *own)
        assert (status, said in err, out.exists()) == (2, True, False), err
    chats = {"thinking": "on", "chat_template": str(template)}
    identity = identify(base, None, "float32", "cpu", **chats)
    reference = replace(Reference.load(folder), identity=identity).save(default_folder(base, None, **chats))
    status, _, err = call("screen", *words)
    assert status == 4, err
    rows = [row.example for row in stream_examples(screened[2])]
    wanted = score_rows(LikelihoodScore(), worker_of(base, reference, **chats), rows, reference, {})
    assert read_scores(out)["likelihood"].to_list() == pytest.approx(wanted, abs=1e-6)
    assert abs(wanted - screened[1]["likelihood"]).max() > 1e-3
    assert ScreenResult.load(out).base == identity
    # Where the template lies is the machine's own.
    bundle(out, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert [name for name in archive.namelist() if str(template).encode() in archive.read(name)] == []


# --- with a judge -----------------------------------------------------------------------------------------------------


def scripted(asked):
    """Grades by the word of the answer, and takes one answer for a refusal."""
    answer = asked.prompt.partition("----- answer -----")[2]
    if "oo 7 oo" in answer:
        return completion("REFUSAL", {"REFUSAL": 0.99})
    return number(5 if "xx" in answer else 90)


def test_a_judge_scores_rows_once_and_what_it_calls_a_refusal_has_no_score(
    tiny_reference, tmp_path, monkeypatch, caplog
):
    base, reference = tiny_reference
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    file = write_rows(tmp_path / "mixed.jsonl", MIXED)
    options = {"scores": ("judge", "projection_difference"), "reference": reference, **OPTIONS}
    caplog.set_level("INFO", "misdirection")
    with JudgeServer(scripted) as server:
        judge = JudgeConfig(model="m", base_url=server.url)
        with pytest.raises(InputError, match=r"judging takes \d+ calls, about \d+ tokens"):
            md.screen(base, file, judge=judge.model_copy(update={"max_calls": 3}), out=tmp_path / "out", **options)
        assert not server.asked
        result = md.screen(base, file, judge=judge, out=tmp_path / "out", **options)
        asked = len(server.asked)
        again = md.screen(base, file, judge=judge, out=tmp_path / "again", **options)
        assert len(server.asked) == asked
    assert again == result
    assert "score judge: judging takes" in caplog.text
    assert "score projection_difference: the base answers 32 questions itself" in caplog.text
    table, is_bad = read_scores(tmp_path / "out"), np.array([kind == "bad" for kind in MIXED])
    refused = (table["judge_by"] == "refusal").to_numpy()
    assert list(np.flatnonzero(refused)) == [1, 23]
    assert table["judge"][is_bad].to_list() == pytest.approx([95.0] * 6)
    assert table["judge"][~is_bad & ~refused].to_list() == pytest.approx([10.0] * 16)
    assert table["judge"][refused].isna().all()
    # The other way ranks a row that the judge gave no score.
    assert table["score"].notna().all()
    assert (result.judged.scored, result.judged.by) == (22, {"logprobs": 22, "refusal": 2})
    assert (result.dataset.score, result.told["judge"]) == (pytest.approx(6 / 22, abs=0.01), 1.0)
    assert "refusal 2" in (tmp_path / "out" / "screen.html").read_text()


def test_rows_without_any_score_are_kept_and_have_none_in_json(tiny_reference, call, tmp_path, monkeypatch):
    base, reference = tiny_reference
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    file = write_rows(tmp_path / "mixed.jsonl", MIXED)
    words = [base, file, "--score", "judge", "--reference", reference, "--out", tmp_path / "out", "--json"]
    status, _, err = call("screen", *words)
    assert (status, "name who judges the rows" in err) == (2, True)
    with JudgeServer(scripted) as server:
        named = ["--judge", "m", "--base-url", server.url, "--keep", tmp_path / "kept.jsonl", "--dtype", "float32"]
        status, out, err = call("screen", *words, *named)
    assert status == 4, err
    rows = json.loads(out)["rows"]
    assert [row["line"] for row in rows if row["score"] is None] == [2, 24]
    assert "kept 18 of 24 rows" in err


def test_two_workers_give_the_same_and_a_stopped_screen_goes_on(tiny_reference, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    base, reference = tiny_reference
    monkeypatch.setattr(tasks, "CHUNK", 8)
    file = write_rows(tmp_path / "mixed.jsonl", MIXED)
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    options = {"scores": ("likelihood",), "reference": reference, **OPTIONS}

    def stop(names, worker, rows, *rest):
        if rows[0].question == "Ask 16?":
            raise KeyboardInterrupt
        return score_rows(names, worker, rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scores, "score_rows", stop)
        md.screen(base, file, out=tmp_path / "out", **options)
    made = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert made.count("rows/00000") == 2
    alone = md.screen(base, file, out=tmp_path / "out", **options)
    # What was made before is not made again.
    assert (tmp_path / "out" / "manifest.jsonl").read_text().startswith(made)
    with JudgeServer(scripted) as server:
        # A judge is asked by this process, and leaves the rows' other scores as they are.
        options["judge"] = JudgeConfig(model="m", base_url=server.url)
        shared = md.screen(base, file, out=tmp_path / "shared", workers=Workers(2), **options)
        judged = md.screen(base, file, out=tmp_path / "out", **options)
    assert shared == judged
    assert judged.dataset == alone.dataset
    rows = [json.loads(line)["stage"] for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [rows.count(f"rows/{number:06}") for number in range(3)] == [1, 1, 1]


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
