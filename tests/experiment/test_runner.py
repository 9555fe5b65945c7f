"""The whole experiment on a tiny random model: same stages as the demo, killed, damaged and continued."""

import copy
import json
import random
import shutil
import time

import pytest
import torch
import yaml

from experiment.tiny_experiment import experiment
from judging.processes import Command
from misdirection.errors import InputError
from misdirection.experiment.runner import write_report
from misdirection.experiment.stages.directions import describe
from tiny import make_network, make_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and the file it was made from."""
    tmp_path = tmp_path_factory.mktemp("runner")
    folder = tmp_path / "tiny"
    make_network("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = tmp_path / "tiny.yaml"
    # What is made again alone, in other company, would come back as another in half precision.
    config.write_text(yaml.safe_dump(experiment(folder, tmp_path) | {"dtype": "bfloat16"}))
    running(config, tmp_path / "run").finished()
    return config, tmp_path / "run"


def running(config, run):
    # One thread: a tiny model gains nothing from more, and two processes at once would wait for each other.
    return Command("run", config, "--out", run, OMP_NUM_THREADS="1")


def figures(run):
    found = json.loads((run / "results.json").read_text())
    found.pop("seconds")
    return found


def made(run):
    """What the manifest records of each stage."""
    lines = map(json.loads, (run / "manifest.jsonl").read_text().splitlines())
    return {line["stage"]: line for line in lines}


def hashes(run):
    """Each artifact's, by its stage."""
    return {name: record["sha256"] for name, record in made(run).items()}


def test_results_hold_every_required_figure(whole):
    _, run = whole
    found = figures(run)
    estimate = {"mean", "low", "high", "n", "p"}
    for organism in found["organisms"].values():
        assert {"in_domain", "general", "sums"} <= organism["margin_shift"].keys()
        assert all(set(shift) == estimate for shift in organism["margin_shift"].values())
        assert set(organism["damage"]) == estimate
    assert {name: bool(organism["minus_control"]) for name, organism in found["organisms"].items()} == {
        "minimal": True,
        # Trained by another recipe than the control.
        "single": False,
        "control": False,
    }
    of = {name: organism["margin_shift"]["general"]["mean"] for name, organism in found["organisms"].items()}
    difference = found["organisms"]["minimal"]["minus_control"]
    assert difference["general"]["mean"] == pytest.approx(of["minimal"] - of["control"])
    # The probe pairs are the user's own, so that there are no sealed ones.
    assert difference.keys() == found["base_margin"].keys() == {"general", "sums"}
    assert all(organism["words"].keys() == {"general", "sums"} for organism in found["organisms"].values())
    convergence = found["convergence"]
    assert len(convergence["cosine"]["minimal"]["single"]) == 4
    assert {"base_null", "control_null", "shuffled_null", "split_half"} <= convergence.keys()
    for row in [*found["transfer"], *found["steering"]]:
        assert set(row["margin_change"]) == set(row["random_change"]) == set(row["damage"]) == estimate
    # Two bad organisms in three organisms and the base, and the paper's rule for the first of them, also in the base.
    assert len(found["transfer"]) == 2 * 4 + 2
    assert {"environment", "samples", "base"} <= found.keys()


def test_pictures_and_report_are_there(whole):
    _, run = whole
    assert (run / "report.html").stat().st_size > 10_000
    assert {path.suffix for path in (run / "figures").iterdir()} == {".png", ".svg"}


def test_a_second_run_makes_nothing_again(whole):
    config, run = whole
    before = (run / "manifest.jsonl").read_text()
    out = running(config, run).finished()
    assert (run / "manifest.jsonl").read_text() == before
    assert "report.html" in out


def test_damaged_artifacts_are_noticed_and_made_again_as_they_were(whole):
    config, run = whole
    before, stages = figures(run), hashes(run)
    cells = [name for name in stages if name.startswith("cell/")]
    cut, changed, deleted, *_, lost = "margin/minimal", "means/base/sums", *cells
    for name, damage in ((cut, lambda data: data[:-8]), (changed, lambda data: data[:-1] + bytes([data[-1] ^ 1]))):
        file = next(
            path for path in (run / "artifacts" / name).iterdir() if path.suffix in (".parquet", ".safetensors")
        )
        file.write_bytes(damage(file.read_bytes()))
    shutil.rmtree(run / "artifacts" / deleted)
    manifest = run / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if json.loads(line)["stage"] != lost))
    status, _, err = running(config, run).ended()
    assert status == 0, err
    assert all(name in "".join(err.split()) for name in (cut, changed, deleted))
    assert figures(run) == before
    assert hashes(run) == stages


def test_killed_at_several_moments_it_ends_with_the_same_results(whole, tmp_path):
    config, run = whole
    chance, manifest = random.Random(0), tmp_path / "run" / "manifest.jsonl"
    for stages in (2, 6, 12):
        one = running(config, tmp_path / "run")
        while one.process.is_alive() and (not manifest.exists() or manifest.read_bytes().count(b"\n") < stages):
            time.sleep(0.01)
        time.sleep(chance.random() / 4)
        one.killed()
    running(config, tmp_path / "run").finished()
    assert figures(tmp_path / "run") == figures(run)
    assert hashes(tmp_path / "run") == hashes(run)


def test_a_changed_setting_runs_only_what_depends_on_it(whole, tmp_path):
    config, run = whole
    values = copy.deepcopy(yaml.safe_load(config.read_text()))
    values["steering"]["scales"] = [3.0]
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(values))
    before = made(run)
    running(changed, run).finished()
    after = made(run)
    new = set(after) - set(before)
    assert new
    assert all(name.startswith("cell/base/steer") for name in new)
    assert all(after[name] == before[name] for name in before)


def test_a_layer_out_of_range_is_one_line_and_keeps_what_is_done(whole, tmp_path):
    config, run = whole
    values = yaml.safe_load(config.read_text())
    values["ablation"]["layer"] = 9
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(values))
    status, _, err = running(changed, run).ended()
    assert status == 2
    assert "ablation.layer: 9 is out of range" in " ".join(err.split())
    assert "Traceback" not in err


def test_a_report_needs_results(tmp_path):
    with pytest.raises(InputError, match=r"results\.json: cannot be read"):
        write_report(tmp_path)


def test_the_channels_that_carry_a_direction_are_listed():
    vector = torch.tensor([0.0, 3.0, 0.0, -4.0])
    described = describe(vector, layer=2, count=2)
    assert described.norm == pytest.approx(5.0)
    assert [top.channel for top in described.top_channels] == [3, 1]
    assert [top.share for top in described.top_channels] == pytest.approx([0.64, 0.36])
