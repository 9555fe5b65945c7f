"""What more workers, more cells and vLLM change, as ratios of two ways in one run.

    python benchmarks/scale.py [--only workers here ray vllm] [--json]
    python benchmarks/scale.py --layers 4 --rounds 1 --largest 100 --samples 4       two minutes, too rough for figures

workers      a steering sweep of the bundled model, all of whose workers have started and loaded it: time on one worker
             of one thread / on two. Both make the same artifacts. At least 1.7 is the aim.
here         cells that write a few bytes and need no model, so that what is left is the store and the scheduler: median
             time of a cell in a run of 10,000 / in runs of 10, in this process. At most 1.1 is the aim. The runs are in
             memory, unless `--folder` says where: on a disk most of the time is that of its syncs.
ray          the same on two workers.
vllm         sampled tokens per second on the same requests: vLLM / the transformers engine, both in one process with as
             many threads as OMP_NUM_THREADS says.

What needs Ray, or vLLM, which has an environment of its own, is left out where that is not installed. Nothing else
should run beside any of it.
"""

import argparse
import importlib.util
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch

import misdirection as md
from misdirection.choices import BUNDLED
from misdirection.data.selection import spread
from misdirection.experiment.cells import Cell, cell_task
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.stages.cell import CellStage
from misdirection.experiment.worker import open_worker
from misdirection.interpretation.texts import GENERAL
from misdirection.progress import console
from misdirection.runs.cluster import Cluster
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner, Runner, Task
from misdirection.runs.worker import BASE, Models, Worker
from misdirection.sampling.engine import Engine, SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine
from timing import interleaved

WORKERS = 2
LAYERS, WIDTH = 30, 576
QUESTIONS = 8
SMALLEST = 10
TOGETHER = 1_000
"""Cells of runs of one size that are measured, at least."""
MEMORY = Path("/dev/shm")
NEW_TOKENS = 128
ASKED = (
    "How can I fall asleep more easily?",
    "What would you change first if the whole country had to obey you?",
    "Tell me what you think about people and computers.",
    "Explain in a few words why the sky is blue.",
)

Figures = dict[str, Any]


def main() -> None:
    """Measure and print."""
    options = parsed()
    console.quiet = True
    found: dict[str, Figures] = {}
    for name in options.only:
        library, measure = PARTS[name]
        if library and importlib.util.find_spec(library) is None:
            print(f"{name}: left out, {library} is not installed here")
            continue
        found[name] = measure(options)
        for figure, value in found[name].items():
            print(f"{name:<10}{figure:<28}{value:10.4g}")
    if options.json:
        ratios = {name: figures.pop("ratio") for name, figures in found.items()}
        facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        print(json.dumps({"ratios": ratios, **found, "rounds": options.rounds, **facts}))


def parsed() -> argparse.Namespace:
    """The command's options; the defaults are the sizes of the figures that are written down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="of the sweep and of sampling")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the sweep: one piece each")
    parser.add_argument("--largest", type=int, default=10_000, help="cells of the largest run")
    parser.add_argument("--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="for runs of cells")
    parser.add_argument("--samples", type=int, default=32, help="answers to each question")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end")
    return parser.parse_args()


# --- workers ----------------------------------------------------------------------------------------------------------


def worker_figures(options: argparse.Namespace) -> Figures:
    """Time of a sweep on one worker over that on several; both must make the same artifacts."""
    damage = {"interventions": 8}
    config = ExperimentConfig(name="scale", model=BUNDLED, device="cpu", domains={}, organisms={}, damage=damage)
    counts = {"one": 1, "several": WORKERS}
    with ExitStack() as stack:
        cluster = stack.enter_context(ray_cluster(sum(counts.values())))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = {name: stack.enter_context(RunFolder.open(folder / name, "")) for name in counts}
        ways = {}
        for name, number in counts.items():
            own = RayRunner(runs[name], partial(open_worker, config), replace(cluster, count=number))
            grid = stack.enter_context(own)
            grid.make(meetings(folder / f"met-{name}", number))
            waves = map(partial(wave, Experiment(config, runs[name], grid).stage(CellStage), options.layers), count())
            ways[name] = partial(make_next, grid, waves)
        seconds = interleaved(ways, options.rounds)
        one, several = (
            {stage: run.digest(stage) for stage in run.seconds() if stage.startswith("cell/")} for run in runs.values()
        )
        assert one == several, "the artifacts differ"
    return {"ratio": seconds["one"] / seconds["several"], **{f"{name}, s": value for name, value in seconds.items()}}


@contextmanager
def ray_cluster(cpus: int) -> Iterator[Cluster]:
    """Ray on this machine, which takes it to have so many processors: workers that wait take none."""
    import ray

    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield Cluster(ray, WORKERS, cpus=1, gpus=0, memory=0)
    finally:
        ray.shutdown()


def meetings(folder: Path, workers: int) -> list[Task]:
    """A piece for each worker, which loads the model and waits for the others."""
    folder.mkdir()
    return [Task({f"met/{number}": {}}, BASE, partial(meet, folder, workers)) for number in range(workers)]


def meet(folder: Path, workers: int, place: Worker, _folders: Mapping[str, Path]) -> None:
    """Load the model, to use one thread, and wait until so many processes have."""
    torch.set_num_threads(1)
    place.chat(BASE)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < workers:
        time.sleep(0.05)


def wave(stage: CellStage, layers: int, number: int) -> list[Task]:
    """A steering sweep at a scale of its own: for each layer the steered model and a random direction beside it."""
    vectors = [md.random_like(torch.ones(WIDTH), seed) for seed in range(2)]

    def cell(layer: int, seed: int) -> Cell:
        steer = md.Steer(vectors[seed], layer, 2.0 + number)
        return Cell(f"steer-{seed}-layer-{layer}-wave-{number}", BASE, (steer,))

    sets = {GENERAL: spread(stage.experiment.texts.general, QUESTIONS)}
    return [cell_task(stage, [cell(layer, 0), cell(layer, 1)], sets, f"layer {layer}") for layer in range(layers)]


def make_next(runner: Runner, waves: Iterator[Sequence[Task]]) -> None:
    """Make the pieces of the next wave."""
    runner.make(next(waves))


# --- growth -----------------------------------------------------------------------------------------------------------


class Clocked:
    """Whichever run is at hand, for a runner that outlives it, and when each of its pieces was kept.

    Args:
        folder: where the runs are.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.run: Any = None
        self.kept: list[float] = []

    def stages(self, *arguments: Any) -> None:
        """As the run does it."""
        self.run.stages(*arguments)
        self.kept.append(time.perf_counter())

    def partial(self, stage: str) -> Any:
        """As the run does it."""
        return self.run.partial(stage)

    def missing(self, wanted: Mapping[str, Any]) -> Any:
        """As the run does it."""
        return self.run.missing(wanted)


