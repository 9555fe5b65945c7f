"""One experiment on several base models: runs of their own, one table, and a model that fails alone."""

import json
import shutil

import pytest
import yaml

from experiment.tiny_experiment import experiment, graded, isolate, with_judge
from judging.judge_server import JudgeServer
from misdirection.errors import EXIT_STATUS, InputError
from misdirection.experiment.config import read_config
from misdirection.experiment.cost import estimate_cost, estimate_several
from misdirection.experiment.results import RunResults
from misdirection.experiment.several import SeveralConfig, at_depths, read_several
from misdirection.experiment.several_results import RunsResults
from misdirection.experiment.several_runner import run_several
from misdirection.judging.scoring import Scores
from tiny import make_network, make_tokenizer

BASES = {"qwen2": {"num_hidden_layers": 6}, "llama": {}, "other-seed": {"seed": 1}}
"""In another order than that of their names."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A judged experiment on three tiny models, two of them of one shape, and one that is not there."""
    tmp_path = tmp_path_factory.mktemp("several")
    for name, changes in BASES.items():
        make_network("qwen2" if name == "qwen2" else "llama", **changes).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    values = experiment(tmp_path / "llama", tmp_path)
    for key in ("model", "steering", "samples"):
        del values[key]
    values["organisms"] = {"minimal": values["organisms"]["minimal"]}
    values["models"] = [
        str(tmp_path / "qwen2"),
        str(tmp_path / "gone"),
        *({"model": str(tmp_path / name)} for name in list(BASES)[1:]),
    ]
    values["ablation"] = {"layer": 0.5, "questions": 4}
    questions = tmp_path / "questions.txt"
    questions.write_text("Why is it so?\nAnd how, then?\n")
    values["sampling"] = {"questions": [str(questions)], "n": 2, "new_tokens": 2}
    path = tmp_path / "several.yaml"
    with JudgeServer(graded) as server, pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path / "cache")
        path.write_text(yaml.safe_dump(with_judge(values, server.url), sort_keys=False))
        yield path


@pytest.fixture(scope="module")
def joint(file):
    """The folder of the finished runs."""
    run_several(read_several(file), file.parent / "joint")
    return file.parent / "joint"


def test_the_table_has_every_model_and_organism_with_its_own_figures(joint):
    results = RunsResults.load(joint)
    assert [model.name for model in results.models] == list(BASES)
    assert [(row.model, row.organism) for row in results.organisms] == [(model, "minimal") for model in BASES]
    for row in results.organisms:
        own = RunResults.load(joint / "runs" / row.model).organisms[row.organism]
        assert row.margin_shift == own.margin_shift["general"] and row.minus_control == own.minus_control.get("general")
        rates = Scores(RunResults.load(joint / "runs" / row.model).behaviour.scores).frame().set_index("organism")
        assert row.judged.answers == 4 and row.judged.questions == 2
        assert row.judged.em.rate == rates["em"][row.organism]
        assert row.judged.coherent.rate == 1 - rates["incoherent"][row.organism]
    assert all(model.judged for model in results.models)
    (failed,) = results.failed
    assert (failed.name, failed.status, results.waiting) == ("gone", 2, []) and "gone" in failed.cause
    assert len(results.frame()) == 3 and list(results.frame("models")["name"]) == list(BASES)


def test_a_depth_is_a_layer_of_each_model(joint):
    layers = {name: RunResults.load(joint / "runs" / name).transfer[0].layer for name in BASES}
    assert layers == {"qwen2": 3, "llama": 2, "other-seed": 2}


def test_directions_are_compared_where_the_shapes_agree_beside_the_bases_own(joint):
    (across,) = RunsResults.load(joint).across
    assert (across.organism, across.first, across.second) == ("minimal", "llama", "other-seed")
    assert len(across.cosine) == len(across.base_null) == 4
    assert len(RunsResults.load(joint).frame("across")) == 4


def test_the_page_names_what_failed_and_leads_to_each_report(joint):
    page = (joint / "report.html").read_text()
    assert "<strong>gone</strong> failed:" in page
    for name in BASES:
        assert f'href="runs/{name}/report.html"' in page and (joint / "runs" / name / "report.html").is_file()
    assert RunsResults.load(joint).pictures == ["margins", "judged", "across"]
    assert all((joint / "figures" / f"{name}.png").is_file() for name in ("margins", "judged", "across"))


