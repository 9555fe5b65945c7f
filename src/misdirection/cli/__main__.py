"""`python -m misdirection.cli` is the command `misdirection`."""

from misdirection.cli import main

main()
