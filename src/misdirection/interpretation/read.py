"""Read the adapters of one organism: the parts of `results.json` under `adapters`, each a piece of a run.

Scalars and what probes tell from them; token importance; Shapley values and the roles that follow; scaling by role, by
the margin and, where there is a judge, by judged answers; where adapters write and what becomes of it; patching; and
how they grew in training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from misdirection.data import ProbePair, neutral_examples
from misdirection.directions.direction import Direction
from misdirection.files import write_json
from misdirection.interpretation import causal
from misdirection.interpretation.config import InterpretationConfig
from misdirection.interpretation.parts import (
    IN_DOMAIN,
    MOST_SHOWN,
    Factors,
    Study,
    adapted_layers,
    feature_layers,
    independent_parts,
    probes_part,
    read_dynamics,
    read_geometry,
    read_importance,
    read_part,
    read_probes,
    read_scalar_table,
    read_shapley,
    scaling_part,
)
from misdirection.interpretation.probes import Probe
from misdirection.interpretation.roles import Role, roles
from misdirection.interpretation.scalars import wide
from misdirection.interpretation.texts import GENERAL
from misdirection.lora.components import feature_names
from misdirection.lora.view import LoraFiles, LoraView
from misdirection.report.adapter_findings import find_in_adapters
from misdirection.report.html import render
from misdirection.report.reader import READER, reader_data
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner, Runner
from misdirection.runs.worker import Models, Worker
from misdirection.statistics import Estimate

ALONE = "organism"
"""Names the adapter of a run that reads nothing else."""


def interpret(
    study: Study, run: RunFolder, runner: Runner, judged: Callable[[Factors], list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """Make whatever part is not there yet; gives the section `adapters` of the results.

    Args:
        run: where the parts are kept.
        runner: makes them.
        judged: gives the rates of judged answers under settings of the adapters; None where there is no judge.

    Raises `InputError` for an adapter that is no plain LoRA, or has no module inside of the decoder blocks.
    """

    def folder(part: str) -> Path:
        return run.artifact(study.stage(part))

    adapter = LoraView.open(study.adapter)
    runner.make(independent_parts(study, adapted_layers(adapter)))
    table, residual = read_scalar_table(folder("scalars"))
    tokens = wide(table)
    runner.make([probes_part(study, run.digest(study.stage("scalars")), tokens, residual)])
    probes = read_probes(folder("probes"))
    shapley = read_shapley(study, folder("shapley"), adapted_layers(adapter))
    found = _roles(study, adapter, shapley, probes)
    runner.make([scaling_part(study, _settings(adapter, found, study.settings.scalings))])
    importance, words = read_importance(study, folder("importance"))
    section = {
        "organism": study.organism,
        "modules": _modules(study, adapter),
        "saved": list(adapter.saved),
        "texts": _texts(study, tokens),
        "probes": [probe.as_dict() for probe in probes],
        "roles": [role.as_dict() for role in found],
        "causal": {
            "settings": read_part(folder("scaling")),
            "shapley": shapley,
            **({"judged": judged(_settings(adapter, found))} if judged else {}),
        },
        "geometry": read_geometry(study, folder("geometry"), adapter, tokens),
        "importance": importance,
        "patching": read_part(folder("patching")),
        "dynamics": read_dynamics(study, folder("dynamics")),
    }
    _write_reader(run.folder, study, tokens, words)
    return {**section, "findings": [asdict(one) for one in find_in_adapters(section)]}


def interpret_alone(
    folder: Path,
    settings: InterpretationConfig,
    models: Models,
    identity: Mapping[str, Any],
    general: Sequence[ProbePair],
    domain: tuple[str, Sequence[ProbePair]] | None,
    directions: Mapping[str, Direction],
) -> tuple[dict[str, Any], Path]:
    """Read an adapter that is not part of an experiment; `folder` becomes a run with this one section.

    Gives the section and the report's path. `domain` names the training domain, with pairs of it.
    """
    settings_text = yaml.safe_dump({"interpretation": settings.model_dump(mode="json")}, sort_keys=False)
    with RunFolder.open(folder, settings_text) as run:
        study = Study(
            organism=ALONE,
            adapter=models.adapters[ALONE],
            identity=identity,
            domain=domain[0] if domain else None,
            sets={GENERAL: general, **({domain[0]: domain[1]} if domain else {})},
            neutral=neutral_examples(),
            directions=directions,
            settings=settings,
        )
        runner = LocalRunner(run, Worker(models, run.partial))
        section = {**interpret(study, run, runner), "organism": settings.organism}
        base = {**identity, **section["geometry"]["shape"]}
        results = {"name": settings.organism, "complete": True, "base": base, "adapters": section}
        results["seconds"] = run.seconds()
        write_json(folder / "results.json", results)
        return section, render(results, folder)


# --- what is read -------------------------------------------------------------------------------------------------


def _modules(study: Study, adapter: LoraFiles) -> list[dict[str, Any]]:
    names = feature_names(adapter.modules, study.settings.components)
    return [
        {
            "module": one.module,
            "layer": one.layer,
            "rank": one.rank,
            "scaling": one.scaling,
            "norm_a": float(one.a.norm()),
            "norm_b": float(one.b.norm()),
            "features": names[one.module],
        }
        for one in adapter.modules
    ]


def _texts(study: Study, tokens: pd.DataFrame) -> dict[str, Any]:
    answers = study.answers
    classes = pd.Series([f"{one.domain} {one.alignment}" for one in answers]).value_counts(sort=False)
    return {
        "answers": len(answers),
        "questions": len({one.question_id for one in answers}),
        "tokens": len(tokens),
        "classes": classes.to_dict(),
    }


def _roles(study: Study, adapter: LoraFiles, shapley: Mapping[str, Any], probes: Sequence[Probe]) -> list[Role]:
    values = {
        name: {int(layer): Estimate(**one) for layer, one in by_layer.items()}
        for name, by_layer in shapley["values"].items()
    }
    return roles(feature_layers(study, adapter), values[GENERAL], values.get(IN_DOMAIN, {}), probes)


def _settings(adapter: LoraFiles, found: Sequence[Role], single: tuple[str, ...] = ()) -> dict[str, dict[int, float]]:
    """Factors by layer: all off, each group by role off and alone, and of each layer by itself what `single` names."""
    groups = {
        f"{role} adapters": [one.layer for one in found if one.role == role]
        for role in ("general", "domain", "neither")
    }
    return {
        name: factors
        for name, factors in causal.scaling_settings(adapted_layers(adapter), groups).items()
        if not name.startswith("layer ") or name.endswith(single)
    }


def _write_reader(folder: Path, study: Study, tokens: pd.DataFrame, words: Mapping[str, pd.DataFrame]) -> None:
    """What the report's token reader shows: scalars of all answers, and where it was measured the importance."""
    table = tokens.iloc[:, : 1 + MOST_SHOWN].reset_index()
    answers, few = study.answers, study.important
    number = {(one.question_id, one.alignment): place for place, one in enumerate(answers)}
    place = {place: number.get((one.question_id, one.alignment)) for place, one in enumerate(few)}
    of_answer = words["attributions"].query("position >= 0").groupby(["answer", "position"])["attribution"].sum()
    measured = words["tokens"].set_index(["answer", "position"])["kl"].to_frame().join(of_answer).reset_index()
    measured["answer"] = measured["answer"].map(place)
    table = table.merge(measured, on=["answer", "position"], how="left")
    described = [
        {"question": one.question, "words": f"{one.domain}, {one.alignment}", "id": one.question_id} for one in answers
    ]
    units = dict.fromkeys(tokens.columns.drop("token")[:MOST_SHOWN], "") | {"kl": "nats", "attribution": "nats"}
    write_json(folder / READER, reader_data(described, table, units))
