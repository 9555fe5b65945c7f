"""Bundles that hold, and whatever can be wrong with one: each is told by a line of its own."""

import io
import json
import shutil
import stat
import zipfile

import pandas as pd
import pytest

from bundles.archives import changed, read, with_artifact, with_figure, write
from misdirection.auditing.audit import audit as run_audit
from misdirection.bundles import verify as verifying
from misdirection.bundles.bundle import bundle
from misdirection.bundles.comparison import leaves
from misdirection.bundles.verify import verify
from misdirection.errors import InputError

MARGINS = "run/artifacts/margin/minimal/margins.parquet"
FACTS = {"made_on", "made_with", "environment"}


def table(data, **columns):
    """A Parquet file with some of its values made larger."""
    frame = pd.read_parquet(io.BytesIO(data))
    for name, more in columns.items():
        frame[name] += more
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def refuse_models(monkeypatch):
    """From here on no model and no tokenizer can be loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", refuse)


@pytest.mark.parametrize(("kind", "file"), [("run", "results.json"), ("audit", "audit.json")])
def test_every_figure_is_computed_again_without_a_model(kind, file, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(kind)
    archive = shutil.copy(request.getfixturevalue(f"bundled_{kind}"), tmp_path)
    refuse_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    verified = verify(archive)
    assert (verified.verdict, verified.faults, verified.differences, verified.tolerance) == ("holds", [], [], 0)
    values = json.loads((folder / file).read_text())
    facts = {key: list(leaves(values[key])) for key in FACTS & values.keys()}
    assert {each.figures for each in verified.not_recomputed} == facts.keys()
    # All but the kind and the version.
    assert verified.recomputed == len(list(leaves(values))) - 2 - sum(map(len, facts.values()))
    assert verified.intact == len(read(archive)) - 1


def test_an_audit_with_a_control_of_the_users_own_is_computed_again(base_model, tmp_path):
    config, adapters, reference = base_model
    kept = reference.save(tmp_path / "reference")
    control = shutil.copytree(adapters["control"], tmp_path / "benign")
    options = {"control": control, "reference": kept.folder, "dtype": "float32", "device": "cpu"}
    run_audit(config.model, adapters["minimal"], out=tmp_path / "audit", **options)
    bundle(tmp_path / "audit", tmp_path / "audit.zip")
    assert not [name for name, data in read(tmp_path / "audit.zip").items() if str(tmp_path).encode() in data]
    shutil.rmtree(tmp_path / "audit")
    verified = verify(tmp_path / "audit.zip")
    assert (verified.verdict, verified.faults, verified.differences) == ("holds", [], [])


def test_the_run_itself_need_not_be_here(run, bundled_run):
    everything = run.parent
    try:
        everything = everything.rename(everything.with_name("elsewhere"))
        assert verify(bundled_run).verdict == "holds"
    finally:
        everything.rename(run.parent)


# --- figures and files that were changed ------------------------------------------------------------------------------


def test_an_edited_figure_is_named(bundled_run, tmp_path):
    path = ("organisms", "minimal", "margin_shift", "general", "low")
    edited = with_figure(bundled_run, tmp_path / "a.zip", "run/results.json", path, -9.0)
    verified = verify(edited)
    assert [(each.file, each.fault) for each in verified.faults] == [("run/results.json", "changed")]
    (difference,) = verified.differences
    assert (difference.figure, difference.bundle) == (".".join(path), -9.0)
    assert difference.recomputed != -9.0
    fitting = verify(with_figure(bundled_run, tmp_path / "b.zip", "run/results.json", path, -9.0, fitting=True))
    assert (fitting.verdict, fitting.faults) == ("differs", [])
    assert fitting.differences == verified.differences
    assert fitting.manifest != verified.manifest


@pytest.mark.parametrize(
    ("name", "path", "value", "told"),
    [
        ("run", ("behaviour", "scores", 0, "em", "hits"), 99, "behaviour.scores[0].em.hits"),
        ("run", ("convergence", "base_null", "minimal", 1), 0.0, "convergence.base_null.minimal[1]"),
        ("run", ("samples", 0, "answers", "base"), "x", "samples[0].answers.base"),
        ("run", ("seconds", "margin/base"), 1e6, "seconds.margin/base"),
        ("audit", ("verdict",), "clear", "verdict"),
        ("audit", ("evidence", "damage", "high"), 1.0, "evidence.damage.high"),
        ("audit", ("fine_tune", "digest"), "0" * 64, "fine_tune.digest"),
        ("audit", ("reference", "bad_shift", "mean"), 7.0, "reference.bad_shift.mean"),
    ],
)
def test_figures_of_every_part_are(name, path, value, told, request, tmp_path):
    file = {"run": "run/results.json", "audit": "run/audit.json"}[name]
    archive = request.getfixturevalue(f"bundled_{name}")
    verified = verify(with_figure(archive, tmp_path / "a.zip", file, path, value, fitting=True))
    assert [each.figure for each in verified.differences] == [told]
    assert verified.verdict == "differs"


def test_an_edited_artifact_gives_no_figures(bundled_run, tmp_path):
    data = table(read(bundled_run)[MARGINS], misaligned=1.0)
    verified = verify(changed(bundled_run, tmp_path / "a.zip", {MARGINS: data}))
    assert [(each.file, each.fault) for each in verified.faults] == [(MARGINS, "changed")]
    reasons = {each.figures: each.reason for each in verified.not_recomputed}
    assert "margin/minimal: its artifact is not the recorded one" in reasons["organisms"]
    # What does not rest on it is.
    assert {"convergence", "behaviour"}.isdisjoint(reasons)
    assert (verified.verdict, verified.differences) == ("differs", [])


def test_nor_one_whose_hash_only_the_manifest_has(bundled_run, tmp_path):
    data = table(read(bundled_run)[MARGINS], misaligned=1.0)
    verified = verify(changed(bundled_run, tmp_path / "a.zip", {MARGINS: data}, fitting=True))
    assert verified.faults == []
    assert any("not the recorded one" in each.reason for each in verified.not_recomputed)
    assert verified.verdict == "open"


def test_an_edited_artifact_that_fits_gives_other_figures(bundled_run, tmp_path):
    data = table(read(bundled_run)[MARGINS], misaligned=1.0)
    verified = verify(with_artifact(bundled_run, tmp_path / "a.zip", MARGINS, data))
    assert verified.faults == []
    assert "organisms.minimal.margin_shift.general.mean" in {each.figure for each in verified.differences}
    assert verified.verdict == "differs"


def test_what_no_reader_can_take_is_a_reason(bundled_run, tmp_path):
    verified = verify(with_artifact(bundled_run, tmp_path / "a.zip", MARGINS, b"PAR1 and no more"))
    assert any("cannot be read" in each.reason for each in verified.not_recomputed)


def test_an_edited_input_is_not_computed_with(bundled_audit, tmp_path):
    name = next(name for name in read(bundled_audit) if name.endswith("reference/minimal.safetensors"))
    data = bytearray(read(bundled_audit)[name])
    data[-1] ^= 1
    verified = verify(changed(bundled_audit, tmp_path / "a.zip", {name: bytes(data)}))
    assert verified.recomputed == 0
    assert {each.reason for each in verified.not_recomputed} >= {"the input reference: is lacking or was changed"}


def test_a_missing_and_an_additional_file_are_told(bundled_run, tmp_path):
    verified = verify(changed(bundled_run, tmp_path / "a.zip", {"run/report.html": None, "notes.txt": b"hello"}))
    faults = [("notes.txt", "additional"), ("run/report.html", "missing")]
    assert [(each.file, each.fault) for each in verified.faults] == faults
    assert (verified.verdict, verified.differences) == ("differs", [])


def test_a_result_of_another_version_is_not_computed(bundled_run, tmp_path):
    verified = verify(with_figure(bundled_run, tmp_path / "a.zip", "run/results.json", ("version",), 2, fitting=True))
    assert (verified.recomputed, verified.verdict) == (0, "open")
    assert any("results.json has version 2, and this program" in each.reason for each in verified.not_recomputed)


def test_no_file_of_this_disk_stands_in_for_one_of_the_archives(bundled_run, tmp_path):
    manifest = json.loads(read(bundled_run)["manifest.json"])
    del manifest["inputs"]["neutral"]
    verified = verify(changed(bundled_run, tmp_path / "a.zip", {"manifest.json": json.dumps(manifest).encode()}))
    assert any("the input neutral: is lacking" in each.reason for each in verified.not_recomputed)
    assert verified.verdict == "open"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("run/experiment.yaml", b"audit: 3"),
        ("run/experiment.yaml", b"audit: {folder: [1], data: {}}"),
        ("run/manifest.jsonl", b"[[[["),
        ("run/audit.json", b"{" + b'"a":[' * 900),
        ("run/audit.json", b'{"kind": "audit", "version": 4, "a": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("run/audit.json", b"null"),
    ],
)
def test_nonsense_that_fits_does_not_hold(bundled_audit, tmp_path, name, data):
    verified = verify(changed(bundled_audit, tmp_path / "a.zip", {name: data}, fitting=True))
    assert (verified.equal, verified.faults) == (0, [])
    assert verified.verdict in ("open", "differs")


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_other_software_may_round_otherwise(bundled_audit, tmp_path, monkeypatch):
    name, path = "run/audit.json", ("evidence", "damage", "high")
    value = json.loads(read(bundled_audit)[name])["evidence"]["damage"]["high"]
    rounded = with_figure(bundled_audit, tmp_path / "a.zip", name, path, value * (1 + 1e-9), fitting=True)
    assert [each.figure for each in verify(rounded).differences] == [".".join(path)]
    ours = verifying.software()
    monkeypatch.setattr(verifying, "software", lambda: {**ours, "numpy": "1.0"})
    verified = verify(rounded)
    assert (verified.verdict, verified.rounded, verified.tolerance) == ("holds", 1, 1e-6)
    assert verified.software == {"numpy": (ours["numpy"], "1.0")}
    other = with_figure(bundled_audit, tmp_path / "b.zip", name, path, value * 1.001, fitting=True)
    assert len(verify(other).differences) == 1


# --- inputs on this disk ----------------------------------------------------------------------------------------------


def test_inputs_are_looked_for_by_their_names(run, bundled_run, tmp_path):
    shutil.copy(run.parent / "bad.jsonl", tmp_path)
    (tmp_path / "good.jsonl").write_text("other rows")
    shutil.copytree(run.parent / "tiny", tmp_path / "tiny")
    verified = verify(bundled_run, inputs=tmp_path)
    states = {each.name: each.state for each in verified.inputs}
    assert states["domains/sums/bad (bad.jsonl)"] == states["base (tiny)"] == "same"
    assert states["domains/sums/good (good.jsonl)"] == "changed"
    assert states["probe_pairs (pairs.jsonl)"] == "not here"
    assert verified.verdict == "differs"
    with pytest.raises(InputError, match=r"gone: is no folder"):
        verify(bundled_run, inputs=tmp_path / "gone")


# --- archives that are none -------------------------------------------------------------------------------------------


def test_an_archive_that_is_cut_off_or_foreign_is_one_line(bundled_run, tmp_path):
    (tmp_path / "cut.zip").write_bytes(bundled_run.read_bytes()[:-100])
    (tmp_path / "text.zip").write_text("hello")
    write(tmp_path / "foreign.zip", {"a.txt": b"a"})
    write(tmp_path / "other.zip", {"manifest.json": b'{"kind": "run"}'})
    manifest = json.loads(read(bundled_run)["manifest.json"])
    write(tmp_path / "newer.zip", {"manifest.json": json.dumps({**manifest, "version": 2}).encode()})
    for name, told in {
        "gone.zip": "cannot be read",
        "cut.zip": "is no bundle, or was cut off",
        "text.zip": "is no bundle, or was cut off",
        "foreign.zip": "is no bundle, it holds no manifest.json",
        "other.zip": "holds no result of kind 'bundle'",
        "newer.zip": "has version 2, this program reads version 1",
    }.items():
        with pytest.raises(InputError, match=told) as raised:
            verify(tmp_path / name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "a\\b", "a//b", "./a", "a\nb"])
def test_a_name_that_leads_out_is_refused(name, bundled_run, tmp_path):
    with pytest.raises(InputError, match="which leads elsewhere: nothing is read from it"):
        verify(changed(bundled_run, tmp_path / "a.zip", {name: b"x"}))
    manifest = json.loads(read(bundled_run)["manifest.json"])
    manifest["inputs"]["neutral"]["place"] = name
    with pytest.raises(InputError, match="which leads elsewhere"):
        verify(changed(bundled_run, tmp_path / "b.zip", {"manifest.json": json.dumps(manifest).encode()}))
    assert not (tmp_path.parent / "out.txt").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_links_compressed_files_and_doubles_are_refused(bundled_run, tmp_path):
    link = zipfile.ZipInfo("run/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name, method in {
        "link": zipfile.ZIP_STORED,
        "packed": zipfile.ZIP_DEFLATED,
        "twice": zipfile.ZIP_STORED,
    }.items():
        path = shutil.copy(bundled_run, tmp_path / f"{name}.zip")
        with zipfile.ZipFile(path, "a") as archive:
            place = {"link": link, "packed": "run/zeros", "twice": "run/results.json"}[name]
            archive.writestr(place, "/etc/passwd" if name == "link" else "0" * 10_000, method)
        with pytest.raises(InputError, match="twice" if name == "twice" else "is no plain file stored as it is"):
            verify(path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_and_ends_with_its_status(bundled_audit, tmp_path, call):
    status, out, _ = call("verify", bundled_audit)
    assert status == 0
    assert out.startswith("HOLDS: a bundle of kind audit")
    edited = with_figure(bundled_audit, tmp_path / "a.zip", "run/audit.json", ("verdict",), "cl\x1b[31mear")
    status, out, _ = call("verify", edited)
    assert status == 8
    assert out.startswith("DIFFERS")
    assert "run/audit.json: changed" in out
    # Nothing in a bundle steers the terminal.
    assert "cl?[31mear" in out
    status, out, _ = call("verify", edited, "--json")
    assert (status, json.loads(out)["differences"][0]["figure"]) == (8, "verdict")
    (tmp_path / "text.zip").write_text("hello")
    assert call("verify", tmp_path / "text.zip")[0] == 2


def test_the_command_that_bundles_prints_the_manifests_hash(audit, bundled_audit, tmp_path, call):
    status, out, err = call("bundle", audit, "--out", tmp_path / "a.zip")
    assert (status, out) == (0, f"manifest: {verify(bundled_audit).manifest}\n")
    assert f"wrote {tmp_path / 'a.zip'}" in err
