"""The JSON Schemas that the package carries."""

import json
from typing import ClassVar

import pytest

from misdirection.results import Result
from scripts import write_schemas

KINDS = write_schemas.kinds()


class Weather(Result):
    """A result of another package."""

    KIND: ClassVar[str] = "weather"
    VERSION: ClassVar[int] = 3
    FILE: ClassVar[str] = "weather.json"
    COMMAND: ClassVar[str] = "look out"

    degrees: float


def test_the_schemas_are_those_of_the_results():
    written = {path.stem: path.read_text() for path in write_schemas.FOLDER.glob("*.json")}
    assert written == {name: write_schemas.schema(kind) for name, kind in KINDS.items()}, "run scripts/write_schemas.py"


@pytest.mark.parametrize("name", KINDS)
def test_a_command_prints_each(call, name):
    status, out, _ = call("schema", name)
    assert status == 0
    assert json.loads(out)["properties"]["version"] == {"const": KINDS[name].VERSION}


def test_an_unknown_kind_is_one_line(call):
    status, out, err = call("schema", "audits")
    assert (status, out) == (2, "")
    assert err.startswith("error: unknown result 'audits'")


def test_a_schema_says_the_kind_the_version_and_every_key():
    schema = Weather.json_schema()
    assert schema["properties"]["kind"] == {"const": "weather"}
    assert {"kind", "version", "degrees"} <= set(schema["required"])
    assert schema["additionalProperties"] is False
    assert Weather(degrees=1.5).as_dict().keys() == schema["properties"].keys()
