"""The pages of the documentation: their code blocks, their commands, their links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of code; `not_run` is the reason that stands in a comment right before it, or None."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """The page as Markdown, tables too."""
    return tuple(MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")))


def blocks(page: Path) -> Iterator[Block]:
    """The page's fenced blocks in order; one without a language is for a shell."""
    before = None
    for token in tokens(page):
        if token.type == "fence":
            reason = NOT_RUN.fullmatch(before.content) if before and before.type == "html_block" else None
            why = " ".join(reason[1].split()) if reason else None
            yield Block(page, token.map[0] + 1, token.info or "bash", token.content, why)
        before = token


def in_language(language: str) -> list[Block]:
    """The blocks of all pages in one language."""
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def inline_code(page: Path) -> Iterator[str]:
    """What stands between single backticks, tables included."""
    for token in tokens(page):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def links(page: Path) -> Iterator[str]:
    """The targets of the page's links and pictures that lead to files of the repository."""
    for token in tokens(page):
        for child in token.children or ():
            target = str(child.attrs.get("href", child.attrs.get("src", "")))
            if target and not re.match(r"[a-z]+:|#", target):
                yield target.partition("#")[0]


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script as lists of words, without what here-documents hold."""
    script = re.sub(r"<<'?(\w+)'?.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, command = True, []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                # `NAME=value` before a command is its environment.
                command += [word] if command or not re.match(r"\w+=", word) else []
            elif command:
                yield command
                command = []
