"""Writes docs/reference/commands.md: every command with its options, from the program itself.

python scripts/write_commands.py
"""

import re
from pathlib import Path
from typing import Any

import typer

from misdirection import errors
from misdirection.cli import app
from misdirection.cli.groups import GROUPS
from misdirection.errors import EXIT_STATUS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "commands.md"
_HEAD = """# Commands

Written by `scripts/write_commands.py` from the program itself: `misdirection COMMAND --help` says the same. Every
command that prints figures takes `--json`: one JSON object on standard output, all else on standard error.
"""


def page() -> str:
    """The page's text."""
    commands = typer.main.get_command(app).commands
    parts = [_HEAD]
    for group, examples in GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [section(name, commands[name], example) for name, example in examples.items()]
    return "\n".join([*parts, exit_statuses()])


def section(name: str, command: Any, example: str) -> str:
    """One command: what it does, how it is called, its arguments and options, an example."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["misdirection", name, *command.collect_usage_pieces(context)])
    records = (parameter.get_help_record(context) for parameter in command.params)
    rows = [f"| {_code(names)} | {_cell(text)} |" for names, text in filter(None, records)]
    table = ["| argument or option | is |", "|---|---|", *rows, ""] if rows else []
    said = _plain(command.help)
    return "\n".join([f"### {name}\n", said, "", f"```text\n{usage}\n```\n", *table, f"```bash\n{example}\n```\n"])


def exit_statuses() -> str:
    """What each exit status says."""
    meanings: dict[int, list[str]] = {}
    for ending, status in EXIT_STATUS.items():
        meanings.setdefault(status, []).append(_meaning(ending))
    rows = [f"| {status} | {'; '.join(meanings[status])} |" for status in sorted(meanings)]
    return "\n".join(["## Exit statuses\n", "| status | a command ended so |", "|---|---|", *rows, ""])


def _meaning(ending: str) -> str:
    """A way to end in words; of an exception also what its docstring says first."""
    kind = getattr(errors, ending, None)
    return f"`{ending}`: {_cell(kind.__doc__).partition('. ')[0].rstrip('.')}" if kind else ending


def _code(names: str) -> str:
    """The names of a parameter and the type of its value; a bar would end the table's cell."""
    return f"`{names.replace('|', ', ')}`"


def _cell(text: str) -> str:
    """A help text in a table: what its backticks do not hold is escaped where Markdown would read it."""
    code = r"(`[^`]*`)"
    return "".join(
        part if re.fullmatch(code, part) else re.sub(r"([<|*_\[\]])", r"\\\1", part)
        for part in re.split(code, _plain(text))
    )


def _plain(text: str) -> str:
    """A help text on one line, without the escapes of terminal markup."""
    return " ".join(text.replace(r"\[", "[").split())


def main() -> None:
    """Write it."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
