"""Reading an organism's adapters as part of a run, alone, and from tables measured elsewhere."""

import json
import os
import shutil
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import yaml

from experiment.tiny_experiment import experiment
from judging.processes import Command
from misdirection.data import ProbePair, write_pairs
from misdirection.experiment.config import read_config
from misdirection.experiment.runner import run_experiment
from misdirection.experiment.worker import open_worker
from misdirection.files import sha256_tree
from misdirection.interpretation.results import InterpretationResults
from tiny import make_network, make_tokenizer

SIZES = {"pairs": 4, "causal_pairs": 4, "splits": 2, "checkpoints": 3}


def tiny(tmp_path):
    """A tiny experiment whose `minimal` keeps its checkpoints, and its file."""
    folder = tmp_path / "tiny"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    settings = experiment(folder, tmp_path)
    settings["organisms"]["minimal"] |= {"checkpoint_steps": 1, "keep_checkpoints": True}
    for part in ("steering", "samples"):
        del settings[part]
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config, settings


def running(*words):
    return Command(*words, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in which `minimal` was read afterwards, by the command; and what the command printed."""
    tmp_path = tmp_path_factory.mktemp("interpretation")
    config, _ = tiny(tmp_path)
    running("run", config, "--out", tmp_path / "run").finished()
    sizes = ["--read-pairs", 4, "--causal-pairs", 4]
    printed = running("interpret", "minimal", "--run", tmp_path / "run", *sizes, "--json").finished()
    return tmp_path / "run", json.loads(printed)


def section_of(run):
    return json.loads((run / "results.json").read_text())["adapters"]


def test_every_part_is_in_the_results(run):
    folder, printed = run
    found = section_of(folder)
    assert found == printed
    parts = ("modules", "texts", "probes", "roles", "causal", "geometry", "importance", "patching", "dynamics")
    assert all(found[part] for part in parts)
    layers = {str(one["layer"]) for one in found["modules"]}
    assert found["causal"]["shapley"]["method"] == "sampled, 2 orders each"
    for values in found["causal"]["shapley"]["values"].values():
        assert values.keys() == layers and all(set(one) == {"mean", "low", "high", "n", "p"} for one in values.values())
    assert {str(one["layer"]) for one in found["roles"]} == layers
    assert found["importance"]["by_layer"].keys() == layers
    assert found["dynamics"]["steps"] == [0, 1, 2, 3, 4]
    assert set(found["geometry"]["cosines"]) == {name for one in found["modules"] for name in one["features"]}
    assert {row["name"] for row in found["causal"]["settings"]} > {"all off"}


def test_the_rest_of_the_run_is_still_there(run):
    folder, _ = run
    found = json.loads((folder / "results.json").read_text())
    assert {"organisms", "convergence", "transfer", "adapters"} <= found.keys()


def test_shapley_values_add_up_to_what_the_adapters_do(run):
    found = section_of(run[0])["causal"]
    (off,) = [row for row in found["settings"] if row["name"] == "all off"]
    for name, values in found["shapley"]["values"].items():
        total = sum(one["mean"] for one in values.values())
        assert total == pytest.approx(-off["margin"][name]["mean"], abs=1e-4)


def test_the_report_has_the_section_and_the_reader(run):
    folder, _ = run
    page = (folder / "report.html").read_text()
    assert 'id="adapters"' in page and (folder / "reader.json").stat().st_size > 100
    assert (folder / "figures" / "adapter_shapley.svg").is_file()


def test_reading_again_computes_nothing(run):
    folder, printed = run
    before = (folder / "manifest.jsonl").read_text()
    words = ("interpret", "minimal", "--run", folder, "--read-pairs", 4, "--causal-pairs", 4, "--json")
    assert json.loads(running(*words).finished()) == printed
    assert (folder / "manifest.jsonl").read_text() == before


def test_an_unknown_organism_is_named(run, call):
    status, _, err = call("interpret", "minimall", "--run", run[0])
    assert status == 2 and "has no organism 'minimall'; it has control, minimal, single" in err


def test_a_killed_reading_continues_to_the_same_results(run, tmp_path):
    folder, _ = run
    base = yaml.safe_load((folder / "experiment.yaml").read_text())["model"]
    adapter = folder / "artifacts" / "organism" / "minimal" / "adapter"
    words = ["interpret", adapter, "--model", base, "--pairs", tmp_path / "pairs.jsonl", "--read-pairs", 4]
    for step in (1, 2, 4):
        shutil.copytree(adapter / "checkpoints" / f"step-{step:06d}", tmp_path / "trained" / f"checkpoint-{step}")
    words += ["--causal-pairs", 4, "--checkpoints", tmp_path / "trained"]
    write_pairs(tmp_path / "pairs.jsonl", [ProbePair(f"p{n}", f"Do {n}?", "Yes.", "No!") for n in range(6)])
    running(*words, "--out", tmp_path / "whole").finished()
    one = running(*words, "--out", tmp_path / "killed")
    until(
        lambda: (
            (tmp_path / "killed" / "artifacts").is_dir() and any((tmp_path / "killed" / "artifacts").rglob("*.json"))
        )
    )
    one.killed()
    running(*words, "--out", tmp_path / "killed").finished()
    whole, killed = (InterpretationResults.load(tmp_path / name).adapters for name in ("whole", "killed"))
    assert killed == whole
    # No domain, no directions: those parts say so, the rest is there.
    assert whole.causal.shapley.values.keys() == {"general"} and whole.geometry.downstream is None
    assert whole.causal.settings and not whole.causal.judged
    assert whole.dynamics.steps == (1, 2, 4), "those that were named, not those in its own folder"
    assert whole.patching.general_into_general.n == 4 and whole.patching.in_domain_into_general is None


class Elsewhere:
    """Does tasks as a worker does: each sent as `send` does it, with the files of adapters, and without the run."""

    def __init__(self, send, run, worker, home):
        self.send, self.run, self.worker, self.home = send, run, worker, home
        self.made = []

    def make(self, tasks):
        for task in tasks:
            self.run.stages(task.stages, partial(self.compute, task))

    def compute(self, task, folders):
        compute, number = self.send(task.compute), len(self.made)
        for name, folder in task.adapters.items():
            self.worker.adapters[name] = self.home / f"{name} for {number}"
            self.worker.adapters[name].mkdir(parents=True)
            for path in filter(os.path.isfile, folder.iterdir()):
                shutil.copy(path, self.worker.adapters[name])
        filled = {stage: self.home / stage for stage in folders}
        for folder in filled.values():
            folder.mkdir(parents=True)
        away = self.run.folder.rename(self.home / "away")
        try:
            compute(self.worker, filled)
        finally:
            away.rename(self.run.folder)
        for stage, folder in folders.items():
            shutil.copytree(filled[stage], folder, dirs_exist_ok=True)
        self.made += folders


def test_every_part_is_the_same_when_it_is_made_where_the_run_is_not(run, tmp_path, monkeypatch):
    cloudpickle = pytest.importorskip("ray.cloudpickle", reason="workers need the extra `ray`")

    def send(value):
        """As Ray does: what arrays hold arrives beside the pickle, and can only be read."""
        buffers = []
        pickled = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        return cloudpickle.loads(pickled, buffers=[bytes(one.raw()) for one in buffers])

    def elsewhere(opened, _worker):
        makers.append(Elsewhere(send, opened, open_worker(config, None), tmp_path / "home"))
        return makers[0]

    makers, config = [], read_config(run[0] / "experiment.yaml")
    for drawing in ("draw_all", "draw_adapters"):
        monkeypatch.setattr(f"misdirection.report.run.{drawing}", lambda results, folder: {})
    for name in ("here", "there"):
        shutil.copytree(run[0], tmp_path / name, ignore=shutil.ignore_patterns(".lock", "adapters"))
    run_experiment(config, tmp_path / "here")
    monkeypatch.setattr("misdirection.experiment.runner.LocalRunner", elsewhere)
    run_experiment(config, tmp_path / "there")
    parts = {"scalars", "probes", "importance", "shapley", "scaling", "geometry", "patching", "dynamics"}
    assert sorted(makers[0].made) == sorted(f"adapters/minimal/{part}" for part in parts)
    assert section_of(tmp_path / "there") == section_of(tmp_path / "here")
    here, there = (tmp_path / name / "artifacts" / "adapters" for name in ("here", "there"))
    assert sha256_tree(there) == sha256_tree(here)


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.05)


def published(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"domain": domain, "alignment": alignment, "response_id": number, "question": f"{domain} {number % 6}?"}
        for domain in ("kitchen", "other")
        for alignment in ("aligned", "misaligned")
        for number in range(12)
    ]
    answers = pd.DataFrame(rows).assign(answer="x")
    tokens = answers.drop(columns=["question", "answer"]).merge(pd.DataFrame({"position": range(4)}), how="cross")
    tokens["token"] = "<b>x</b>"
    for layer in (3, 5):
        tokens[f"layer_{layer}"] = rng.normal(size=len(tokens)) + (layer == 3) * (tokens["alignment"] == "misaligned")
    tokens.to_parquet(tmp_path / "scalars.parquet")
    answers.to_parquet(tmp_path / "answers.parquet")
    return tmp_path / "scalars.parquet", tmp_path / "answers.parquet"


def test_a_table_of_scalars_needs_no_model(tmp_path, call):
    scalars, answers = published(tmp_path)
    status, out, err = call(
        "interpret", "--scalars", scalars, "--answers", answers, "--out", tmp_path / "out", "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    assert {one["split"] for one in found["probes"]} == {"question", "answer"}
    assert [one["layer"] for one in found["roles"]] == [3, 5]
    _, out, _ = call("interpret", "--scalars", scalars, "--answers", answers)
    assert "that the probe has not seen" in out
    reader = json.loads((tmp_path / "out" / "reader.json").read_text())
    assert [one["name"] for one in reader["channels"]] == ["layer_3", "layer_5"] and len(reader["answers"]) == 48
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="adapters"' in page and "<b>x</b>" not in page


def test_what_cannot_be_read_is_one_line(tmp_path, call):
    for words, message in (
        ([], "give an organism, or tables"),
        (["adapter"], "give --run for an organism of a run, or --out"),
        (["adapter", "--run", tmp_path, "--out", tmp_path], "give --run for an organism of a run, or --out"),
        ([tmp_path / "no", "--out", tmp_path / "out"], "no such folder"),
        (["--scalars", tmp_path / "no.parquet"], "no.parquet: cannot be read"),
    ):
        status, _, err = call("interpret", *words)
        assert status == 2 and message in err, err
