import pytest

from results_fixture import make_results


@pytest.fixture
def results():
    return make_results()
