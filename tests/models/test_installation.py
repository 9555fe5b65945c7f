"""What `doctor` tells of a machine."""

import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from misdirection.errors import MissingPackage
from misdirection.extras import EXTRAS, needed_for
from misdirection.models import bundled, installation
from misdirection.models.installation import Installation


def test_it_tells_versions_devices_and_what_the_cache_keeps(tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path))
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "one").write_bytes(bytes(2_000_000))
    here = Installation.here()
    assert here.versions["torch"] == version("torch") and here.versions["misdirection"] == version("misdirection")
    assert "openai" not in here.versions
    assert here.devices[-1].name == "cpu" and here.devices[-1].gigabytes is None
    assert here.threads == torch.get_num_threads()
    assert (here.cache, here.kept) == (str(tmp_path), {"references": 2.0})
    assert Installation.model_validate_json(here.model_dump_json()) == here


def test_a_package_that_is_missing_or_too_old_is_named_with_its_extra(monkeypatch):
    found = {"openai": "2.9.0", "tenacity": None, "datasets": None}
    monkeypatch.setattr(installation, "installed_version", lambda name: found.get(name, "9999"))
    extras = Installation.here().extras
    assert set(extras) == set(EXTRAS)
    assert extras["judge"].missing == ["openai>=3", "tenacity>=9"]
    assert extras["judge"].install == "pip install 'misdirection[judge]'"
    assert extras["datasets"].missing == ["datasets"]
    assert extras["ray"].missing == []


@pytest.mark.parametrize(
    ("parts", "original", "where"), [(True, None, "wheel"), (False, None, "nowhere"), (False, "c", "Hub")]
)
def test_it_tells_where_a_bundled_model_comes_from(tmp_path, monkeypatch, parts, original, where):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path))
    made = bundled.BundledModel(
        hub_id="org/tiny",
        install="",
        files=("json/__init__.py",) if parts else ("no_such_wheel/gguf",),
        sha256="",
        copy="tiny",
        megabytes=1,
        original=bundled.Original(original, "") if original else None,
    )
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "tiny", made)
    assert Installation.here().bundled["tiny"] == where


def test_an_import_that_an_extra_is_for_says_which_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "misdirection.repairing.repair", raising=False)
    with pytest.raises(
        MissingPackage, match=r"^`repair`: the package optuna is not installed: pip install 'misdirection\[repair\]'$"
    ):
        import misdirection.repairing.repair  # noqa: F401


def test_the_page_says_what_each_package_is_for():
    page = (Path(__file__).parents[2] / "docs" / "install.md").read_text()
    core = [
        requirement.name for requirement in map(Requirement, requires("misdirection")) if requirement.marker is None
    ]
    assert re.findall(r"^\| `([\w-]+)` \|", page.partition("## Extras")[0], re.M) == core
    assert re.findall(r"^\| `([\w-]+)` \|", page.partition("## Extras")[2], re.M) == list(EXTRAS)


def test_a_package_that_is_there_but_broken_is_not_called_missing():
    with pytest.raises(ImportError, match="cannot import"), needed_for("judge"):
        raise ImportError("cannot import name")
