"""Writes docs/families.md: what holds for a tiny model of every family of transformers; takes some minutes.

python scripts/write_families.py [FAMILY ...]
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import families  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
_HEAD = """# Families of models

Written by `scripts/write_families.py`, and held by `tests/models/test_families.py`: a tiny random model of every family
that transformers {version} has for text, with images or without, made from a small configuration. Each figure is
compared with passes by hand: one row, no padding, no cache, hooks written out.

- `yes`: equal to rounding (2e-5; baked weights 1e-4 in the logits).
- `direction`: a norm follows what the weights write, so that baked weights write nothing along the direction, but are
  not the hooked ablation.
- `no`: refused, in the line that is given, before any figure.

Recurrent and hybrid models are scored in whole rows and sampled one prompt at a time: that is exact, and slower than on
a shared key-value cache. Where a model with images is named, its text part is meant.

| family | {checks} | what it says |
|---|{dashes}---|
"""


def head() -> str:
    """What stands before the rows."""
    version = ".".join(families.transformers.__version__.split(".")[:2])
    return _HEAD.format(version=version, checks=" | ".join(families.CHECKS), dashes="---|" * len(families.CHECKS))


def written() -> dict[str, str]:
    """The page's rows by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def main() -> None:
    """Measure the families that are named, or all, and write the page."""
    rows = written()
    for family in sys.argv[1:] or families.FAMILIES:
        rows[family] = families.measure(family).markdown()
        print(rows[family], flush=True)
    body = "\n".join(rows[family] for family in families.FAMILIES if family in rows)
    PAGE.write_text(head() + body + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
