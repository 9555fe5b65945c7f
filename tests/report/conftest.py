import pytest

from run_fixture import run_results


@pytest.fixture
def results():
    return run_results()
