"""Results: typed, versioned records, each of which is written as JSON, read back, and shown as a page.

The models of one kind of result stand where it is computed; a page reads a result and nothing else.
"""

import json
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from misdirection.errors import InputError
from misdirection.files import read_json, write_json
from misdirection.registry import Registry
from misdirection.settings import validate


class Figures(BaseModel):
    """A part of a result. No key is missing and none is unknown; NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Result(Figures):
    """A whole result, which stands in a folder of its own.

    A class of results sets `KIND`, `VERSION`, `FILE` and `COMMAND`, and registers its page in `PAGES` under its kind.
    """

    KIND: ClassVar[str]
    """Names the kind of result in the file."""
    VERSION: ClassVar[int]
    """Raised whenever a key is added, renamed or taken away."""
    FILE: ClassVar[str]
    """The file's name in the result's folder."""
    COMMAND: ClassVar[str]
    """The command that makes it again."""

    made_with: str = Field(default_factory=lambda: installed("misdirection"))
    """The package's version."""
    made_on: str = Field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    """The day, by UTC."""

    @property
    def made(self) -> str:
        """By which program and when, in words."""
        return f"misdirection {self.made_with}, {self.made_on}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, its kind and version first."""
        return {"kind": self.KIND, "version": self.VERSION, **self.model_dump(mode="json")}

    def save(self, folder: Path) -> Path:
        """Write the file; gives its path."""
        path = folder / self.FILE
        write_json(path, self.as_dict())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the file of a result's folder.

        Raises `InputError` for a file that is missing, damaged, of another kind or of another version.
        """
        path = Path(folder) / cls.FILE
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: Any, source: str = "result") -> Self:
        """A result from what its file holds; raises as `load` does, naming `source`."""
        if not isinstance(values, dict) or values.get("kind", cls.KIND) != cls.KIND:
            raise InputError(f"{source}: holds no result of kind {cls.KIND!r}; make it with `{cls.COMMAND}`")
        if (version := values.get("version")) != cls.VERSION:
            said = f"version {version}" if version is not None else "no version"
            raise InputError(
                f"{source}: has {said}, this program reads version {cls.VERSION}: make it again with `{cls.COMMAND}`"
            )
        figures = {key: value for key, value in values.items() if key not in ("kind", "version")}
        return validate(cls, figures, source, f"make it again with `{cls.COMMAND}`")

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of the file."""
        schema = cls.model_json_schema(mode="serialization")
        schema["properties"] = {"kind": {"const": cls.KIND}, "version": {"const": cls.VERSION}, **schema["properties"]}
        schema["required"] = ["kind", "version", *schema.get("required", [])]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def write_page(self, folder: Path) -> Path:
        """Write the page of this result into its folder; gives the page's path."""
        return PAGES[self.KIND].write(self, folder)

    def _repr_html_(self) -> str:
        """The page's short form, which a notebook shows."""
        return PAGES[self.KIND].summary(self)

    def __str__(self) -> str:
        """As JSON, for reading."""
        return json.dumps(self.as_dict(), indent=2)


class Page(Protocol):
    """How results of one kind are shown."""

    def write(self, result: Any, folder: Path) -> Path:
        """Write the whole page into a folder; gives its path."""

    def summary(self, result: Any) -> str:
        """A piece of HTML with the finding and a picture, for a notebook."""


PAGES: Registry[Page] = Registry(
    "page",
    "misdirection.pages",
    {
        "run": "misdirection.report.run:PAGE",
        "runs": "misdirection.report.runs:PAGE",
        "screen": "misdirection.report.screen:PAGE",
        "interpretation": "misdirection.report.interpretation:PAGE",
        "audit": "misdirection.report.audit:PAGE",
        "repair": "misdirection.report.repair:PAGE",
        "quadrants": "misdirection.report.quadrants:PAGE",
        "token-table": "misdirection.report.token_table:PAGE",
    },
)
"""Pages by kind of result."""
