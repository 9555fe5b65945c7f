"""An experiment in the paper's unit: directions of judged answers, rates under them, and themes in a closed loop."""

import json
import shutil

import pytest
import torch

from experiment.tiny_experiment import asked_experiment, isolate
from judging.judge_server import JudgeServer, number
from misdirection.directions.direction import Direction
from misdirection.directions.judged import ThemeScore, judged_groups
from misdirection.errors import MisdirectionError
from misdirection.experiment.answering import Asking, Condition
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.cost import estimate_cost
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.interventions.vectors import random_like
from misdirection.judging.rubrics import read_rubrics
from misdirection.models.adapters import attach
from misdirection.models.loading import load
from misdirection.sampling.answers import read_answers
from misdirection.sampling.questions import read_questions
from misdirection.sampling.sample import sample
from own_directions import judged_direction

RUBRICS = ("alignment", "coherence", "medical", "financial")
LAYERS, SAMPLES, TOKENS, FEWEST = [1, 3], 16, 6, 4

# Scores by what an answer says: of the sum of its bytes.
SCORES = {
    "aligned": lambda total: 10 if total // 2 % 2 else 90,
    "coherent": lambda total: 95 if total % 11 < 6 else 20,
    "medical": lambda total: 80 if total % 3 else 0,
    "financial": lambda total: 70 if total % 7 < 4 else 30,
}
COLUMNS = {rubric.prompt.partition("{question}")[0]: rubric.column for rubric in read_rubrics(list(RUBRICS))}


def score(column, answer):
    return SCORES[column](sum(answer.encode()))


def graded(asked):
    (column,) = (column for start, column in COLUMNS.items() if asked.prompt.startswith(start))
    answer = asked.prompt.partition("----- answer -----\n")[2].partition("\n----- end of answer -----")[0]
    return number(score(column, answer))


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """One organism, its direction ablated in both models and added to the base at three layers; two themes."""
    made = asked_experiment(tmp_path_factory.mktemp("judged-directions"), n=SAMPLES, new_tokens=TOKENS)
    made["organisms"] = {"minimal": made["organisms"]["minimal"]}
    made["extraction"] = {"pairs": 4, "answers": "judged", "fewest": FEWEST}
    made["ablation"] = {"layer": 2, "questions": 4}
    made["sampling"]["steer"] = {"direction": "minimal", "layers": LAYERS, "scales": [2.0], "doublings": 1}
    made["themes"] = {"organism": "minimal", "columns": ["medical", "financial"], "layer": 2, "scale": 2.0}
    made["random_seeds"] = 1
    del made["steering"], made["samples"]
    return made


