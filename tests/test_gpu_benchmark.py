"""That benchmarks/gpu.py runs, on a processor with tiny sizes."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from misdirection.sampling import compiled

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.bundled
def test_every_figure_is_there_and_finite(bundled, monkeypatch, capsys):
    # Blocks run as they were traced: that code is made of them is for the tests of sampling.
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    # A folder of tests has the name of a module that it needs.
    monkeypatch.delitem(sys.modules, "interventions", raising=False)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--device", "cpu", "--sizes", "tiny", "--json"])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = (
        "forward",
        "extraction",
        "hooks",
        "one at a time",
        "sweep",
        "sampling",
        "generate",
        "sampling compiled",
        "training",
    )
    assert all(any(name.startswith(part) for name in found["figures"]) for part in parts)
    assert all(0 < value < float("inf") for value in found["figures"].values())
    assert found["device"] == "cpu"
    assert found["ratios"].items() <= found["figures"].items()
