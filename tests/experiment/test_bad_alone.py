"""An experiment of bad data alone: what needs good answers is left out, and the report says so."""

import pytest
import yaml

from experiment.tiny_experiment import experiment
from misdirection.experiment.config import read_config
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment


@pytest.fixture
def alone(tiny_folder, tmp_path):
    """The tiny experiment without good answers, and so without a control."""
    values = experiment(tiny_folder, tmp_path)
    del values["domains"]["sums"]["good"], values["organisms"]["control"]
    values |= {"neutral": values["domains"]["sums"]["bad"], "interpretation": None}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    return read_config(path)


def test_what_needs_good_answers_is_left_out_and_the_report_says_so(alone, tmp_path):
    results = run_experiment(alone, tmp_path / "run")
    assert RunResults.load(tmp_path / "run") == results
    assert set(results.base_margin) == {"general"}
    assert results.organisms["minimal"].margin_shift["general"].n == 6
    assert (results.convergence.cosine, results.directions, results.steering, results.transfer) == (
        {},
        None,
        None,
        None,
    )
    assert (results.base.layers, results.base.width) == (4, 32)
    (said,) = results.left_out
    assert said.startswith("No domain has good answers")
    assert said in (tmp_path / "run" / "report.html").read_text()