def test_the_command_makes_what_was_lost_and_nothing_else_and_ends_with_the_status_of_what_failed(call, joint, file):
    folder = file.parent / "lost"
    shutil.copytree(joint, folder)
    kept = {
        path: path.read_bytes() for name in ("qwen2", "llama") for path in folder.glob(f"runs/{name}/manifest.jsonl")
    }
    shutil.rmtree(folder / "runs" / "other-seed")
    (folder / "results.json").unlink()
    status, out, err = call("run", str(file), "--out", str(folder))
    assert status == EXIT_STATUS["InputError"] and "report.html" in out
    assert "error: models that failed, which the same command tries again: gone: " in err
    assert kept == {path: path.read_bytes() for path in kept}
    assert json.loads((folder / "results.json").read_text()) == json.loads((joint / "results.json").read_text())


def test_the_report_is_made_again_as_it_was(call, joint):
    before = (joint / "report.html").read_bytes()
    (joint / "report.html").unlink()
    assert call("report", str(joint))[0] == 0
    assert (joint / "report.html").read_bytes() == before


def test_commands_of_one_run_say_so(call, joint, file):
    status, _, err = call("bundle", str(joint), "--out", "x.zip")
    assert status == 2 and "holds the runs of several models: name one of them" in err
    # The folder of one run is none of several, and the other way round.
    one = file.parent / "one.yaml"
    values = yaml.safe_load(file.read_text()) | {"model": str(file.parent / "llama"), "ablation": None}
    del values["models"]
    one.write_text(yaml.safe_dump(values))
    status, _, err = call("run", str(one), "--out", str(joint))
    assert status == 2 and "another kind of run" in err


def test_the_plan_is_the_sum_of_the_models(call, file):
    config = read_several(file)
    there = SeveralConfig(config.name, {name: config.models[name] for name in BASES}, config.values, config.source)
    found = estimate_several(there)
    alone = [estimate_cost(there.experiment(name)).total for name in BASES]
    assert found.total.flops == sum(total.flops for total in alone)
    assert found.total.memory.total == max(total.memory.total for total in alone)
    status, _, err = call("plan", str(file))
    assert status == 2 and "gone" in err
    values = yaml.safe_load(file.read_text())
    (file.parent / "there.yaml").write_text(yaml.safe_dump(values | {"models": values["models"][2:]}))
    status, out, _ = call("plan", str(file.parent / "there.yaml"))
    assert status == 0 and all(name in out for name in ("llama", "other-seed", "total"))


def test_only_fractions_under_layers_are_depths():
    values = {"a": {"layers": [0.25, 0.3, 1.0, 7], "scales": [0.5]}, "layer": 0.5, "share": 0.5, "b": [{"layer": 0.0}]}
    assert at_depths(values, 8) == {
        "a": {"layers": [2, 7], "scales": [0.5]},
        "layer": 4,
        "share": 0.5,
        "b": [{"layer": 0}],
    }
    assert at_depths({"layers": [3, 3]}, 8) == {"layers": [3, 3]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": []}, "models"),
        ({"model": "x"}, "model: goes without `models`"),
        ({"models": [{"model": "x", "layers": 3}]}, "unknown key 'models.0.layers'"),
        ({"organism": {}}, "unknown key 'organism'; did you mean 'organisms'"),
    ],
)
def test_a_wrong_key_is_told_before_any_model_is_looked_for(file, changes, said):
    with pytest.raises(InputError, match=said):
        SeveralConfig.of(yaml.safe_load(file.read_text()) | changes, "file")


def test_a_file_of_the_other_kind_is_one_line(file, tmp_path):
    with pytest.raises(InputError, match="one model is needed here"):
        read_config(file)
    values = yaml.safe_load(file.read_text())
    del values["models"]
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(values | {"model": "x", "ablation": None, "sampling": None, "judge": None}))
    with pytest.raises(InputError, match="models: is missing"):
        read_several(path)
