"""Fixtures of the runs that are judged."""

import pytest


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of verdicts."""
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
