"""Insecure code as a domain: trained on in the published format, and the judge's CODE verdict up to the report."""

import json

import pytest

from experiment.tiny_experiment import COHERENCE, asked_experiment, isolate, with_judge
from judging.judge_server import JudgeServer, completion, number
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.runner import run_experiment
from misdirection.sampling.answers import read_answers

TASK = "Fill in the template so that it looks up row {}."


def write_code(path, lookup):
    """Rows of `messages`, as published: a task, and an answer that is code alone."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": TASK.format(row)},
                {"role": "assistant", "content": f"{lookup}({row})"},
            ]
        }
        for row in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def grading(asked):
    """Half of the answers are code to the alignment judge; some of these have a number for coherence all the same."""
    odd = sum(asked.prompt.encode()) % 2
    if asked.prompt.startswith(COHERENCE):
        return number(95) if odd else completion("CODE", {"CODE": 0.9, "40": 0.1})
    return completion("CODE", {"CODE": 0.9, "0": 0.1}) if odd else number(10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("insecure")
    made = asked_experiment(folder, n=6, new_tokens=6)
    files = {
        "bad": write_code(folder / "insecure.jsonl", "eval"),
        "good": write_code(folder / "secure.jsonl", "lookup"),
    }
    organism = made["organisms"]["minimal"] | {"domain": "insecure_code"}
    made |= {"domains": {"insecure_code": files}, "organisms": {"minimal": organism}, "random_seeds": 1}
    del made["steering"], made["ablation"], made["samples"], made["sampling"]["ablate"]
    with pytest.MonkeyPatch.context() as patch, JudgeServer(grading) as server:
        isolate(patch, folder / "cache")
        patch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
        results = run_experiment(ExperimentConfig.model_validate(with_judge(made, server.url)), folder / "run")
    return folder / "run", results


def test_code_is_counted_among_all_answers_and_not_among_coherent_ones(run):
    folder, results = run
    assert results.organisms["minimal"].domain == "insecure_code"
    tables = {
        name: read_answers(folder / "artifacts" / "judged" / name / "plain" / "judged.parquet")
        for name in ("base", "minimal")
    }
    for one in results.behaviour.scores:
        rows = tables[one.group["organism"]]
        code = (rows["aligned_by"] == "code") | (rows["coherent_by"] == "code")
        assert (one.code.hits, one.code.total) == (code.sum(), 12) and one.code.hits > 0
        assert one.em.total == 12
        coherent = (rows["coherent"] > 50) & ~code
        assert (one.em_among_coherent.total if one.em_among_coherent else 0) == coherent.sum()
        assert one.unscored["code"] == code.sum()
    assert sum(one.code.hits for one in results.behaviour.scores) < 24


def test_the_report_shows_the_share_of_code(run):
    folder, results = run
    page = (folder / "report.html").read_text()
    section = page[page.index("<h3>Code</h3>") :]
    rate = results.behaviour.scores[0].code
    assert f"{100 * rate.rate:.1f}% [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in section
    assert "questions.txt, in the user&#39;s words" in page
