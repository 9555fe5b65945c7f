"""The section `adapters` of the results from tables that were measured elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from misdirection.files import write_json
from misdirection.interpretation.published import PublishedScalars, published_probes, read_published, scaling_table
from misdirection.interpretation.roles import roles
from misdirection.report.adapter_findings import find_in_adapters
from misdirection.report.html import render
from misdirection.report.reader import READER, reader_data


def interpret_tables(
    scalars: Path | None, answers: Path | None, scaled: Path | None, folder: Path | None
) -> tuple[dict[str, Any], Path | None]:
    """Probes and roles from a table of scalars, and counts from judged answers under scaled adapters.

    Both are tables as the paper's authors published them. Gives the section, and the report's path if there is a
    `folder` for it.
    """
    section: dict[str, Any] = {"organism": (scalars or scaled or Path()).stem}
    reader = None
    if scalars is not None:
        data = read_published(scalars, answers)
        probes = published_probes(data)
        layer_of = {name: int(name.rpartition("_")[2]) for name in data.features}
        section |= {
            "probes": [probe.as_dict() for probe in probes],
            "roles": [role.as_dict() for role in roles(layer_of, {}, {}, probes)],
        }
        reader = _published_reader(data)
    if scaled is not None:
        section["scaled"] = scaling_table(scaled).to_dict("records")
    section["findings"] = [asdict(one) for one in find_in_adapters(section)]
    if folder is None:
        return section, None
    folder.mkdir(parents=True, exist_ok=True)
    if reader is not None:
        write_json(folder / READER, reader)
    results = {"name": section["organism"], "complete": True, "adapters": section}
    write_json(folder / "results.json", results)
    return section, render(results, folder)


def _published_reader(data: PublishedScalars) -> dict[str, Any]:
    """The token reader's data: the scalars, and whatever else the table says of each token."""
    first = data.tokens.drop_duplicates("answer").sort_values("answer")
    questions = first["question"] if "question" in first else first["response_id"].astype(str)
    answers = [
        {"question": str(question), "words": f"{domain}, {alignment}", "id": str(number)}
        for question, domain, alignment, number in zip(
            questions, first["domain"], first["alignment"], first["response_id"], strict=True
        )
    ]
    further = {name: unit for name, unit in (("kl_divergence", "nats"), ("importance", "")) if name in data.tokens}
    return reader_data(answers, data.tokens, dict.fromkeys(data.features, "") | further)
