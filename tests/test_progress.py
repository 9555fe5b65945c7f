"""Progress on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from misdirection import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_short_work_says_nothing_where_there_is_no_terminal(capsys, clock):
    with progress.track("answers", 2) as advance:
        advance(1)
        clock(progress.EVERY - 1)
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_a_line_now_and_then(capsys, clock):
    with progress.track("answers of [base]", 4) as advance:
        for _ in range(4):
            clock(progress.EVERY / 2)
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "answers of [base]: 2 of 4, 0.1/s, 0:00:30, 0:00:30 left",
        "answers of [base]: 4 of 4, 0.1/s, took 0:01:00",
    ]


def test_many_short_parts_of_a_long_work_are_told_of(capsys, clock):
    for number in range(7):
        with progress.track(f"part {number}", 2) as advance:
            clock(progress.EVERY / 3)
            advance(2)
    told = capsys.readouterr().err.splitlines()
    assert told == ["part 2: 2 of 2, 0.2/s, took 0:00:10", "part 5: 2 of 2, 0.2/s, took 0:00:10"]


def test_steps_say_their_loss(capsys, clock):
    with progress.track_steps("train minimal") as report:
        clock(progress.EVERY)
        report(1, 3, 2.345)
    assert capsys.readouterr().err == "train minimal (loss 2.35): 1 of 3, 0.0/s, 0:00:30, 0:01:00 left\n"


@pytest.mark.parametrize("label", ["answers", "[odd] label"])
def test_a_terminal_gets_a_bar_that_ends_with_the_time_it_took(monkeypatch, label):
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=True, width=120, markup=False))
    with progress.track(label, 3) as advance:
        advance(3)
    shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", file.getvalue())
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith(label)
    assert "3/3" in last
    assert re.search(r"took 0:00:00$", last.rstrip())
    assert "left" not in last
