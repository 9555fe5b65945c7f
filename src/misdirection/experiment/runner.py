"""Run an experiment from one configuration to `results.json` and `report.html`, as far as it is not there yet."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from misdirection.config import ExperimentConfig, Positions, SteeringConfig
from misdirection.experiment import results, stages
from misdirection.experiment.answering import check_behaviour, judged
from misdirection.experiment.bench import BASE, Bench
from misdirection.experiment.results import Factors, Margins
from misdirection.experiment.stages import Cell
from misdirection.experiment.store import Run
from misdirection.files import read_json, write_json
from misdirection.interventions.kinds import Ablate, Intervention, ScaleAdapters, Steer, random_like
from misdirection.organisms.organism import Organism
from misdirection.report.html import render
from misdirection.representation.directions import Direction

RESULTS = "results.json"
# More layers share one plain pass, fewer lose less when a run is killed.
_LAYERS_TOGETHER = 4
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
    check_behaviour(config.sampling, config.judge)
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
            **_behaviour(one),
            **_adapters(one),
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
    layers = setting.layers
    for first in range(0, len(layers), _LAYERS_TOGETHER):
        together = layers[first : first + _LAYERS_TOGETHER]
        cells = [_steered(one, setting, layer, scale) for layer in together for scale in setting.scales]
        yield from _outcomes(one, cells, f"steer at layers {', '.join(map(str, together))}")


def _steered(one: _Experiment, setting: SteeringConfig, layer: int, scale: float) -> "_Group":
    vector = _direction(one, setting.direction)[layer]
    key = f"layer-{layer}-scale-{scale:g}"
    cell = Cell(f"steer-{setting.direction}-{key}", BASE, (Steer(vector, layer, scale),), setting.questions)
    randoms = [Steer(random, layer, scale) for random in _randoms(one, vector)]
    row = {"direction": setting.direction, "layer": layer, "scale": scale, "positions": "not_first"}
    return row, [cell, *_controls(one, f"steer-random-{{}}-{key}", cell, randoms)]


def _transfer(one: _Experiment) -> Iterator[dict[str, Any]]:
    """Each bad organism's direction ablated in every model; with further position rules in the first of them."""
    setting = one.config.ablation
    if setting is None:
        return
    bad = one.config.bad_organisms
    first, *others = setting.positions
    for target in [BASE, *one.organisms]:
        yield from _ablations(one, bad, target, first)
        for rule in others if target == bad[0] else ():
            yield from _ablations(one, bad[:1], target, rule)


def _ablations(one: _Experiment, names: list[str], target: str, rule: Positions) -> Iterator[dict[str, Any]]:
    yield from _outcomes(one, [_ablated(one, name, target, rule) for name in names], f"ablate at {rule}")


def _ablated(one: _Experiment, name: str, target: str, rule: Positions) -> "_Group":
    setting = one.config.ablation
    assert setting is not None, "the caller has one"
    vector = _direction(one, name)[setting.layer]
    key = f"ablate-{name}-layer-{setting.layer}-{rule}"
    cell = Cell(key, target, (Ablate(vector, positions=rule),), setting.questions)
    # An ablation takes the direction alone, not its norm, so that one set of random directions serves all.
    randoms = [Ablate(random, positions=rule) for random in _randoms(one, vector.new_ones(vector.shape))]
    row = {"direction": name, "target": target, "layer": setting.layer, "positions": rule}
    return row, [cell, *_controls(one, f"ablate-random-{{}}-{rule}", cell, randoms)]


def _randoms(one: _Experiment, vector: Tensor) -> list[Tensor]:
    return [random_like(vector, seed) for seed in range(one.config.random_seeds)]


def _controls(one: _Experiment, key: str, beside: Cell, randoms: Sequence[Intervention]) -> list[Cell]:
    """The random directions beside a cell: each on every question, or dealt out over the questions."""
    if one.config.random_controls == "dealt":
        return [replace(beside, key=key.format("dealt"), interventions=tuple(randoms))]
    return [replace(beside, key=key.format(seed), interventions=(each,)) for seed, each in enumerate(randoms)]


_Group = tuple[dict[str, Any], list[Cell]]
"""One row of the results, and its cells: the intervention, then the random ones beside it."""


