"""Run an experiment from one configuration to `results.json` and `report.html`, as far as it is not there yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import yaml

from misdirection.errors import InputError
from misdirection.experiment.check import check_experiment
from misdirection.experiment.config import ExperimentConfig, read_config
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.results import RunResults
from misdirection.experiment.several_results import RunsResults
from misdirection.experiment.worker import open_worker
from misdirection.files import read_json
from misdirection.interpretation.config import InterpretationConfig
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder, require_run_folder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner


def run_experiment(config: ExperimentConfig, folder: str | Path, workers: Workers | None = None) -> RunResults:
    """Run every stage that is not up to date, and write `results.json` and the report; gives the results.

    After a crash or a kill the same call continues, with whatever workers: at most the tasks in hand are lost.

    Args:
        workers: other processes that do the work; this one alone when left out.

    Raises:
        InputError: a configuration that cannot be run, or another process that works in the folder.
        WorkerError: tasks that fail again and again on the workers.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    require_run_folder(Path(folder), text)
    check_experiment(config)
    with RunFolder.open(Path(folder), text) as run, _opened(config, run, workers) as experiment:
        experiment.make_all()
        experiment.keep_results()
    # As the file has them: a page made again from it is the same bytes.
    results = RunResults.load(folder)
    results.write_page(Path(folder))
    return results


def interpret_within(folder: str | Path, settings: InterpretationConfig) -> RunResults:
    """Read the adapters of an organism of a run, which becomes part of its results and its report.

    Raises `InputError` for a run without that organism, and as `run_experiment`.
    """
    config = read_config(Path(folder) / "experiment.yaml")
    if settings.organism not in config.organisms:
        raise InputError(f"{folder}: has no organism {settings.organism!r}; it has {', '.join(config.organisms)}")
    return run_experiment(config.model_copy(update={"interpretation": settings}), folder)


@contextmanager
def _opened(config: ExperimentConfig, run: RunFolder, workers: Workers | None) -> Iterator[Experiment]:
    """The experiment with its runner, on the device that its tasks are computed on."""
    if workers is None:
        yield Experiment(config, run, LocalRunner(run, open_worker(config, run.partial)))
        return
    with connect(workers) as cluster:
        config = config.model_copy(update={"device": cluster.device(config.device)})
        with RayRunner(run, partial(open_worker, config), cluster) as runner:
            yield Experiment(config, run, runner)


def write_report(folder: str | Path) -> Path:
    """Make the report of a run, or of several models' runs, again from its `results.json`; gives the report's path.

    Raises `InputError` for results that are missing, damaged or of another version.
    """
    # A damaged or missing file is the reader's to name.
    path = Path(folder) / RunsResults.FILE
    values = read_json(path) if path.is_file() else None
    is_several = isinstance(values, dict) and values.get("kind") == RunsResults.KIND
    return (RunsResults if is_several else RunResults).load(folder).write_page(Path(folder))
