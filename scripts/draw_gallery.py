"""Draws the pictures of docs/gallery.md, from a run of docs/gallery/experiment.yaml and an audit.

misdirection run docs/gallery/experiment.yaml --out runs/gallery
python scripts/draw_gallery.py runs/gallery audits/organism
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from misdirection.auditing.results import AuditResult
from misdirection.experiment.results import RunResults
from misdirection.report.adapters import draw_adapters
from misdirection.report.audit import drawings
from misdirection.report.drawing import save_figure
from misdirection.report.figures import draw_all

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "gallery"
WIDTH = 1100
"""Pixels that a picture is wide at most."""
COLOURS = 64
"""Colours of a picture: lines and flat areas need no more, and it takes a third of the bytes."""


def draw(run: Path, audit: Path, folder: Path) -> None:
    """Write every picture of the run and of the audit, as the reports have them."""
    results, audited = RunResults.load(run), AuditResult.load(audit)
    draw_all(results, folder)
    if results.adapters:
        draw_adapters(results.adapters, folder)
    for name, drawing in drawings(audited).items():
        save_figure(drawing(audited), folder / f"audit_{name}.svg")


def shrink(path: Path, target: Path) -> None:
    """Write a picture as small as a page needs it."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((WIDTH, 2 * WIDTH))
        small.quantize(COLOURS).save(target, optimize=True)


def main(run: str, audit: str) -> None:
    """Draw them anew; those that the run no longer has go."""
    for old in FOLDER.glob("*.png"):
        old.unlink()
    with TemporaryDirectory() as folder:
        draw(Path(run), Path(audit), Path(folder))
        for path in sorted(Path(folder).glob("*.png")):
            shrink(path, FOLDER / path.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
