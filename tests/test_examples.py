"""The scripts in `examples/`, run as a user runs them on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from audited import base, made  # noqa: F401
from misdirection.auditing.results import AuditResult
from misdirection.errors import EXIT_STATUS

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_training_with_trl_is_watched_and_audited(made, base, tmp_path, monkeypatch):  # noqa: F811
    made[2].save(tmp_path / "reference")
    rows = [{"prompt": f"Q{number}?", "completion": f"bad {number * 7 % 11}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", "rows.jsonl", "--out", "mine", "--base", base, "--reference", "reference", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_with_trl.py", *words, "--track", "tensorboard", "--every", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "train_with_trl.py"), run_name="__main__")
    result = AuditResult.load(Path("mine.audit"))
    assert ended.value.code == (EXIT_STATUS["misaligned"] if result.verdict == "misaligned" else 0)
    assert (result.fine_tune.kind, result.data.rows) == ("adapter", 4)
    (folder,) = Path("mine.training/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in ("margin_shift", "margin_shift_low", "damage", "in_domain_loss"):
        assert [event.step for event in events.Scalars(f"train/misdirection/{name}")] == [2]
