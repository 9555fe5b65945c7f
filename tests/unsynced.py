"""Importing this, a process of the tests leaves what it writes to the system, and waits for no disk.

No test cuts the power, and what a process wrote before it was killed is with the system. Whole runs write hundreds of
files, and wait for the disk for an eighth of their time.
"""

import os


def _written(_handle):
    """What `os.fsync` is here."""


os.fsync = _written
