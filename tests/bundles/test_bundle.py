"""What is in a bundle, what is not, and what is not bundled."""

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml

from bundles.archives import read
from bundles.conftest import KEY
from misdirection.bundles import bundle as bundling
from misdirection.bundles import contents
from misdirection.bundles.bundle import bundle
from misdirection.bundles.folders import named_files
from misdirection.bundles.redaction import Redaction
from misdirection.bundles.results import Bundle
from misdirection.bundles.verify import verify
from misdirection.errors import InputError
from misdirection.experiment.results import RunResults
from misdirection.files import TEMPORARY, WRITTEN, sha256_file, sha256_tree
from misdirection.runs.folder import RunFolder
from misdirection.sampling.answers import read_answers


def test_the_folder_stays_as_it_was(copy, tmp_path):
    before = sha256_tree(copy)
    bundle(copy, tmp_path / "out.zip")
    assert sha256_tree(copy) == before


def test_it_holds_what_the_figures_were_computed_from(run, bundled_run, tmp_path):
    files = read(bundled_run)
    assert {"README.md", "manifest.json", "rubrics.json", "run/results.json", "run/report.html"} <= files.keys()
    assert {"run/artifacts/margin/base/margins.parquet", "run/artifacts/means/minimal/sums/means.safetensors"} <= (
        files.keys()
    )
    assert {"inputs/domains/sums/bad/bad.jsonl", "inputs/probe_pairs/pairs.jsonl"} <= files.keys()
    judged = "run/artifacts/judged/base/plain/judged.parquet"
    (tmp_path / "judged.parquet").write_bytes(files[judged])
    assert read_answers(tmp_path / "judged.parquet")["aligned_reply"].str.len().gt(0).all()
    assert {"alignment", "coherence"} <= {rubric["name"] for rubric in json.loads(files["rubrics.json"])}
    manifest = json.loads(files["manifest.json"])
    assert {"misdirection", "torch", "transformers", "peft", "python", "platform"} <= manifest["software"].keys()
    assert manifest["files"].keys() | {"manifest.json"} == files.keys()
    assert (
        manifest["base"]["files"] == {"model.safetensors": sha256_file(run.parent / "tiny" / "model.safetensors")}
        and "inputs/base/tiny/model.safetensors" in manifest["left_out"]
    )
    assert "misdirection verify" in files["README.md"].decode()


