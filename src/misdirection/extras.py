"""Packages that only a part of the program needs: extras, and the line that says which one is missing."""

import contextlib
from collections.abc import Iterator

from misdirection.errors import MissingPackage

EXTRAS = {
    "judge": "judges behind an OpenAI-style endpoint",
    "repair": "`repair`",
    "ray": "`--workers` and `--ray`",
    "inspect": "logs and evals of Inspect AI",
    "gemma": "the base `gemma3-270m`",
}
"""What each extra is for. What it installs stands in the package's metadata."""


@contextlib.contextmanager
def needed_for(extra: str) -> Iterator[None]:
    """Imports of an extra's packages stand in this context.

    Raises `MissingPackage` where one is not installed, with the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{EXTRAS[extra]}: the package {error.name} is not installed: pip install 'misdirection[{extra}]'"
        ) from error
