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

    def __str__(self) -> str:
        """As it is typed."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{revision}" + (f":{self.subfolder}" if self.subfolder else "")

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


def is_hub_id(name: str) -> bool:
    """Whether a name, without revision and subfolder, is that of a repository of the Hub, and of nothing on this disk.

    The names of this package's own models are none.
    """
    return name.count("/") == 1 and not is_path(name) and not Path(name).exists()


def are_unlike(one: str, other: str) -> bool:
    """Whether two names are surely of different models: two ids of the Hub, or two folders on this disk.

    The name of a folder does not tell whose copy it holds.
    """
    if is_hub_id(one) and is_hub_id(other):
        return one != other
    folders = [Path(name).expanduser() for name in (one, other)]
    return all(folder.is_dir() for folder in folders) and not folders[0].samefile(folders[1])


def is_local(name: str) -> bool:
    """Whether a name, without revision and subfolder, can be a path alone."""
    return is_path(name) or name.count("/") > 1
