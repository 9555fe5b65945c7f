"""A stage with its figure as another package adds them: this one file, and one registration of each."""

import json
from functools import partial

import pytest
from matplotlib.figure import Figure

from experiment.tiny_experiment import experiment
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import STAGES, Experiment, Stage
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.files import read_json, write_json
from misdirection.models.chat import encode
from misdirection.report.figures import FIGURES, ReportFigure
from misdirection.results import Figures
from tiny import make_network, make_tokenizer


class Lengths(Figures):
    """Tokens of the neutral texts, by model."""

    tokens: dict[str, int]


def count_tokens(model, texts, worker, folders):
    """Counts with the worker's own tokenizer, wherever that is."""
    (folder,) = folders.values()
    tokenizer = worker.chat(model).tokenizer
    counts = [len(encode(tokenizer, text.question, text.answer).ids) for text in texts]
    write_json(folder / "lengths.json", sum(counts))


class LengthStage(Stage):
    """Counts the tokens of the neutral texts."""

    name = "lengths"
    VERSION = 1
    after = ("organism",)

    def tasks(self):
        texts = self.experiment.texts.neutral
        inputs = {"texts": [text.question for text in texts]}
        return [
            self.task(model, {model: inputs}, partial(count_tokens, model, texts)) for model in self.experiment.models
        ]

    def section(self):
        models = self.experiment.models
        return Lengths(tokens={model: read_json(self.artifact(model) / "lengths.json") for model in models})


def draw_lengths(results):
    lengths = Lengths.model_validate(results.extensions["lengths"])
    figure = Figure(figsize=(4, 3))
    figure.subplots().bar(list(lengths.tokens), list(lengths.tokens.values()))
    return figure


LENGTHS = ReportFigure(
    title="Lengths of the neutral texts",
    alt="Bars: the tokens of the neutral texts for every model",
    caption="Every model reads the same tokens.",
    applies=lambda results: "lengths" in results.extensions,
    draw=draw_lengths,
)


@pytest.fixture
def registered():
    STAGES.register("lengths")(LengthStage)
    FIGURES.register("lengths")(LENGTHS)
    yield
    STAGES.remove("lengths")
    FIGURES.remove("lengths")


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "tiny"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    values = experiment(folder, tmp_path)
    values["organisms"] = {"minimal": values["organisms"]["minimal"]}
    for part in ("steering", "ablation", "samples"):
        del values[part]
    return ExperimentConfig.model_validate(values)


def test_its_artifacts_its_figures_and_its_picture_are_part_of_the_run(registered, config, tmp_path):
    run = tmp_path / "run"
    results = run_experiment(config, run)
    counted = results.extensions["lengths"]["tokens"]
    assert counted.keys() == {"base", "minimal"} and counted["base"] == counted["minimal"] > 0
    assert json.loads((run / "results.json").read_text())["extensions"]["lengths"]["tokens"] == counted
    assert RunResults.load(run) == results
    page = (run / "report.html").read_text()
    assert "Every model reads the same tokens." in page[page.index('<section id="lengths">') :]
    assert (run / "figures" / "lengths.png").stat().st_size > 1000
    before = (run / "manifest.jsonl").read_text()
    assert before.count('"stage": "lengths/') == 2
    run_experiment(config, run)
    assert (run / "manifest.jsonl").read_text() == before


def test_without_the_registration_its_figures_have_no_page_but_stay_readable(config, tmp_path):
    STAGES.register("lengths")(LengthStage)
    try:
        run_experiment(config, tmp_path / "run")
    finally:
        STAGES.remove("lengths")
    results = RunResults.load(tmp_path / "run")
    assert results.extensions.keys() == {"lengths"}
    assert "lengths" not in results.write_page(tmp_path / "run").read_text().split("<main>")[0]


def test_stages_come_after_what_they_need(registered, config):
    names = list(Experiment(config, None, None).stages)
    for name, stage in STAGES.items():
        assert all(names.index(needed) < names.index(name) for needed in stage.after)


def test_each_task_is_built_once(registered, config, tmp_path, monkeypatch):
    built, task = [], Stage.task
    monkeypatch.setattr(
        Stage, "task", lambda stage, *given: built.append((stage.name, given[1].keys())) or task(stage, *given)
    )
    run_experiment(config, tmp_path / "run")
    names = [f"{stage}/{key}" for stage, keys in built for key in keys]
    assert sorted(names) == sorted(set(names))
