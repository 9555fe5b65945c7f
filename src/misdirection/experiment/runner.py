"""Run an experiment from one configuration to `results.json` and `report.html`, as far as it is not there yet."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from misdirection.directions.direction import Direction
from misdirection.experiment import results, stages
from misdirection.experiment.answering import check_behaviour, judged
from misdirection.experiment.config import ExperimentConfig, SteeringConfig
from misdirection.experiment.results import Factors, Margins
from misdirection.experiment.stages import Cell
from misdirection.experiment.texts import ExperimentTexts
from misdirection.files import read_json, write_json
from misdirection.interventions.kinds import Ablate, Intervention, ScaleAdapters, Steer, random_like
from misdirection.interventions.positions import Positions
from misdirection.organisms.organism import Organism
from misdirection.report.html import render
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner, Workers, connect
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Worker

RESULTS = "results.json"
_PACKAGES = ("torch", "transformers", "peft", "trl", "numpy")


@dataclass
class _Experiment:
    """One run under way."""

    config: ExperimentConfig
    run: RunFolder
    bench: ExperimentTexts
    runner: Runner

    @property
    def organisms(self) -> list[str]:
        return list(self.config.organisms)

    @property
    def models(self) -> list[str]:
        return [BASE, *self.organisms]

    def made(self, piece: Task) -> Path:
        """The folder of a piece of one stage, which is made if need be."""
        self.runner.make([piece])
        return self.run.artifact(piece.stage)


def run_experiment(config: ExperimentConfig, folder: str | Path, workers: Workers | None = None) -> Path:
    """Run every stage that is not up to date, write `results.json` and the report; gives the report's path.

    After a crash or a kill the same call continues, with whatever workers: at most the pieces in hand are lost.

    Args:
        workers: other processes that make the pieces; this one alone when left out.

    Raises `InputError` when another process works in the folder, and for pieces that fail again and again.
    """
    check_behaviour(config.sampling, config.judge)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    with RunFolder.open(Path(folder), text) as run, _making(run, config, workers) as (config, runner):
        one = _Experiment(config, run, ExperimentTexts(config), runner)
        _make_all(one)
        found = _measured(one) | _convergence(one)
        found |= {
            "directions": _directions(one),
            "steering": [row for batch in _steering(one) for row in _outcomes(one, batch)],
            "transfer": [row for batch in _transfer(one) for row in _outcomes(one, batch)],
            "samples": _samples(one),
            **_behaviour(one),
            **_adapters(one),
        }
        write_json(Path(folder) / RESULTS, _header(one) | found)
    return write_report(folder)


@contextmanager
def _making(
    run: RunFolder, config: ExperimentConfig, workers: Workers | None
) -> Iterator[tuple[ExperimentConfig, Runner]]:
    """What makes the pieces, and the experiment on the device that they are made on."""
    if workers is None:
        yield config, LocalRunner(run, Worker.of(config, run.partial))
        return
    with connect(workers) as cluster:
        config = config.model_copy(update={"device": cluster.device(config.device)})
        with RayRunner(run, partial(Worker.of, config), cluster) as grid:
            yield config, grid


def _make_all(one: _Experiment) -> None:
    """All pieces but those of the adapters' reading, each wave from what the waves before it made."""
    one.runner.make([stages.organism(one.bench, name) for name in one.organisms])
    margins = [stages.margin(one.run, one.bench, name) for name in one.models]
    means = [_common_means(one, name) for name in one.models]
    means += [_own_means(one, model, name) for name in one.organisms for model in (name, BASE)]
    one.runner.make(margins + means)
    cells = [batch.task for batch in (*_steering(one), *_transfer(one))]
    sampled = [stages.sampled(one.run, one.bench, name) for name in one.models if one.config.samples.questions]
    answers = [_answers(one, *asked) for asked in _asked(one)]
    one.runner.make(cells + sampled + answers)
    if one.config.judge:
        one.runner.make([judged(one.run, one.config.judge, piece.stage) for piece in answers])


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


