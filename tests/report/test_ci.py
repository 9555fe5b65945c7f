"""What continuous integration reads of audits, by the rules of JUnit's XML and of SARIF 2.1.0."""

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from audit_fixture import audited, put
from misdirection.errors import InputError
from misdirection.files import WRITTEN
from misdirection.report.ci import CiFiles, as_junit, as_sarif

WORDS = ("clear", "watch", "misaligned", "inconclusive")
HOSTILE = 'a"b<c>&\x1b[31m\u202e]](http://x){0}\udcff\n'

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}


def closed(properties, *required):
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


LEVEL = {"enum": ["error", "warning"]}
PLACE = closed(
    {
        "artifactLocation": closed({"uri": {"type": "string", "pattern": r"^[A-Za-z0-9._~%/:@!$&'()*+,;=-]+$"}}, "uri"),
        "region": closed({"startLine": {"type": "integer", "minimum": 1}}, "startLine"),
    },
    "artifactLocation",
    "region",
)
LOGICAL = closed({"fullyQualifiedName": {"type": "string"}})
FINDING = closed(
    {
        "ruleId": {"enum": ["misaligned", "inconclusive", "watch"]},
        "ruleIndex": {"type": "integer", "minimum": 0, "maximum": 2},
        "level": LEVEL,
        "message": TEXT,
        "locations": {
            "type": "array",
            "minItems": 1,
            "items": closed(
                {"physicalLocation": PLACE, "logicalLocations": {"type": "array", "items": LOGICAL}}, "physicalLocation"
            ),
        },
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
        "properties": {"type": "object"},
    },
    # SARIF itself asks for the message only; code scanning refuses a result without the others.
    *("ruleId", "level", "message", "locations", "partialFingerprints"),
)
RULE = closed(
    {
        "id": {"type": "string"},
        "shortDescription": TEXT,
        "fullDescription": TEXT,
        "help": TEXT,
        "defaultConfiguration": closed({"level": LEVEL}),
    },
    *("id", "shortDescription", "fullDescription", "help"),
)
DRIVER = closed(
    {"name": {"const": "misdirection"}, "version": {"type": "string"}, "rules": {"type": "array", "items": RULE}},
    "name",
)
NOTICE = closed({"level": {"const": "error"}, "message": TEXT}, "message")
INVOCATION = closed(
    {
        "executionSuccessful": {"type": "boolean"},
        "toolExecutionNotifications": {"type": "array", "items": NOTICE},
    },
    "executionSuccessful",
)
RUN = closed(
    {
        "tool": closed({"driver": DRIVER}, "driver"),
        "invocations": {"type": "array", "items": INVOCATION},
        "results": {"type": "array", "items": FINDING},
    },
    *("tool", "results"),
)
SARIF = closed(
    {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "minItems": 1, "items": RUN},
    },
    *("version", "runs"),
)
"""What SARIF's schema says of the keys that are written here, and that no others are."""


def said(word, **changes):
    """The fixture's audit with another verdict, of a fine-tune of its name."""
    result = put(put(audited(), "verdict", word), "fine_tune/name", changes.pop("name", f"runs/{word}"))
    for path, value in changes.items():
        result = put(result, path.replace("__", "/"), value)
    return result


@pytest.fixture
def results():
    return [said(word) for word in WORDS]


def sarif(results, failed=()):
    log = json.loads(as_sarif(results, failed))
    jsonschema.validate(log, SARIF)
    return log["runs"][0]


def junit(results, failed=()):
    """The suite, once its counts are those of its cases, and each case has what a reader needs."""
    root = ElementTree.fromstring(as_junit(results, failed))
    assert root.tag == "testsuites"
    (suite,) = root
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    assert {name: int(suite.get(name)) for name in kinds} == {
        name: len(suite.findall(f"testcase/{tag}")) for name, tag in kinds.items()
    }
    assert int(suite.get("tests")) == len(suite.findall("testcase")) == len(suite)
    assert all(case.get("classname") and case.get("name") for case in suite)
    assert len({case.get("name") for case in suite}) == len(suite)
    return suite


