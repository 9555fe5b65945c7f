"""Whole experiments: `demo`, `run`, `report`."""

import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from misdirection.cli.shared import RayAddress, WorkerCount, WorkerGpus, app, say, workers_for
from misdirection.errors import InputError
from misdirection.progress import notice

if TYPE_CHECKING:
    from misdirection.experiment.config import ExperimentConfig
    from misdirection.experiment.several import SeveralConfig
    from misdirection.experiment.several_results import FailedModel


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Everything that the quick demo leaves out (two or three hours).")
    ] = False,
    workers: WorkerCount = None,
) -> None:
    """The whole experiment on the bundled model: train, measure, extract, compare, steer, ablate, report."""
    name = "demo-full.yaml" if full else "demo.yaml"
    with as_file(files("misdirection") / "resources" / name) as config:
        _run(config, folder, workers)
        _keep_reference(config, folder)


def _keep_reference(config: Path, folder: Path) -> None:
    """Let audits of the bundled model compare with the demo's organisms."""
    from misdirection.auditing.reference import keep_first_reference
    from misdirection.experiment.config import read_config

    try:
        if reference := keep_first_reference(read_config(config), folder):
            say(f"reference for audits: {reference.folder}")
    except InputError as error:
        say(f"no reference for audits: {error}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="One experiment, YAML; start from configs/demo.yaml.")],
    folder: Annotated[Path | None, typer.Option("--out", help="The run's folder; default: runs/NAME.")] = None,
    workers: WorkerCount = None,
    ray: RayAddress = None,
    gpus: WorkerGpus = None,
) -> None:
    """Run the experiment of a YAML file, on its model or on each of several, or continue it."""
    _run(config, folder, workers, ray, gpus)


def _run(
    config: Path, folder: Path | None, workers: int | None, ray: str | None = None, gpus: float | None = None
) -> None:
    from misdirection.experiment.config import ExperimentConfig
    from misdirection.experiment.runner import run_experiment
    from misdirection.experiment.several import read_experiment
    from misdirection.experiment.several_runner import run_several

    settings = read_experiment(config)
    folder = folder or Path("runs") / settings.name
    vllm = settings.sampling.engine.vllm if settings.sampling else None
    if gpus is None and vllm:
        gpus = vllm.tensor_parallel * vllm.pipeline_parallel
    others, failed = workers_for(workers, ray, gpus, lambda: _memory(settings)), list[Any]()
    if isinstance(settings, ExperimentConfig):
        run_experiment(settings, folder, others)
    else:
        failed = run_several(settings, folder, others).failed
    say(f"report: {folder / 'report.html'}\nfigures: {folder / 'results.json'}")
    if failed:
        _end_failed(failed)


def _end_failed(failed: "Sequence[FailedModel]") -> NoReturn:
    """End with the status of the first model that failed, and say why each did."""
    causes = "; ".join(f"{each.name}: {each.cause}" for each in failed)
    notice(f"error: models that failed, which the same command tries again: {causes}", "red")
    sys.exit(failed[0].status)


def _memory(settings: "ExperimentConfig | SeveralConfig") -> int:
    """Bytes of main memory that the largest task takes."""
    from misdirection.experiment.cost import most_memory

    return most_memory(settings)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Make the report of a run, or of the runs of several models, again from its results.json."""
    from misdirection.experiment.runner import write_report

    say(f"report: {write_report(folder)}")