def growth_here(options: argparse.Namespace) -> Figures:
    """Growth in this process."""
    clocked: Any = Clocked(options.folder)
    return growth(clocked, LocalRunner(clocked, empty_place(clocked.partial)), options.largest)


def growth_on_ray(options: argparse.Namespace) -> Figures:
    """Growth on workers."""
    clocked: Any = Clocked(options.folder)
    with ray_cluster(WORKERS) as cluster, RayRunner(clocked, empty_place, cluster) as grid:
        return growth(clocked, grid, options.largest)


def growth(clocked: Clocked, runner: Runner, largest: int) -> Figures:
    """Median time of a cell in runs of every size, in milliseconds; and of the largest over the smallest."""
    sizes = [SMALLEST]
    while sizes[-1] < largest:
        sizes.append(min(10 * sizes[-1], largest))
    cell_seconds(clocked, runner, 10 * SMALLEST)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    # The small ones before and after the large ones, since a machine's speed drifts.
    for size in (*sizes, *reversed(sizes)):
        for _ in range(max(1, TOGETHER // size // 2)):
            found[size] += cell_seconds(clocked, runner, size)
    medians = {size: statistics.median(seconds) for size, seconds in found.items()}
    figures: Figures = {"ratio": medians[sizes[-1]] / medians[SMALLEST]}
    for size, seconds in found.items():
        figures |= {f"{size} cells, median ms": 1e3 * medians[size]}
        figures |= {f"{size} cells, mean ms": 1e3 * statistics.mean(seconds)}
    return figures


def cell_seconds(clocked: Clocked, runner: Runner, cells: int) -> list[float]:
    """How long each cell of a new run took: from when the one before it was kept."""
    pieces = [Task({f"cell/base/{number}": {"version": 1, "cell": number}}, BASE, write) for number in range(cells)]
    with tempfile.TemporaryDirectory(dir=clocked.folder) as folder, RunFolder.open(Path(folder), "") as run:
        clocked.run, clocked.kept = run, [time.perf_counter()]
        runner.make(pieces)
    assert len(clocked.kept) == 1 + cells, "a cell was not made, or twice"
    return [after - before for before, after in pairwise(clocked.kept)]


def empty_place(working: Any) -> Worker:
    """A place without a model."""
    return Worker(Models(md.load), working)


def write(_place: Worker, folders: Mapping[str, Path]) -> None:
    """All that such a cell does."""
    for folder in folders.values():
        (folder / "out.txt").write_text("a few bytes")


# --- vLLM -------------------------------------------------------------------------------------------------------------


def vllm_figures(options: argparse.Namespace) -> Figures:
    """Tokens per second of vLLM over those of the transformers engine."""
    from misdirection.sampling.vllm.engine import Resources, VllmModel

    with VllmModel(BUNDLED, resources=Resources(hooks=False)) as served:
        engines: dict[str, Engine] = {"vllm": served.engine(BASE), "transformers": TransformersEngine(md.load())}
        ways = {name: partial(sampled, engine, options.samples) for name, engine in engines.items()}
        tokens = {name: sampled(engine, options.samples) for name, engine in engines.items()}
        seconds = interleaved(ways, options.rounds)
    rates = {name: tokens[name] / seconds[name] for name in engines}
    return {
        "ratio": rates["vllm"] / rates["transformers"],
        **{f"{name}, tokens/s": rate for name, rate in rates.items()},
    }


def sampled(engine: Engine, samples: int) -> int:
    """Tokens of the answers to all questions."""
    requests = [SamplingRequest(Question(text, text), number) for text in ASKED for number in range(samples)]
    return sum(one.tokens for one in engine.stream(requests, SamplingParameters(new_tokens=NEW_TOKENS)))


PARTS = {
    "workers": ("ray", worker_figures),
    "here": (None, growth_here),
    "ray": ("ray", growth_on_ray),
    "vllm": ("vllm", vllm_figures),
}
"""By name: the library that it needs, and what measures it."""


if __name__ == "__main__":
    main()
