"""What belongs to one machine and to nobody's evidence: keys, passwords in addresses, and the ways to its files."""

import html
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REMOVED = "[removed]"

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8
"""Shorter values of such variables are switches, and words that stand everywhere."""


@dataclass(frozen=True)
class Redaction:
    """Replacements for the texts of a bundle.

    Attributes:
        secrets: the variable by its value, for those of the environment that hold a key.
        names: what stands in the place of a path or of an address.
    """

    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[str], addresses: Iterable[str], folder: Path) -> "Redaction":
        """The replacements for a result's folder, with the paths and the addresses that it was made with; and the
        user's home."""
        secrets = {
            value: name for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST
        }
        absolute = [path for path in (*paths, str(folder.resolve())) if Path(path).is_absolute()]
        names = {path: Path(path).name for path in absolute if Path(path).name}
        names |= {address: shown for address in addresses if (shown := _without_password(address)) != address}
        if (home := Path.home()).name:
            names |= {str(home): "~"}
        return cls(secrets, names)

    def text(self, text: str) -> str:
        """A text without them, wherever they stand in it, as JSON and HTML escape them too."""
        text = self._replaced_secrets(text)
        return self._pattern.sub(lambda match: self._variants[match[0]], text) if self._variants else text

    def leaf(self, text: str) -> str:
        """A single value without secrets; one that is a path, or begins with one, is replaced. Any other text stays."""
        text = self._replaced_secrets(text)
        for known in sorted(self.names, key=len, reverse=True):
            if text == known or text.startswith((f"{known} ", f"{known}/")):
                return self.names[known] + text.removeprefix(known)
        return text

    def leaves(self, value: Any) -> Any:
        """The same for every text in a value as JSON has it, but for keys."""
        if isinstance(value, str):
            return self.leaf(value)
        if isinstance(value, Mapping):
            return {key: self.leaves(each) for key, each in value.items()}
        return [self.leaves(each) for each in value] if isinstance(value, list | tuple) else value

    @cached_property
    def secret_bytes(self) -> dict[bytes, str]:
        """The variable by its value."""
        return {value.encode(): name for value, name in self.secrets.items()}

    def _replaced_secrets(self, text: str) -> str:
        for value in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(value, REMOVED)
        return text

    @cached_property
    def _variants(self) -> dict[str, str]:
        escapes: tuple[Callable[[str], str], ...] = (str, lambda text: json.dumps(text)[1:-1], html.escape)
        return {escape(known): escape(name) for known, name in self.names.items() for escape in escapes}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._variants, key=len, reverse=True)
        return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?![\\w-])")


def _without_password(address: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
