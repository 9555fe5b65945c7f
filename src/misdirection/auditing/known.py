"""What was measured of a base and of its control before: all audits of one data set ask these alike.

It lies in the package's cache folder, a folder for each stage, named by the hash of all that it depends on.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from misdirection.files import MADE, atomic_folder, cache_folder, is_as_made
from misdirection.runs.folder import key_of

Compute = Callable[[Path], None]
"""Fills a folder."""


def known_or_made(inputs: Mapping[str, Any], compute: Compute) -> Compute:
    """Fills a folder with what `compute` made of the same inputs before, or makes it now, and keeps it.

    Raises `InputError` where the cache folder cannot be written.
    """
    # Another version of torch rounds otherwise, and a shift would be what rounding moved.
    kept = cache_folder() / "measured" / key_of({**inputs, "torch": torch.__version__})

    def fill(folder: Path) -> None:
        if not kept.exists():
            with atomic_folder(kept) as temporary:
                compute(temporary)
        if not is_as_made(kept):
            compute(folder)
            return
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MADE))

    return fill
