"""An empty cache of verdicts, and no endpoint or key of the machine's."""

import pytest

from misdirection.judging.cache import VerdictCache


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path):
    with VerdictCache(tmp_path / "v.sqlite") as opened:
        yield opened
