"""How a command ends: its exit status, and one line on standard error that says why."""

import os
import platform
import shlex
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from misdirection.errors import EXIT_STATUS, first_line, problem_of
from misdirection.files import cache_folder
from misdirection.progress import console, notice


def end(error: BaseException) -> int:
    """Says why a command ends with this exception; gives its exit status."""
    if isinstance(error, SystemExit):
        return _end_of_typer(error)
    if isinstance(error, KeyboardInterrupt):
        return _interrupted()
    if isinstance(error, BrokenPipeError):
        return _reader_left()
    problem = problem_of(error)
    if problem is None:
        return _bug(error)
    _say(f"error: {problem}")
    return problem.exit_status


def _end_of_typer(error: SystemExit) -> int:
    """Typer ends by itself after a verdict, after a usage error (2), and by 1 where a pipe or the input has closed."""
    if error.code in (None, 0):
        return EXIT_STATUS["success"]
    if error.code == EXIT_STATUS["interrupted"]:
        return _interrupted()
    if error.code == 1:
        return _reader_left() if isinstance(error.__context__, BrokenPipeError) else _interrupted()
    return error.code if isinstance(error.code, int) else _bug(error)


def _interrupted() -> int:
    _say("stopped; the same command continues", style="")
    return EXIT_STATUS["interrupted"]


def _reader_left() -> int:
    """`misdirection ... | head`: nobody reads on, so nothing is said, not even as Python flushes its streams."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
    return EXIT_STATUS["reader left"]


def _bug(error: BaseException) -> int:
    said = f"{type(error).__name__}: {first_line(error)}"
    _say(f"error: this is a bug in misdirection ({said}): please report it, with {_save_traceback(error)}")
    return EXIT_STATUS["bug"]


def _save_traceback(error: BaseException) -> str:
    """Write the traceback into the cache folder, else into the working folder; gives the file's path."""
    text = "".join(
        (
            f"{shlex.join(sys.argv)}\nmisdirection {version('misdirection')}, Python {platform.python_version()}, "
            f"{platform.platform()}\n\n",
            *traceback.format_exception(error),
        )
    )
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_folder() / "tracebacks", Path.cwd()):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            return str(folder / name)
    console.print(text, highlight=False)
    return "the traceback above"


def _say(line: str, style: str = "red") -> None:
    with suppress(OSError):
        notice(" ".join(line.splitlines()), style)