def _measured(one: _Experiment) -> dict[str, Any]:
    """Every model's margins."""
    base = _margins(one, BASE)
    organisms = {}
    for name, config in one.config.organisms.items():
        organism = Organism.open(stages.adapter(one.run, name))
        own = _margins(one, name)
        organisms[name] = results.organism_section(organism, config.domain, config.answers, own, base)
    return {**results.base_section(base), "organisms": organisms}


def _margins(one: _Experiment, name: str) -> Margins:
    return Margins.read(one.made(stages.margin(one.run, one.bench, name)) / "margins.parquet")


def _convergence(one: _Experiment) -> dict[str, Any]:
    common = {name: stages.read_means(one.made(_common_means(one, name))) for name in one.models}
    own = {name: stages.read_means(one.made(_own_means(one, name, name))) for name in one.organisms}
    base = {name: stages.read_means(one.made(_own_means(one, BASE, name))) for name in one.organisms}
    return {"convergence": results.convergence_section(own, base, common, one.config.control)}


def _common_means(one: _Experiment, model: str) -> Task:
    pairs = one.bench.common_pairs
    return stages.means(one.run, one.bench, model, pairs[0].theme or "common", pairs)


def _own_means(one: _Experiment, model: str, organism: str) -> Task:
    """`model`'s means on the text of `organism`'s domain; on the common text when that has no pairs."""
    pairs = one.bench.direction_pairs(organism)
    if not pairs:
        return _common_means(one, model)
    return stages.means(one.run, one.bench, model, one.config.organisms[organism].domain, pairs)


def _direction(one: _Experiment, organism: str) -> Direction:
    return stages.read_direction(one.made(_own_means(one, organism, organism)))


def _directions(one: _Experiment) -> dict[str, Any]:
    """The vectors that are ablated, described."""
    if one.config.ablation is None:
        return {}
    layer = one.config.ablation.layer
    return results.directions_section({name: _direction(one, name)[layer] for name in one.config.bad_organisms}, layer)


_Group = tuple[dict[str, Any], list[Cell]]
"""One row of the results, and its cells: the intervention, then the random ones beside it."""


@dataclass(frozen=True)
class _Batch:
    """Rows of the results whose cells are measured together, as one piece."""

    groups: list[_Group]
    task: Task


def _batch(one: _Experiment, groups: list[_Group], label: str) -> _Batch:
    together = {cell.key: cell for _, cells in groups for cell in cells}
    return _Batch(groups, stages.cells(one.run, one.bench, list(together.values()), label))


def _outcomes(one: _Experiment, batch: _Batch) -> Iterator[dict[str, Any]]:
    """Each row with what its first cell, beside the others, changed in the model."""
    one.runner.make([batch.task])
    for row, cells in batch.groups:
        paths = (one.run.artifact(cell.stage) / "margins.parquet" for cell in cells)
        measured, *draws = map(Margins.read, paths)
        yield {**row, **results.intervention_row(measured, draws, _margins(one, cells[0].target))}


def _steering(one: _Experiment) -> Iterator[_Batch]:
    """The base model steered with one organism's direction, layers x scales, beside random directions."""
    setting = one.config.steering
    if setting is None:
        return
    layers = setting.layers
    for first in range(0, len(layers), stages.LAYERS_TOGETHER):
        together = layers[first : first + stages.LAYERS_TOGETHER]
        groups = [_steered(one, setting, layer, scale) for layer in together for scale in setting.scales]
        yield _batch(one, groups, f"steer at layers {', '.join(map(str, together))}")


def _steered(one: _Experiment, setting: SteeringConfig, layer: int, scale: float) -> _Group:
    vector = _direction(one, setting.direction)[layer]
    key = f"layer-{layer}-scale-{scale:g}"
    cell = Cell(f"steer-{setting.direction}-{key}", BASE, (Steer(vector, layer, scale),), setting.questions)
    randoms = [Steer(random, layer, scale) for random in _randoms(one, vector)]
    row = {"direction": setting.direction, "layer": layer, "scale": scale, "positions": "not_first"}
    return row, [cell, *_controls(one, f"steer-random-{{}}-{key}", cell, randoms)]


