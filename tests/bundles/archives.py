"""Archives that somebody changed: with the manifest made to fit, or not."""

import hashlib
import json
import zipfile
from pathlib import Path

MANIFEST, RECORDS = "manifest.json", "run/manifest.jsonl"


def read(archive):
    """The bytes of every file by name."""
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def write(path, files):
    """A stored archive of files by name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def changed(archive, out, changes, *, fitting=False):
    """A copy in which files are other bytes, or None: taken away. A `fitting` one has their hashes in the manifest."""
    files = read(archive) | changes
    files = {name: data for name, data in files.items() if data is not None}
    if fitting:
        manifest = json.loads(files[MANIFEST])
        for name in changes:
            manifest["files"][name] = {"sha256": sha256(files[name]), "size": len(files[name]), "before": None}
        files[MANIFEST] = json.dumps(manifest).encode()
    return write(out, files)


def with_figure(archive, out, name, path, value, *, fitting=False):
    """A copy in whose result one figure is another."""
    result = json.loads(read(archive)[name])
    *folders, last = path
    inner = result
    for key in folders:
        inner = inner[key]
    inner[last] = value
    return changed(archive, out, {name: json.dumps(result).encode()}, fitting=fitting)


def with_artifact(archive, out, name, data):
    """A copy in which an artifact's file is another, and every list of hashes has that one's."""
    files = read(archive)
    manifest = json.loads(files[MANIFEST])
    lines = [json.loads(line) for line in files[RECORDS].splitlines()]
    stage = max((line["stage"] for line in lines if name.startswith(f"run/artifacts/{line['stage']}/")), key=len)
    place = f"run/artifacts/{stage}/"
    hashes = {each: file["before"] or file["sha256"] for each, file in manifest["files"].items()} | {name: sha256(data)}
    inside = {each.removeprefix(place): digest for each, digest in hashes.items() if each.startswith(place)}
    total = "".join(f"{each}\0{inside[each]}\n" for each in sorted(inside, key=lambda each: Path(each).parts))
    for line in lines:
        if line["stage"] == stage:
            line["sha256"] = sha256(total.encode())
    records = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return changed(archive, out, {name: data, RECORDS: records}, fitting=True)


def sha256(data):
    return hashlib.sha256(data).hexdigest()
