"""Our exceptions as the one that Inspect prints as a line, where it would print a traceback."""

import contextlib
from collections.abc import Iterator

from inspect_ai._util.error import PrerequisiteError
from rich.markup import escape

from misdirection.errors import MisdirectionError


def refusal(message: str) -> PrerequisiteError:
    """The exception with this message, whose brackets are text."""
    return PrerequisiteError(f"error: {escape(message)}")


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Turns an exception of ours that is raised inside into Inspect's."""
    try:
        yield
    except MisdirectionError as error:
        raise refusal(str(error)) from error
