"""Run one experiment on several base models, one after another; each has a run folder of its own."""

import logging
import traceback
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import yaml

from misdirection.directions.convergence import cosines
from misdirection.directions.direction import Direction
from misdirection.errors import EXIT_STATUS, first_line, problem_of
from misdirection.experiment.results import RunResults
from misdirection.experiment.runner import run_experiment
from misdirection.experiment.several import SeveralConfig
from misdirection.experiment.several_results import AcrossModels, FailedModel, RunsResults, model_row, organism_rows
from misdirection.experiment.stages.means import MeansStage, read_direction
from misdirection.runs.cluster import Workers
from misdirection.runs.folder import RUNS, RunFolder
from misdirection.runs.worker import BASE, free_memory

log = logging.getLogger("misdirection")


def run_several(config: SeveralConfig, folder: str | Path, workers: Workers | None = None) -> RunsResults:
    """Run an experiment on each of its models, and write the joint `results.json` and page; gives the results.

    Model by model, as `run_experiment` does it, in `FOLDER/runs/NAME`. One that fails loses itself alone: it is in
    `failed`, and the same call tries it again. After a kill the same call continues.

    Args:
        config: from `read_several`.
        folder: of the joint results, with the runs in it.
        workers: other processes that do the work of each run; this one alone when left out.

    Raises:
        InputError: another process that works in the folder, or one that holds something else.
    """
    out, made, failed = Path(folder), dict[str, RunResults](), list[FailedModel]()
    with RunFolder.open(out, yaml.safe_dump({RUNS: config.described()}, sort_keys=False)) as run:
        for number, name in enumerate(config.models, start=1):
            try:
                made[name] = run_experiment(config.experiment(name), run.inner(name), workers)
            # Whatever one model raises, the others have their turn; an interrupt is no `Exception`.
            except Exception as error:
                failed.append(_failure(name, error))
            free_memory()
            waiting = list(config.models)[number:]
            run.keep(_joined(config, made, failed, waiting, out))
            # As the file has them: a page made again from it is the same bytes.
            results = RunsResults.load(out)
            results.write_page(out)
    return results


def _failure(name: str, error: Exception) -> FailedModel:
    problem = problem_of(error)
    if problem is None:
        log.warning("%s failed:\n%s", name, traceback.format_exc())
        return FailedModel(name=name, cause=f"{type(error).__name__}: {first_line(error)}", status=EXIT_STATUS["bug"])
    log.warning("%s: %s; the other models go on", name, problem)
    return FailedModel(name=name, cause=str(problem), status=problem.exit_status)


def _joined(
    config: SeveralConfig,
    made: Mapping[str, RunResults],
    failed: list[FailedModel],
    waiting: list[str],
    folder: Path,
) -> RunsResults:
    organisms = config.values["organisms"]
    return RunsResults(
        name=config.name,
        models=[model_row(model, results) for model, results in made.items()],
        organisms=[row for model, results in made.items() for row in organism_rows(model, results, organisms)],
        across=[
            across
            for first, second in combinations(made, 2)
            if _shape(made[first]) == _shape(made[second])
            for across in _across(folder / RUNS, first, second, made[first])
        ],
        failed=failed,
        waiting=waiting,
    )


def _shape(results: RunResults) -> tuple[int, int]:
    return results.base.layers, results.base.width


def _across(runs: Path, first: str, second: str, results: RunResults) -> list[AcrossModels]:
    """Cosines between the directions of two models of one shape; none of a domain that gives no directions."""

    def direction(model: str, organism: str, domain: str) -> Direction:
        return read_direction(runs / model / "artifacts" / MeansStage.name / organism / domain)

    return [
        AcrossModels(
            organism=organism,
            first=first,
            second=second,
            cosine=cosines(*(direction(model, organism, figures.domain).vectors for model in (first, second))),
            base_null=cosines(*(direction(model, BASE, figures.domain).vectors for model in (first, second))),
        )
        for organism, figures in results.bad_organisms.items()
        if organism in results.convergence.cosine and "in_domain" in figures.margin_shift
    ]
