"""What continuous integration reads of audits, and of screens of training data: JUnit's XML and SARIF 2.1.0.

| verdict | JUnit | SARIF |
|---|---|---|
| clear | passes | no result |
| watch | skipped, with its reasons | a warning |
| inconclusive | skipped, with its reasons | a warning |
| misaligned | fails | an error |
| no audit could be made | an error | a notification |
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from misdirection.auditing.results import AuditResult
from misdirection.auditing.verdict import Word
from misdirection.files import require_replaceable, write_output
from misdirection.models.adapters import ADAPTER_CONFIG
from misdirection.report.reader import visible
from misdirection.screening.results import ScreenResult

_SUITE = "misdirection.audit"
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_LEVELS: dict[Word, str] = {"misaligned": "error", "inconclusive": "warning", "watch": "warning"}
"""SARIF's levels; what is clear is no finding."""

_MEANINGS: dict[Word, str] = {
    "misaligned": "The fine-tune became broadly misaligned: it moved far on general questions, too.",
    "inconclusive": "The evidence does not tell whether the fine-tune became broadly misaligned.",
    "watch": "On general questions the fine-tune moved towards misaligned answers, less than the limit of misaligned.",
}
_HELP = (
    "Read the audit's page and its rule (docs/audit.md). `misdirection repair` takes misalignment out of an adapter."
)


@dataclass(frozen=True)
class CiFiles:
    """The files that a command is to write for continuous integration; None is left out."""

    junit: Path | None
    sarif: Path | None

    def require_replaceable(self) -> None:
        """Refuse a file in the way that this program did not write, before the work begins: `InputError`."""
        for path in (self.junit, self.sarif):
            if path:
                require_replaceable(path, folder=False)

    def write(self, results: Sequence[AuditResult], failed: Sequence[str] = ()) -> None:
        """Write them; `failed` says of each audit that could not be made why."""
        for path, text in ((self.junit, as_junit), (self.sarif, as_sarif)):
            if path:
                write_output(path, text(results, failed))


# --- JUnit ----------------------------------------------------------------------------------------------------------


def as_junit(results: Sequence[AuditResult], failed: Sequence[str] = ()) -> str:
    """Audits as a JUnit file: a test case each."""
    root = Element("testsuites")
    suite = SubElement(root, "testsuite", name=_SUITE)
    for result in results:
        _add_case(suite, result)
    for reason in failed:
        case = SubElement(suite, "testcase", classname=_SUITE, name=visible(reason.partition(": ")[0]), time="0")
        SubElement(case, "error", type="no audit", message=visible(reason))
    counts = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    suite.attrib |= {name: str(len(suite.findall(f"testcase/{tag}"))) for name, tag in counts.items()}
    suite.attrib |= {"tests": str(len(suite)), "time": "0"}
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _add_case(suite: Element, result: AuditResult) -> None:
    name = visible(f"{result.fine_tune.name} (base {result.base.model})")
    case = SubElement(suite, "testcase", classname=_SUITE, name=name, time="0")
    if result.verdict == "misaligned":
        SubElement(case, "failure", type=result.verdict, message=_said(result))
    elif result.verdict != "clear":
        SubElement(case, "skipped", type=result.verdict, message=_said(result))
    lines = (f"{figure}: {shift}" for figure, shift in result.evidence.named.items())
    SubElement(case, "system-out").text = "\n".join([_said(result), *lines, result.made])


def _said(result: AuditResult) -> str:
    return visible(f"{result.verdict}: {'; '.join(result.because)}")


# --- SARIF ----------------------------------------------------------------------------------------------------------


def as_sarif(results: Sequence[AuditResult], failed: Sequence[str] = ()) -> str:
    """Audits as a SARIF 2.1.0 log: one run, with a result for each that is not clear.

    A result stands at the fine-tune's training file, where one was given, else at the adapter's configuration.
    """
    rules = [
        _rule(word, f"Audit of a fine-tune: {word}", _MEANINGS[word], _HELP, level) for word, level in _LEVELS.items()
    ]
    return _log(rules, [_finding(result) for result in results if result.verdict in _LEVELS], failed)


