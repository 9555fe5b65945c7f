"""Writes the table of PEFT's kinds of adapters into docs/peft.md, from what the tests attach.

python scripts/write_peft.py
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig

from misdirection.lora.variants import no_sum
from misdirection.models.adapter_kinds import base_changes, unmeasured

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "peft.md"
BEGIN, END = "<!-- the table: written by scripts/write_peft.py -->", "<!-- end of the table -->"


def table(kinds: Mapping[str, PeftConfig]) -> str:
    """A row for each kind."""
    head = "| kind | figures | components |\n|---|---|---|"
    return "\n".join([head, *(_row(name, config) for name, config in sorted(kinds.items()))])


def _row(name: str, config: PeftConfig) -> str:
    settings = config.to_dict()
    if reason := unmeasured(settings):
        return f"| {name} | refused: {reason} | |"
    changes = base_changes(settings)
    figures = "PEFT's own" + (f"; the base, which `{changes}` changes, is given back" if changes else "")
    reason = no_sum(settings)
    return f"| {name} | {figures} | {f'refused: {reason}' if reason else 'read'} |"


def page(text: str, table: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from peft_kinds import kinds

    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table(kinds())), encoding="utf-8")


if __name__ == "__main__":
    main()
