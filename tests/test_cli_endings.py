"""How commands end: the exit status of each kind of exception, and what is said."""

import errno
import subprocess
import sys

import pytest

from misdirection.cli.shared import app
from misdirection.errors import EXIT_STATUS, InputError, JudgeError, MisdirectionError, WorkerError

CRASH = """
import sys
from misdirection.cli import main
from misdirection.cli.shared import app

@app.command()
def crash() -> None:
    raise ValueError("two lines\\nof it")

sys.argv = ["misdirection", "crash"]
main()
"""


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.fixture
def end(call, monkeypatch, tmp_path):
    """Run a command that ends with an exception; gives its status and standard error."""
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    def run(error):
        @app.command()
        def fail():
            raise error

        status, out, err = call("fail")
        assert out == ""
        return status, err

    return run


@pytest.mark.parametrize("kind", [InputError, JudgeError, WorkerError, *MisdirectionError.__subclasses__()])
def test_our_errors_end_with_the_status_of_their_class(end, kind):
    status, err = end(kind("[so]: it is"))
    assert status == kind.exit_status == EXIT_STATUS[kind.__name__]
    assert err == "error: [so]: it is"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "MemoryProblem"),
        (OutOfMemoryError("CUDA out of memory"), "MemoryProblem"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "DiskProblem"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(end, error, kind):
    status, err = end(error)
    assert status == EXIT_STATUS[kind]
    assert err.startswith("error: ")
    assert "bug" not in err


@pytest.mark.parametrize("error", [ValueError("why"), ValueError(""), OSError("why"), AssertionError()])
def test_any_other_exception_is_a_bug_whose_traceback_is_kept(end, error, tmp_path):
    status, err = end(error)
    assert status == EXIT_STATUS["bug"] == 70
    (saved,) = (tmp_path / "cache" / "tracebacks").iterdir()
    assert f"this is a bug in misdirection ({type(error).__name__}: " in err
    assert str(saved) in err
    assert "Traceback" not in err
    text = saved.read_text()
    assert text.startswith("misdirection fail\n")
    assert "Traceback (most recent call last)" in text


def test_an_interrupt_keeps_its_status(end):
    assert end(KeyboardInterrupt()) == (130, "stopped; the same command continues")


def test_a_bug_is_one_line_where_no_cache_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    ended = subprocess.run(
        [sys.executable, "-c", CRASH],
        cwd=tmp_path,
        env={"MISDIRECTION_CACHE": str(tmp_path / "file"), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 70
    (line,) = ended.stderr.splitlines()
    (saved,) = tmp_path.glob("traceback-*.txt")
    assert str(saved) in line


def test_a_reader_that_leaves_is_quiet(tmp_path):
    command = f"'{sys.executable}' -m misdirection.cli --help | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert (ended.returncode, ended.stderr) == (EXIT_STATUS["reader left"], "")


def test_a_file_in_another_encoding_is_no_verdict(call, tmp_path):
    path = tmp_path / "latin-1.yaml"
    path.write_bytes("name: café".encode("latin-1"))
    status, _, err = call("run", path)
    assert status == 2
    assert "latin-1.yaml" in err


def test_no_verdict_shares_its_status_with_a_failure():
    words = {"clear", "watch", "misaligned", "inconclusive", "works", "no effect", "breaks", "holds", "differs", "open"}
    verdicts = {EXIT_STATUS[word] for word in words}
    others = {status for name, status in EXIT_STATUS.items() if name not in words | {"success"}}
    # The good word is the audit's, the check's and the verification's.
    assert len(verdicts) == len(words) - 2
    assert 1 not in verdicts | others
    assert not verdicts & others