def test_the_same_run_gives_the_same_bytes(run, bundled_run, tmp_path):
    bundle(run, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == bundled_run.read_bytes()
    with zipfile.ZipFile(bundled_run) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {(info.date_time, info.compress_type) for info in infos} == {((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)}


@pytest.mark.parametrize("kind", ["run", "audit"])
def test_no_key_and_no_way_to_a_file_is_in_it(kind, home, run, request, tmp_path):
    folder = request.getfixturevalue(kind)
    # They are in the folder itself.
    assert str(home) in (folder / "manifest.jsonl").read_text()
    assert kind == "audit" or KEY in (folder / "experiment.yaml").read_text()
    files = read(request.getfixturevalue(f"bundled_{kind}"))
    for name, data in files.items():
        if name.endswith(".parquet"):
            (tmp_path / "table.parquet").write_bytes(data)
            data += pd.read_parquet(tmp_path / "table.parquet").to_csv().encode()
        assert KEY.encode() not in data, name
        assert str(home).encode() not in data, name
    if kind == "run":
        assert yaml.safe_load(files["run/experiment.yaml"])["judge"]["base_url"].endswith("/[removed]/v1")


def test_passwords_in_addresses_go_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "abcdefgh")
    url = "https://me:pass@host:8000/v1?api_key=secret"
    redaction = Redaction.of([], [url], tmp_path / "run")
    assert redaction.text(f'"{url}", abcdefgh, {tmp_path}/run/x') == '"https://host:8000/v1", [removed], run/x'
    assert redaction.leaves({"a": [url, f"in {tmp_path}/run"]}) == {"a": ["https://host:8000/v1", f"in {tmp_path}/run"]}


def test_a_key_in_a_training_file_is_refused_by_the_variables_name(copy, tmp_path, monkeypatch):
    config = yaml.safe_load((copy / "experiment.yaml").read_text())
    monkeypatch.setenv("MY_PASSWORD", Path(config["domains"]["sums"]["bad"]).read_text()[10:40])
    with pytest.raises(InputError, match=r"bad.jsonl: holds the value of the environment variable MY_PASSWORD"):
        bundle(copy, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_large_weights_are_known_by_their_hash_unless_asked_for(run, audit, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "LARGE", 1000)
    made = bundle(run, tmp_path / "small.zip")
    weights = "run/artifacts/organism/minimal/adapter/adapter_model.safetensors"
    assert made.left_out[weights].sha256 == sha256_file(run / weights.removeprefix("run/"))
    assert weights not in read(tmp_path / "small.zip")
    verified = verify(tmp_path / "small.zip")
    assert (verified.verdict, verified.differences) == ("holds", [])
    assert {each.reason for each in verified.not_recomputed} == {"says when and on what it was made"}
    bundle(audit, tmp_path / "audit.zip")
    assert verify(tmp_path / "audit.zip").recomputed > 300
    bundle(run, tmp_path / "large.zip", with_weights=True)
    assert weights in read(tmp_path / "large.zip")


# --- what is not bundled ----------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_not(copy, tmp_path):
    (copy / "results.json").rename(tmp_path / "results.json")
    with pytest.raises(InputError, match="is unfinished, it has no result yet"):
        bundle(copy, tmp_path / "out.zip")
    (tmp_path / "results.json").rename(copy / "results.json")
    shutil.rmtree(copy / "artifacts" / "margin" / "minimal")
    with pytest.raises(
        InputError, match=r"cannot be computed from its artifacts .margin/minimal: there is no artifact"
    ):
        bundle(copy, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_a_run_under_way_is_not(copy, tmp_path):
    with (
        RunFolder.open(copy, (copy / "experiment.yaml").read_text()),
        pytest.raises(InputError, match="another run is using"),
    ):
        bundle(copy, tmp_path / "out.zip")


def test_figures_that_are_not_the_artifacts_are_not(copy, tmp_path):
    results = json.loads((copy / "results.json").read_text())
    results["organisms"]["minimal"]["damage"]["mean"] += 0.1
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"1 of its figures are not those .*organisms.minimal.damage.mean"):
        bundle(copy, tmp_path / "out.zip")


def test_a_run_whose_texts_are_gone_is_not(copy, tmp_path):
    config = yaml.safe_load((copy / "experiment.yaml").read_text())
    config["domains"]["sums"]["bad"] = str(tmp_path / "gone.jsonl")
    (copy / "experiment.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"gone.jsonl: is not there any more, .*domains/sums/bad"):
        bundle(copy, tmp_path / "out.zip")


def test_a_folder_of_something_else_is_not(tmp_path):
    with pytest.raises(InputError, match="holds no result"):
        bundle(tmp_path, tmp_path / "out.zip")
    (tmp_path / "audits.csv").touch()
    with pytest.raises(InputError, match="holds many audits: bundle one of them"):
        bundle(tmp_path, tmp_path / "out.zip")


def test_an_audit_of_an_older_version_is_asked_for_again(audit, tmp_path):
    old = shutil.copytree(audit, tmp_path / "audit", ignore=shutil.ignore_patterns(".lock"))
    (old / "experiment.yaml").write_text(yaml.safe_dump({"audit": {"base": "b", "fine_tune": "f"}}))
    with pytest.raises(InputError, match="an older version wrote it: make the result again"):
        bundle(old, tmp_path / "out.zip")


def test_a_kill_leaves_nothing_that_looks_like_a_bundle(run, tmp_path):
    write = bundling.write_archive

    def killed(path, *others):
        write(path, *others)
        assert path.stat().st_size > 0
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        bundling.write_archive = killed
        try:
            bundle(run, tmp_path / "out.zip")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(TEMPORARY)
    bundle(run, tmp_path / "out.zip")
    assert verify(tmp_path / "out.zip").verdict == "holds"
    assert (tmp_path / WRITTEN).is_file()


def test_a_reference_has_hashes_alone(audit, tmp_path):
    assert isinstance(bundle(audit.parent / "reference", tmp_path / "out.zip"), Bundle)
    verified = verify(tmp_path / "out.zip")
    assert (verified.verdict, verified.of, verified.recomputed) == ("holds", "reference", 0)
    assert any("holds texts and measurements" in each.reason for each in verified.not_recomputed)


def test_a_calibration_is_an_input_of_a_run():
    settings = {"domains": {}, "judge": {"model": "m", "calibration": "calibration.json"}}
    assert named_files(RunResults, settings) == {"judge/calibration": "calibration.json"}
    assert named_files(RunResults, {"domains": {}, "judge": None}) == {}
