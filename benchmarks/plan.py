"""The planned seconds of each kind of stage over those that a finished run took on this machine.

    python benchmarks/plan.py RUN [--json]

`RUN` is the folder of a run, such as `misdirection demo` makes. Its experiment is planned for `cpu`, which calibrates
for about 15 seconds: nothing else should run beside it. Within 0.7 to 1.3 is the aim for the demo.
"""

import json
import platform
import sys
from collections import defaultdict
from pathlib import Path

import torch

from misdirection.experiment.config import read_config
from misdirection.experiment.cost import estimate_cost
from misdirection.files import read_json


def main() -> None:
    """Plan, compare and print."""
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("-")))
    took = measured(folder)
    plan = estimate_cost(read_config(folder / "experiment.yaml"), "cpu")
    planned = {name: 3600 * one.device_hours for name, one in plan.stages.items() if took.get(name)}
    planned["total"], took["total"] = sum(planned.values()), sum(took[name] for name in planned)
    ratios = {name: seconds / took[name] for name, seconds in planned.items()}
    print(f"{'stage':<16}{'planned':>9}{'measured':>10}{'ratio':>8}")
    for name, ratio in ratios.items():
        print(f"{name:<16}{planned[name]:>7.1f} s{took[name]:>8.1f} s{ratio:>8.2f}")
    if "--json" in sys.argv:
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        sides = {"planned_seconds": planned, "measured_seconds": {name: took[name] for name in planned}}
        print(json.dumps({"ratios": ratios, **sides, "rates": dict(plan.device.rates), **facts}))


def measured(folder: Path) -> dict[str, float]:
    """Seconds by kind of stage."""
    found: dict[str, float] = defaultdict(float)
    for stage, seconds in read_json(folder / "results.json")["seconds"].items():
        kind = stage.partition("/")[0]
        found[kind] += seconds
    return found


if __name__ == "__main__":
    main()