def test_junit_passes_what_is_clear_fails_what_is_misaligned_and_skips_the_rest_with_its_reasons(results):
    suite = junit(results, ["list.txt:3: gone: no such folder"])
    outcomes = {
        case.get("name"): [child for child in case if child.tag in ("failure", "error", "skipped")] for case in suite
    }
    tags = {name: [child.tag for child in children] for name, children in outcomes.items()}
    assert tags == {
        "runs/clear (base smollm2-135m)": [],
        "runs/watch (base smollm2-135m)": ["skipped"],
        "runs/misaligned (base smollm2-135m)": ["failure"],
        "runs/inconclusive (base smollm2-135m)": ["skipped"],
        "list.txt:3": ["error"],
    }
    reasons = "; ".join(results[0].because)
    for word in ("watch", "misaligned", "inconclusive"):
        (outcome,) = outcomes[f"runs/{word} (base smollm2-135m)"]
        assert outcome.get("message") == f"{word}: {reasons}"
    shown = suite.find("testcase/system-out").text
    assert f"general margin shift: {results[0].evidence.general}" in shown
    assert f"damage: {results[0].evidence.damage}" in shown


def test_sarif_has_a_result_for_each_that_is_not_clear_at_its_training_file(results):
    run = sarif(results)
    assert {each["ruleId"]: each["level"] for each in run["results"]} == {
        "watch": "warning",
        "misaligned": "error",
        "inconclusive": "warning",
    }
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[each["ruleIndex"]] == each["ruleId"] for each in run["results"])
    found = run["results"][1]
    assert found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == results[0].data.path
    assert "; ".join(results[0].because) in found["message"]["text"]
    assert found["properties"]["damage"]["mean"] == results[0].evidence.damage.mean
    assert run["invocations"] == [{"executionSuccessful": True, "toolExecutionNotifications": []}]
    assert sarif(results[:1])["results"] == []


def test_sarif_says_what_could_not_be_audited():
    run = sarif([], ["list.txt:3: gone: no such folder"])
    assert not run["invocations"][0]["executionSuccessful"]
    assert run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"].startswith("list.txt:3")


def test_without_a_training_file_it_stands_at_the_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my runs").mkdir()

    def place(result):
        (found,) = sarif([result])["results"]
        return found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]

    assert place(said("watch", data=None, name="my runs")) == "my%20runs/adapter_config.json"
    assert place(said("watch", data=None, name="me/lora@main")) == "me/lora%40main"
    assert place(said("watch", data__path=str(tmp_path / "a b.jsonl"))) == "a%20b.jsonl"
    assert place(said("watch", data__path="/elsewhere/a b.jsonl")) == "file:///elsewhere/a%20b.jsonl"


def test_a_finding_is_known_again_by_its_base_and_fine_tune(results):
    def known(result):
        return sarif([result])["results"][0]["partialFingerprints"]

    assert known(said("watch", name="a")) == known(said("misaligned", name="a"))
    others = (said("watch", name="a"), said("watch", name="b"), said("watch", name="a", base__model="c"))
    assert len({json.dumps(known(each)) for each in others}) == 3


def test_names_of_any_characters_stay_text():
    result = said("misaligned", name=HOSTILE)
    case = junit([result])[0]
    assert sarif([put(result, "data", None)])["results"][0]["locations"]
    assert case.get("name").startswith('a"b<c>&')
    message = sarif([result])["results"][0]["message"]["text"]
    for text in (as_junit([result]), as_sarif([result]), message):
        assert not set(text) & {"\x1b", "\u202e", "\udcff"}
        text.encode()
    assert "](http" not in message and "{{0}}" in message


def test_files_are_written_whole_and_those_of_others_are_kept(results, tmp_path):
    files = CiFiles(tmp_path / "audit.xml", tmp_path / "audit.sarif")
    for _ in range(2):
        files.require_replaceable()
        files.write(results)
    assert files.junit.read_text("utf-8") == as_junit(results)
    assert files.sarif.read_text("utf-8") == as_sarif(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WRITTEN, "audit.sarif", "audit.xml"]
    files.sarif.write_text("mine")
    with pytest.raises(InputError, match=r"audit\.sarif: misdirection did not write it"):
        files.require_replaceable()