def _transfer(one: _Experiment) -> Iterator[_Batch]:
    """Each bad organism's direction ablated in every model; with further position rules in the first of them."""
    setting = one.config.ablation
    if setting is None:
        return
    bad = one.config.bad_organisms
    first, *others = setting.positions
    for target in one.models:
        yield _ablations(one, bad, target, first)
        for rule in others if target == bad[0] else ():
            yield _ablations(one, bad[:1], target, rule)


def _ablations(one: _Experiment, names: list[str], target: str, rule: Positions) -> _Batch:
    return _batch(one, [_ablated(one, name, target, rule) for name in names], f"ablate at {rule}")


def _ablated(one: _Experiment, name: str, target: str, rule: Positions) -> _Group:
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
    """The random directions beside a cell: each on every question, or each question with one, in turn."""
    if one.config.random_controls == "alternating":
        return [replace(beside, key=key.format("alternating"), interventions=tuple(randoms))]
    return [replace(beside, key=key.format(seed), interventions=(each,)) for seed, each in enumerate(randoms)]


def _samples(one: _Experiment) -> list[dict[str, Any]]:
    if not one.config.samples.questions:
        return []
    answers = {
        name: read_json(one.made(stages.sampled(one.run, one.bench, name)) / "answers.json") for name in one.models
    }
    return [
        {"question": question, "answers": {name: given[question] for name, given in answers.items()}}
        for question in one.config.samples.questions
    ]


_Condition = tuple[str, Intervention | None, str]
"""Key, intervention and its name for what is done to a model while it answers."""

_PLAIN: _Condition = ("plain", None, "")


def _behaviour(one: _Experiment) -> dict[str, Any]:
    """Judged answers of every model, and under an ablation; nothing when there is no judge."""
    judge = one.config.judge
    if judge is None:
        return {}
    found = [_answered(one, *asked) for asked in _asked(one)]
    return {"behaviour": results.behaviour_section(found, judge.min_judged)}


def _asked(one: _Experiment) -> list[tuple[str, _Condition]]:
    """Who answers, and under which conditions."""
    if one.config.sampling is None:
        return []
    return [(name, each) for name in one.models for each in _conditions(one)]


def _answers(one: _Experiment, name: str, condition: _Condition) -> Task:
    return stages.answers(one.run, one.bench, name, *condition)


def _answered(one: _Experiment, name: str, condition: _Condition) -> Path:
    """The table of one model's answers under one condition, with a judge's scores."""
    assert one.config.judge is not None, "the caller has one"
    answers = _answers(one, name, condition)
    one.made(answers)
    return one.made(judged(one.run, one.config.judge, answers.stage)) / "judged.parquet"


def _adapters(one: _Experiment) -> dict[str, Any]:
    """The reading of one organism's adapters."""
    settings = one.config.interpretation
    if settings is None:
        return {}
    from misdirection.interpretation.parts import Study
    from misdirection.interpretation.read import interpret

    name, bench = settings.organism, one.bench
    domain = one.config.organisms[name].domain
    study = Study(
        organism=name,
        adapter=stages.adapter(one.run, name),
        identity=bench.identity,
        domain=domain if domain in bench.question_sets else None,
        sets=bench.question_sets,
        neutral=bench.neutral,
        directions={other: _direction(one, other) for other in one.config.bad_organisms},
        settings=settings,
    )
    judged = partial(_scaled, one, name) if one.config.judge else None
    return {"adapters": interpret(study, one.run, one.runner, judged)}


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
    # Where every layer is in one of two groups, one of them off is the other alone, and would answer the same.
    twins = {
        name: next(other for other in settings if settings[other] == factors) for name, factors in settings.items()
    }
    conditions = {name: _scaling(name, settings[name]) for name in dict.fromkeys(twins.values())}
    one.runner.make([_answers(one, organism, condition) for condition in conditions.values()])
    tables = {name: _answered(one, organism, conditions[twin]) for name, twin in twins.items()}
    return results.scaled_rows(_answered(one, organism, _PLAIN), tables, settings, judge.min_judged)


def _scaling(name: str, factors: Mapping[int, float]) -> _Condition:
    return f"scaled-{name.replace(' ', '-')}", ScaleAdapters(dict(factors)), f"scale adapters: {name}"