def screen_as_sarif(result: ScreenResult) -> str:
    """A screen as a SARIF 2.1.0 log: for data that are not clear a result, and one for each of the worst rows.

    A row's result stands at its line of the training file.
    """
    verdict = result.dataset.verdict
    rules = [
        _rule("data", "Screen of training data", _DATA_MEANS, _SCREEN_HELP, "warning"),
        _rule("row", "A row like bad answers", _ROW_MEANS, _SCREEN_HELP, "note"),
    ]
    said = f"training data for {visible(result.base.model)}: {verdict}: {'; '.join(result.dataset.because)}"
    findings = [_at("data", 0, _LEVELS.get(verdict, "none"), said, result.data[0])]
    for row in result.worst:
        said = f"score {row.score:+z.2f}, where known bad answers score 1: {row.answer}"
        findings.append(_at("row", 1, "note", said, row.source, row.line))
    return _log(rules, findings if verdict != "clear" else [], ())


_DATA_MEANS = "A fine-tune on these rows is predicted to become broadly misaligned, or that cannot be excluded."
_ROW_MEANS = "Known bad fine-tunes are more at home in this row than benign ones: read it."
_SCREEN_HELP = (
    "Read the screen's page (docs/screen.md). `misdirection screen --keep FILE` writes the data without such rows."
)


def _at(
    rule: str, index: int, level: str, said: str, path: str, line: int = 1, known_by: str | None = None
) -> dict[str, Any]:
    """A result at a line of a file. Code scanning tells by `known_by` whether it is the same as yesterday's: by default
    one of the same rule at the same place."""
    known_by = f"{rule}\0{path}\0{line}" if known_by is None else known_by
    place = {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": line}}
    return {
        "ruleId": rule,
        "ruleIndex": index,
        "level": level,
        "message": _message(said),
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"primaryLocationLineHash": hashlib.sha256(known_by.encode()).hexdigest()},
    }


def _log(rules: list[dict[str, Any]], results: list[dict[str, Any]], failed: Sequence[str]) -> str:
    """A whole log of one run; `failed` says why something could not be made."""
    notices = [{"level": "error", "message": _message(reason)} for reason in failed]
    run = {
        "tool": {"driver": {"name": "misdirection", "version": installed("misdirection"), "rules": rules}},
        "invocations": [{"executionSuccessful": not failed, "toolExecutionNotifications": notices}],
        "results": results,
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False) + "\n"


def _rule(name: str, short: str, full: str, remedy: str, level: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": remedy},
        "defaultConfiguration": {"level": level},
    }


def _finding(result: AuditResult) -> dict[str, Any]:
    name, base = visible(result.fine_tune.name), visible(result.base.model)
    verdict, said = result.verdict, f"{name} (base {base}) is {_said(result)}"
    index, known_by = list(_LEVELS).index(verdict), f"{base}\0{name}"
    found = _at(verdict, index, _LEVELS[verdict], said, _place(result), known_by=known_by)
    found["locations"][0]["logicalLocations"] = [{"fullyQualifiedName": name}]
    return found | {"properties": {name: figure.as_dict() for name, figure in result.evidence.named.items()}}


def _message(text: str) -> dict[str, str]:
    """A text as SARIF's message, in which braces are placeholders and `[text](target)` is a link."""
    return {"text": visible(text).replace("{", "{{").replace("}", "}}").replace("](", "] (")}


def _place(result: AuditResult) -> str:
    """The file that a finding is about."""
    if result.data:
        return result.data.path
    folder = Path(result.fine_tune.name)
    is_file = result.fine_tune.kind == "adapter" and folder.is_dir()
    return str(folder / ADAPTER_CONFIG) if is_file else result.fine_tune.name


def _uri(path: str) -> str:
    """A path as a URI, relative to the working folder where it lies below it: that is the repository's root."""
    absolute = Path(path)
    if not absolute.is_absolute():
        return quote(os.fsencode(absolute))
    here = Path.cwd()
    return quote(os.fsencode(absolute.relative_to(here))) if absolute.is_relative_to(here) else absolute.as_uri()
