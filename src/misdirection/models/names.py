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
        if match is None or Path(text).expanduser().exists() or is_path(text):
            return cls(text)
        return cls(match["name"], match["revision"], match["subfolder"])


def is_path(name: str) -> bool:
    """Whether a name is written as a path, which no hub id is."""
    return name.startswith((".", "/", "~"))


def is_local(name: str) -> bool:
    """Whether a name, without revision and subfolder, can be a path alone."""
    return is_path(name) or name.count("/") > 1
