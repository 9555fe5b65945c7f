"""The options that the suite's scripts have in common."""

import argparse
from pathlib import Path

from misdirection.choices import BUNDLED
from misdirection.models.bundled import BUNDLED_MODELS


def suite_parser(description: str | None) -> argparse.ArgumentParser:
    """Which base, where its fine-tunes lie, and which of them; a script adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", choices=list(BUNDLED_MODELS), default=BUNDLED)
    parser.add_argument("--published", type=Path, help="folder of published text and judged answers")
    parser.add_argument("--only", default="*", help="fine-tunes whose name matches, as in a shell")
    parser.add_argument("--json", action="store_true")
    return parser
