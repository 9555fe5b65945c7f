"""The exceptions that a user is meant to read, and the exit status of everything that a command can end with.

A message is one line that names the culprit (the file, the row, the key) and the remedy. Whoever raises says by the
class who has to act: the user, the judge's host, a worker, or whoever looks after the machine. Anything else that is
raised is a bug of this program.
"""

import errno
from collections.abc import Iterator
from typing import ClassVar


class MisdirectionError(Exception):
    """The base of every exception of this package; raise one of those below.

    The command line prints the message without a traceback and exits with `exit_status`.
    """

    exit_status: ClassVar[int] = 2


class InputError(MisdirectionError):
    """Bad input or an impossible request: the user changes what was given."""


class JudgeError(MisdirectionError):
    """A judge that gives no, or too few, verdicts: its host, its quota or its key needs a look, then the same again."""

    exit_status = 10


class WorkerError(MisdirectionError):
    """Work that other processes lost again and again; what they finished is kept."""

    exit_status = 11


class EnvironmentProblem(MisdirectionError):
    """Something that the machine lacks; what was computed is kept. Raise one of the classes below."""

    exit_status = 12


class DiskProblem(EnvironmentProblem):
    """No space, or a disk that cannot be written."""

    exit_status = 13


class MemoryProblem(EnvironmentProblem):
    """Less memory than a model or a batch needs."""

    exit_status = 14


class NetworkProblem(EnvironmentProblem):
    """A host that does not answer."""

    exit_status = 15


class MissingPackage(EnvironmentProblem):
    """A package or an extra that is not installed."""

    exit_status = 16


EXIT_STATUS = {
    # Never 1: that is what an uncaught exception gives.
    "success": 0,
    "clear": 0,
    "misaligned": 3,
    "inconclusive": 4,
    "watch": 5,
    # Of a check: `inconclusive` is the audit's.
    "works": 0,
    "no effect": 6,
    "breaks": 7,
    # Of a bundle's verification.
    "holds": 0,
    "differs": 8,
    "open": 9,
    **{
        error.__name__: error.exit_status
        for error in (
            InputError,
            JudgeError,
            WorkerError,
            EnvironmentProblem,
            DiskProblem,
            MemoryProblem,
            NetworkProblem,
            MissingPackage,
        )
    },
    "bug": 70,
    "interrupted": 130,
    # `misdirection ... | head`: as if the signal of a closed pipe had ended it.
    "reader left": 141,
}
"""Exit statuses by the verdict of an audit, a check or a verification, by exception, and by any other end."""


_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_NAMES = frozenset({errno.ENAMETOOLONG, errno.ELOOP})


def problem_of(error: BaseException) -> MisdirectionError | None:
    """An error as one of ours; None for a bug."""
    if isinstance(error, MisdirectionError):
        return error
    # Torch's is told by its name, since torch may not have been imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MemoryProblem(f"out of memory ({first_line(error)}); take a smaller model or batch, or another --device")
    if isinstance(error, OSError) and error.errno in _DISK:
        return DiskProblem(f"{error.filename or 'disk'}: cannot be written ({error.strerror}); free space")
    if isinstance(error, OSError) and error.errno in _NAMES:
        return InputError(f"{error.filename}: {error.strerror}; give another name")
    # What `Path.resolve` raises of a link to itself, before Python 3.13.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return InputError(f"{first_line(error)}; give another name")
    return None


def hub_silence(
    name: str, error: BaseException, remedy: str = "check the network, and the name: a folder is given by its path"
) -> NetworkProblem | None:
    """What an error of the Hub's client, or of a library above it, says of a Hub that did not answer; None for others.

    Args:
        name: of what was asked for.
        error: as it was raised.
        remedy: what the user may do.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    causes = list(_causes(error))
    # The client's HTTP library is another from version to version; an answer, whatever its status, is no silence.
    silent = (LocalEntryNotFoundError, ConnectionError, TimeoutError, *HfHubHTTPError.__bases__[:1])
    heard = [cause for cause in causes if isinstance(cause, silent)]
    if not heard or any(isinstance(cause, HfHubHTTPError) for cause in causes):
        return None
    said = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(heard[-1], 100)
    return NetworkProblem(f"{name}: the Hub does not answer ({said}); {remedy}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of another library's exception; the name of its class where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    # One that ends in a colon only announces what is wrong.
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:limit]


def last_line(error: BaseException, limit: int = 300) -> str:
    """The last line of another library's exception; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:limit]
