"""Names of models as a user types them."""

import re
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<subfolder>.+))?")


class ModelName(NamedTuple):
    """The parts of `ID@REVISION:SUBFOLDER`."""

    name: str
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelName":
        """Take a hub id apart; anything on this disk is a name alone."""
        match = _NAME.fullmatch(text)
        if match is None or Path(text).expanduser().exists() or text.startswith((".", "/", "~")):
            return cls(text)
        return cls(match["name"], match["revision"], match["subfolder"])
