"""The command line: options, help, exit statuses. A command is one call of a public function, and prints what it gives.

Owns no rule and assembles nothing: that is the library's.
"""

import logging
import os
import sys
import warnings

from rich.logging import RichHandler

from misdirection.cli import (
    adapters,
    audit,
    behaviour,
    directions,
    experiments,
    files,
    interventions,
    machine,
    organisms,
    plan,
)
from misdirection.cli.endings import end
from misdirection.cli.groups import arrange
from misdirection.cli.shared import app
from misdirection.progress import console

__all__ = [
    "adapters",
    "audit",
    "behaviour",
    "directions",
    "experiments",
    "files",
    "interventions",
    "machine",
    "main",
    "organisms",
    "plan",
]

arrange(app)


def main() -> None:
    """Entry point; `errors.EXIT_STATUS` has the statuses it ends with."""
    _set_up_messages()
    try:
        try:
            app(prog_name="misdirection")
        finally:
            sys.stdout.flush()
    except BaseException as error:
        sys.exit(end(error))


def _set_up_messages() -> None:
    """Our own warnings go to standard error, a line each; those for the libraries' authors go nowhere."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The Hub's client tells of every retry, twice; the error that follows names the host.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    # Bitsandbytes tells of every kernel that it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