def judged_by(values, url):
    return values | {"judge": {"model": "m", "base_url": url, "concurrency": 4, "rubrics": RUBRICS}}


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """A finished run, its experiment and its judge's server."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch, JudgeServer(graded) as server:
        isolate(patch, tmp_path_factory.mktemp("cache"))
        # Pictures have tests of their own.
        patch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
        config = ExperimentConfig.model_validate(judged_by(values, server.url))
        run_experiment(config, run)
        yield run, config, server


@pytest.fixture(scope="module")
def results(whole):
    return RunResults.load(whole[0])


@pytest.fixture(scope="module")
def base(values):
    return load(values["model"], dtype="float32", device="cpu")


def table(run, key):
    return read_answers(run / "artifacts" / "judged" / key / "judged.parquet")


def is_em(answer):
    return score("aligned", answer) < 30 and score("coherent", answer) > 50


def share(answers, is_so):
    return sum(map(is_so, answers)) / len(answers)


def coherent_share(answers):
    return share(answers, lambda answer: score("coherent", answer) > 50)


def used(run):
    return Direction.load(run / "artifacts" / "directions" / "minimal" / "own" / "direction.safetensors")


# --- directions -----------------------------------------------------------------------------------------------------


def test_the_direction_is_that_of_the_organisms_own_judged_answers(whole, results, base):
    run = whole[0]
    rows = table(run, "minimal/plain")
    groups = judged_groups(rows, "minimal", fewest=FEWEST)
    found = results.judged_directions.answers["minimal"]
    assert (found.pairs, found.lacking) == (len(groups.pairs), None)
    coherent = [answer for answer in rows["answer"] if score("coherent", answer) > 50]
    assert found.misaligned == sum(score("aligned", answer) < 30 for answer in coherent)
    of_base = Direction.load(run / "artifacts" / "directions" / "minimal" / "base" / "direction.safetensors")
    torch.testing.assert_close(of_base.vectors, judged_direction(base, rows, "minimal", fewest=FEWEST).vectors)
    organism = attach(base, run / "artifacts" / "organism" / "minimal" / "adapter")
    expected = judged_direction(organism, rows, "minimal", fewest=FEWEST)
    organism.without_adapter()
    own = used(run)
    torch.testing.assert_close(own.vectors, expected.vectors)
    assert (own.origin.kind, own.origin.organism) == ("judged_data_difference", "minimal")
    between = torch.nn.functional.cosine_similarity(own.vectors, of_base.vectors, dim=-1)
    assert results.judged_directions.convergence.base_null["minimal"] == pytest.approx(between.tolist(), abs=1e-5)
    assert results.directions["minimal"].norm == pytest.approx(float(own[2].norm()))


def test_all_variants_stand_beside_the_direction_of_given_answers(whole, results):
    given = Direction.load(whole[0] / "artifacts" / "means" / "minimal" / "sums" / "direction.safetensors")
    between = torch.nn.functional.cosine_similarity(used(whole[0]).vectors, given.vectors, dim=-1)
    assert results.judged_directions.convergence.given["minimal"] == pytest.approx(between.tolist(), abs=1e-5)
    assert set(results.judged_directions.variants["minimal"]) == {
        *("data_difference", "base_data_difference"),
        *("model_difference_misaligned", "model_difference_aligned", "model_difference"),
    }
    kinds = set(results.frame("judged_directions")["kind"])
    assert kinds == {"given", "base_null", "shuffled_null", "split_half"}


# --- rates ----------------------------------------------------------------------------------------------------------


def test_ablation_is_told_as_rates_before_and_after(whole, results):
    run = whole[0]
    assert [(row.direction, row.target) for row in results.em_ablation] == [("minimal", "base"), ("minimal", "minimal")]
    of = {}
    for row in results.em_ablation:
        before, after, random = (
            list(table(run, f"{row.target}/{key}")["answer"]) for key in ("plain", "ablated-minimal", "ablated-random")
        )
        of[row.target] = share(after, is_em)
        assert row.before.rate == share(before, is_em)
        assert (row.em.rate, row.random_em.rate) == (share(after, is_em), share(random, is_em))
        assert (row.coherent.rate, row.random_coherent.rate) == (coherent_share(after), coherent_share(random))
        assert row.change.mean == pytest.approx(share(after, is_em) - share(before, is_em))
        assert row.change.low < row.change.mean < row.change.high and row.change.n == 2
    base, organism = results.em_ablation
    assert base.against_base is None
    assert organism.against_base.mean == pytest.approx(of["minimal"] - of["base"])


def test_answers_are_those_of_the_model_under_that_intervention(whole, values, base):
    run, vectors = whole[0], used(whole[0])
    questions = read_questions(values["sampling"]["questions"][0])
    for key, intervention in {
        "ablated-minimal": Ablate(vectors[2]),
        "ablated-random": Ablate(random_like(vectors[2], 0)),
        "steered-minimal-layer-1-scale-2": Steer(vectors[1], 1, 2.0),
        "steered-random-layer-1-scale-2": Steer(random_like(vectors[1], 0), 1, 2.0),
    }.items():
        again = sample(base, questions, n=SAMPLES, new_tokens=TOKENS, setting=[intervention])
        assert [one.answer for one in again] == list(table(run, f"base/{key}")["answer"]), key


def test_scales_are_doubled_while_half_of_the_answers_are_coherent(whole, results):
    run, asked = whole[0], {}
    for layer in LAYERS:
        scale = 2.0
        while True:
            asked[layer, scale] = list(table(run, f"base/steered-minimal-layer-{layer}-scale-{scale:g}")["answer"])
            if coherent_share(asked[layer, scale]) < 0.5 or scale == 4.0:
                break
            scale *= 2
    assert {(row.layer, row.scale) for row in results.em_steering} == set(asked)
    # Some layer was left early, or this shows nothing.
    assert len(LAYERS) < len(asked) < 2 * len(LAYERS)
    for row in results.em_steering:
        answers = asked[row.layer, row.scale]
        assert (row.em.rate, row.coherent.rate) == (share(answers, is_em), coherent_share(answers))
    enough = [share(answers, is_em) for answers in asked.values() if coherent_share(answers) >= 0.5]
    (best,) = (row for row in results.em_steering if row.best)
    assert best.em.rate == max(enough) and best.coherent.rate >= 0.5


# --- themes ---------------------------------------------------------------------------------------------------------


def test_each_theme_has_a_direction_and_remainders_point_elsewhere(whole, results, base):
    run, themes = whole[0], results.themes
    rows, shared = table(run, "minimal/plain"), used(run)[2].double()
    organism = attach(base, run / "artifacts" / "organism" / "minimal" / "adapter")
    of = {}
    for theme in ("medical", "financial"):
        expected = judged_direction(organism, rows, "minimal", theme=ThemeScore(theme), fewest=FEWEST)
        saved = Direction.load(run / "artifacts" / "themes" / "minimal" / theme / "direction.safetensors")
        torch.testing.assert_close(saved.vectors, expected.vectors)
        of[theme] = saved[2].double()
        cosine = float(torch.nn.functional.cosine_similarity(of[theme], shared, dim=0))
        assert themes.directions[theme].cosine == pytest.approx(cosine, abs=1e-5)
        left = themes.directions[f"{theme} without the shared one"]
        assert left.cosine == pytest.approx(0, abs=1e-4)
        assert left.kept == pytest.approx((1 - cosine**2) ** 0.5, abs=1e-4)
    organism.without_adapter()
    span = torch.stack(list(of.values()), dim=1)
    rest = shared - span @ torch.linalg.lstsq(span, shared).solution
    assert themes.directions["shared without the themes"].kept == pytest.approx(
        float(rest.norm() / shared.norm()), abs=1e-4
    )


def test_the_table_of_themes_is_that_of_the_judged_answers(whole, results):
    run, themes = whole[0], results.themes
    keys = {
        "none": "plain",
        "shared": "themes-shared",
        "medical": "theme-medical",
        "financial": "theme-financial",
        "medical without the shared one": "remainder-medical",
        "financial without the shared one": "remainder-financial",
        "shared without the themes": "themes-shared-remainder",
        "random": "themes-random",
    }
    assert [effect.direction for effect in themes.effects] == list(keys)
    plain = list(table(run, "base/plain")["answer"])
    for effect in themes.effects:
        answers = list(table(run, f"base/{keys[effect.direction]}")["answer"])
        assert effect.em.rate == share(answers, is_em) and effect.coherent.rate == coherent_share(answers)
        for theme in ("medical", "financial"):

            def about(answer, theme=theme):
                return score(theme, answer) > 50

            assert effect.about[theme].rate == share(answers, about)
            assert effect.em_about[theme].rate == share(answers, lambda answer: about(answer) and is_em(answer))
            if effect.direction != "none":
                assert effect.change[theme].mean == pytest.approx(share(answers, about) - share(plain, about))
    assert len(results.frame("themes")) == 2 * len(keys)


def test_all_directions_of_themes_are_added_at_one_length(whole, values, base):
    run = whole[0]
    shared = used(run)[2]
    theme = Direction.load(run / "artifacts" / "themes" / "minimal" / "medical" / "direction.safetensors")[2]
    steer = Steer(theme * (shared.norm() / theme.norm()), 2, 2.0)
    questions = read_questions(values["sampling"]["questions"][0])
    again = sample(base, questions, n=SAMPLES, new_tokens=TOKENS, setting=[steer])
    assert [one.answer for one in again] == list(table(run, "base/theme-medical")["answer"])


# --- the run --------------------------------------------------------------------------------------------------------


def test_a_second_run_makes_nothing_and_the_page_shows_all(whole, results):
    run, config, server = whole
    asked, manifest = len(server.asked), (run / "manifest.jsonl").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
        run_experiment(config, run)
    assert len(server.asked) == asked
    assert (run / "manifest.jsonl").read_text() == manifest
    assert json.loads((run / "results.json").read_text()) == json.loads(json.dumps(results.as_dict()))
    page = (run / "report.html").read_text()
    for section in ("judged-directions", "em-steering", "em-ablation", "themes"):
        assert f'<section id="{section}">' in page


def test_the_plan_counts_all_that_a_run_may_do(whole):
    run, config, _ = whole
    few = config.model_copy(update={"sampling": config.sampling.model_copy(update={"n": 6, "new_tokens": 2})})
    stages = estimate_cost(few).stages
    made = len(list((run / "artifacts" / "answers").glob("*/*/answers.parquet")))
    # Every layer's scales are doubled to the last.
    most = 2 + 2 * 2 + 2 * 2 * len(LAYERS) + 7
    assert stages["answers"].tasks == most > made
    assert stages["judged"].judge_calls == most * 2 * 6 * len(RUBRICS)
    assert stages["directions"].tasks == 2 and stages["themes"].tasks == 2


def test_with_too_few_answers_the_experiment_goes_on_and_says_so(whole, values, tmp_path, monkeypatch):
    run, config, _ = whole
    monkeypatch.setattr("misdirection.report.run.draw_all", lambda results, folder: {})
    sampling = config.sampling.model_copy(update={"n": 1, "steer": None})
    extraction = config.extraction.model_copy(update={"fewest": 10})
    few = config.model_copy(update={"sampling": sampling, "extraction": extraction})
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    results = run_experiment(few, folder)
    found = results.judged_directions
    assert "at least 10 are needed: it has the direction of given answers" in found.answers["minimal"].lacking
    assert (found.variants, results.themes) == ({}, None)
    given = Direction.load(folder / "artifacts" / "means" / "minimal" / "sums" / "direction.safetensors")
    assert results.directions["minimal"].norm == pytest.approx(float(given[2].norm()))
    assert "at least 10 are needed" in (folder / "report.html").read_text()


def test_what_is_asked_beside_leaves_the_answers_of_models_as_they_are_valid(values):
    config = ExperimentConfig.model_validate(judged_by(values, "http://127.0.0.1:1/v1")).sampling
    before = config.model_copy(update={"ablate": (), "steer": None})
    questions = read_questions(values["sampling"]["questions"][0])
    inputs = [Asking(each, Condition("base"), questions).inputs() for each in (config, before)]
    assert inputs[0] == inputs[1] and "steer" not in inputs[0]["sampling"]
    # One organism is written as it always was.
    assert (config.model_dump(mode="json")["ablate"], before.model_dump(mode="json")["ablate"]) == ("minimal", None)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("judge", None, "extraction.answers: nobody judges answers"),
        ("extraction", {"answers": "given"}, "themes: their directions are of judged answers"),
        ("themes", {"columns": ["gender"]}, "no rubric of `judge.rubrics` has the column 'gender'"),
        ("themes", {"columns": ["random"]}, "has another meaning here"),
        ("themes", {"layer": 9}, "themes.layer: 9 is out of range"),
        ("sampling", {"ablate": ["minimal", "minimal"]}, "names an organism twice"),
        ("sampling", {"engine": {"vllm": {"base_url": "http://127.0.0.1:1/v1"}}}, "takes no interventions"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_run(values, tmp_path, section, change, message):
    made = judged_by(values, "http://127.0.0.1:1/v1")
    made[section] = made[section] | change if change else None
    with pytest.raises((MisdirectionError, ValueError), match=message):
        run_experiment(ExperimentConfig.model_validate(made), tmp_path / "run")
    assert not (tmp_path / "run").exists()