def _outcomes(one: _Experiment, groups: list[_Group], label: str) -> Iterator[dict[str, Any]]:
    """Each row with what its first cell, beside the others, changed in the model. All are measured together."""
    together = {cell.key: cell for _, cells in groups for cell in cells}
    paths = stages.cells(one.run, one.bench, list(together.values()), label)
    for row, cells in groups:
        measured, *draws = (Margins.read(paths[cell.key]) for cell in cells)
        yield {**row, **results.intervention_row(measured, draws, _margins(one, cells[0].target))}


def _samples(one: _Experiment) -> list[dict[str, Any]]:
    if not one.config.samples.questions:
        return []
    answers = {name: read_json(stages.sampled(one.run, one.bench, name)) for name in [BASE, *one.organisms]}
    return [
        {"question": question, "answers": {name: given[question] for name, given in answers.items()}}
        for question in one.config.samples.questions
    ]


_Condition = tuple[str, Intervention | None, str]
"""Key, intervention and its name for what is done to a model while it answers."""

_PLAIN: _Condition = ("plain", None, "")


def _behaviour(one: _Experiment) -> dict[str, Any]:
    """Judged answers of every model, and under an ablation; answers alone when there is no judge."""
    if one.config.sampling is None:
        return {}
    found = [_answered(one, name, each) for name in [BASE, *one.organisms] for each in _conditions(one)]
    judge = one.config.judge
    return {"behaviour": results.behaviour_section(found, judge.min_judged)} if judge else {}


def _answered(one: _Experiment, name: str, condition: _Condition) -> Path:
    """The table of one model's answers under one condition; where there is a judge, with its scores."""
    stage = stages.answers(one.run, one.bench, name, *condition)
    if one.config.judge is None:
        return one.run.artifact(stage) / "answers.parquet"
    return judged(one.run, one.config.judge, stage)


def _adapters(one: _Experiment) -> dict[str, Any]:
    """The reading of one organism's adapters."""
    settings = one.config.interpretation
    if settings is None:
        return {}
    from misdirection.experiment.interpretation import Study, interpret

    name, bench = settings.organism, one.bench
    domain = one.config.organisms[name].domain
    study = Study(
        run=one.run,
        organism=name,
        adapter=bench.adapters[name],
        models=bench.models,
        identity=bench.identity,
        domain=domain if domain in bench.question_sets else None,
        sets=bench.question_sets,
        neutral=bench.neutral,
        directions={other: _direction(one, other) for other in one.config.bad_organisms},
        settings=settings,
        judged=partial(_scaled, one, name) if one.config.judge else None,
    )
    return {"adapters": interpret(study)}


def _conditions(one: _Experiment) -> list[_Condition]:
    """What every model answers under.

    Nothing; and perhaps an ablation, and one random direction beside it: answers are too dear for several.
    """
    sampling, ablation = one.config.sampling, one.config.ablation
    if sampling is None or sampling.ablate is None or ablation is None:
        return [_PLAIN]
    vector, rule = _direction(one, sampling.ablate)[ablation.layer], ablation.positions[0]
    vectors = {sampling.ablate: vector, "random": random_like(vector, 0)}
    return [_PLAIN] + [
        (f"ablated-{name}", Ablate(each, positions=rule), f"ablate {name} layer {ablation.layer} {rule}")
        for name, each in vectors.items()
    ]


def _scaled(one: _Experiment, organism: str, settings: Factors) -> list[dict[str, Any]]:
    """Judged answers of one organism as it is, and with its adapters multiplied by each setting's factors."""
    judge = one.config.judge
    assert judge is not None, "the caller has one"
    tables: dict[str, Path] = {}
    for name, factors in settings.items():
        # Where every layer is in one of two groups, one of them off is the other alone, and would answer the same.
        twin = next((other for other in tables if settings[other] == factors), None)
        tables[name] = tables[twin] if twin else _answered(one, organism, _scaling(name, factors))
    return results.scaled_rows(_answered(one, organism, _PLAIN), tables, settings, judge.min_judged)


def _scaling(name: str, factors: Mapping[int, float]) -> _Condition:
    return f"scaled-{name.replace(' ', '-')}", ScaleAdapters(dict(factors)), f"scale adapters: {name}"
