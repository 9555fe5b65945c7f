"""The command line: options, help, exit statuses. A command is one call of a public function, and prints what it gives.

Owns no rule and assembles nothing: that is the library's.
"""

import logging
import os
import sys
import warnings

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
    playground,
    screening,
)
from misdirection.cli.endings import end
from misdirection.cli.groups import arrange
from misdirection.cli.shared import app
from misdirection.progress import notice

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
    "playground",
    "screening",
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


class _Lines(logging.Handler):
    """Shows a record as one line on standard error; only a warning is called one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it, above a bar of progress if there is one."""
        is_warning = record.levelno >= logging.WARNING
        notice(f"{'warning: ' * is_warning}{self.format(record)}", "yellow" if is_warning else "")


def _set_up_messages() -> None:
    """What this package has to say goes to standard error, a line each; what is for the libraries' authors nowhere."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The Hub's client tells of every retry, twice; the error that follows names the host.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()])
    logging.getLogger("misdirection").setLevel(logging.INFO)
    # Bitsandbytes tells of every kernel that it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
