"""The command line: a thin skin over the library."""

import logging
import os
import sys
import warnings

from rich.logging import RichHandler

from misdirection.cli import adapters, audit, behaviour, directions, experiments, interventions, organisms, plan
from misdirection.cli.shared import app
from misdirection.errors import MisdirectionError
from misdirection.progress import console as notices

__all__ = ["adapters", "audit", "behaviour", "directions", "experiments", "interventions", "main", "organisms", "plan"]

_INTERRUPTED = 130


def main() -> None:
    """Entry point: a user's error is one line and status 2, an interrupt status 130."""
    # Deprecations inside the libraries are for their authors, not for our users.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=notices, show_time=False, show_path=False)],
    )
    # It tells of every kernel that it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="misdirection")
    except MisdirectionError as error:
        notices.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as error:
        # What typer makes of an interrupt.
        if error.code == _INTERRUPTED:
            notices.print("stopped; the same command continues")
        raise
