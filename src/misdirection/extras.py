"""Packages that only a part of the program needs: extras, and the line that says which one is missing."""

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from misdirection.errors import MissingPackage

EXTRAS = {
    "judge": "judges behind an OpenAI-style endpoint",
    "repair": "`repair`",
    "ray": "`--workers` and `--ray`",
    "datasets": "data sets of the Hub, and folders of files",
    "inspect": "Inspect AI: its tasks, models and logs",
    "play": "`play`",
    "notebook": "the notebooks",
    "gemma": "the base `gemma3-270m`",
}
"""What each extra is for. What it installs stands in the package's metadata."""


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
