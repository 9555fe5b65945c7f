"""Run an experiment from one configuration to `results.json` and `report.html`, as far as it is not there yet."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from misdirection.config import ExperimentConfig
from misdirection.experiment import results, stages
from misdirection.experiment.bench import BASE, Bench
from misdirection.experiment.results import Margins
from misdirection.experiment.stages import Cell
from misdirection.experiment.store import Run
from misdirection.files import read_json, write_json
from misdirection.organisms.training import Organism
from misdirection.report.html import render
from misdirection.representation.directions import Direction
from misdirection.representation.interventions import Ablate, Positions, Steer, random_like

RESULTS = "results.json"
_PACKAGES = ("torch", "transformers", "peft", "trl", "numpy")


@dataclass
class _Experiment:
    """One run under way."""

    config: ExperimentConfig
    run: Run
    bench: Bench

    @property
    def organisms(self) -> list[str]:
        return list(self.config.organisms)


def run_experiment(config: ExperimentConfig, folder: str | Path) -> Path:
    """Run every stage that is not up to date, write `results.json` and the report; gives the report's path.

    After a crash or a kill the same call continues: at most the piece in hand is lost. Raises `MisdirectionError`
    when another process works in the folder.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    with Run.open(Path(folder), text) as run:
        one = _Experiment(config, run, Bench(config))
        found = _train_and_measure(one)
        found |= _convergence(one)
        found |= {
            "directions": _directions(one),
            "steering": list(_steering(one)),
            "transfer": list(_transfer(one)),
            "samples": _samples(one),
        }
        write_json(Path(folder) / RESULTS, _header(one) | found)
    return write_report(folder)


def write_report(folder: str | Path) -> Path:
    """Make the report of a run again from its `results.json`; gives the path of `report.html`."""
    return render(read_json(Path(folder) / RESULTS), Path(folder))


def _header(one: _Experiment) -> dict[str, Any]:
    return {
        "name": one.config.name,
        "complete": True,
        "base": {**one.bench.identity, **_shape(one)},
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in _PACKAGES},
        },
        "left_out": list(one.config.left_out),
        "seconds": one.run.seconds(),
    }


def _shape(one: _Experiment) -> dict[str, int]:
    layers, width = _direction(one, one.organisms[0]).vectors.shape
    return {"layers": layers, "width": width}


def _train_and_measure(one: _Experiment) -> dict[str, Any]:
    """Train all organisms, then measure every model's margins."""
    for name in one.organisms:
        stages.organism(one.run, one.bench, name)
    base = _margins(one, BASE)
    organisms = {}
    for name, config in one.config.organisms.items():
        organism = Organism.open(one.bench.adapters[name])
        own = _margins(one, name)
        organisms[name] = results.organism_section(organism, config.domain, config.answers, own, base)
    return {**results.base_section(base), "organisms": organisms}


def _margins(one: _Experiment, name: str) -> Margins:
    return Margins.read(stages.margin(one.run, one.bench, name))


def _convergence(one: _Experiment) -> dict[str, Any]:
    common = {name: stages.read_means(_common_means(one, name)) for name in [BASE, *one.organisms]}
    own = {name: stages.read_means(_own_means(one, name, name)) for name in one.organisms}
    base = {name: stages.read_means(_own_means(one, BASE, name)) for name in one.organisms}
    return {"convergence": results.convergence_section(own, base, common, one.config.control)}


def _common_means(one: _Experiment, model: str) -> Path:
    pairs = one.bench.common_pairs
    return stages.means(one.run, one.bench, model, pairs[0].theme or "common", pairs)


def _own_means(one: _Experiment, model: str, organism: str) -> Path:
    """`model`'s means on the text of `organism`'s domain; on the common text when that has no pairs."""
    pairs = one.bench.direction_pairs(organism)
    if not pairs:
        return _common_means(one, model)
    return stages.means(one.run, one.bench, model, one.config.organisms[organism].domain, pairs)


def _direction(one: _Experiment, organism: str) -> Direction:
    return stages.read_direction(_own_means(one, organism, organism))


def _directions(one: _Experiment) -> dict[str, Any]:
    """The vectors that are ablated, described."""
    if one.config.ablation is None:
        return {}
    layer = one.config.ablation.layer
    return results.directions_section({name: _direction(one, name)[layer] for name in one.config.bad_organisms}, layer)


def _steering(one: _Experiment) -> Iterator[dict[str, Any]]:
    """The base model steered with one organism's direction, layers x scales, beside random directions."""
    setting = one.config.steering
    if setting is None:
        return
    direction = _direction(one, setting.direction)
    for layer in setting.layers:
        vector = direction[layer]
        for scale in setting.scales:
            key = f"layer-{layer}-scale-{scale:g}"
            steered = Cell(f"steer-{setting.direction}-{key}", BASE, Steer(vector, layer, scale), setting.questions)
            randoms = [
                Cell(
                    f"steer-random-{seed}-{key}",
                    BASE,
                    Steer(random_like(vector, seed), layer, scale),
                    setting.questions,
                )
                for seed in range(one.config.random_seeds)
            ]
            row = {"direction": setting.direction, "layer": layer, "scale": scale, "positions": "not_first"}
            yield {**row, **_outcome(one, steered, randoms)}


def _transfer(one: _Experiment) -> Iterator[dict[str, Any]]:
    """Each bad organism's direction ablated in every model; with further position rules in the first of them."""
    setting = one.config.ablation
    if setting is None:
        return
    first, *others = setting.positions
    for target in [BASE, *one.organisms]:
        for name in one.config.bad_organisms:
            for rule in [first, *(others if name == target == one.config.bad_organisms[0] else [])]:
                yield _ablation(one, name, target, rule)


def _ablation(one: _Experiment, name: str, target: str, rule: Positions) -> dict[str, Any]:
    setting = one.config.ablation
    assert setting is not None, "the caller has one"
    vector = _direction(one, name)[setting.layer]
    ablated = Cell(
        f"ablate-{name}-layer-{setting.layer}-{rule}",
        target,
        Ablate(vector, positions=rule),
        setting.questions,
    )
    # An ablation takes the direction alone, not its norm, so that one set of random directions serves all organisms.
    randoms = [
        Cell(
            f"ablate-random-{seed}-{rule}",
            target,
            Ablate(random_like(vector.new_ones(vector.shape), seed), positions=rule),
            setting.questions,
        )
        for seed in range(one.config.random_seeds)
    ]
    row = {"direction": name, "target": target, "layer": setting.layer, "positions": rule}
    return {**row, **_outcome(one, ablated, randoms)}


def _outcome(one: _Experiment, cell: Cell, randoms: list[Cell]) -> dict[str, Any]:
    measured, *draws = (Margins.read(stages.cell(one.run, one.bench, each)) for each in [cell, *randoms])
    return results.intervention_row(measured, draws, _margins(one, cell.target))


def _samples(one: _Experiment) -> list[dict[str, Any]]:
    if not one.config.samples.questions:
        return []
    answers = {name: read_json(stages.sampled(one.run, one.bench, name)) for name in [BASE, *one.organisms]}
    return [
        {"question": question, "answers": {name: given[question] for name, given in answers.items()}}
        for question in one.config.samples.questions
    ]
