"""That benchmarks/gpu.py runs, on a processor with tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.bundled
def test_every_figure_is_there_and_finite(bundled):
    call = [sys.executable, BENCHMARK, "--device", "cpu", "--sizes", "tiny", "--json"]
    out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
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
