"""Whole experiments on workers: the same results as without, stopped, killed and continued; nothing left behind."""

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import psutil
import pytest
import yaml

from experiment.tiny_experiment import asked_experiment, graded, isolate, with_judge
from judging.judge_server import JudgeServer
from judging.processes import Command
from misdirection.errors import MisdirectionError, NetworkProblem
from misdirection.files import MADE, read_json, sha256_file, write_json
from misdirection.runs.cluster import Cluster, Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE, Models, Worker

ray = pytest.importorskip("ray", reason="workers need the extra `ray`")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True, scope="module")
def own_machine(tmp_path_factory):
    """No endpoint of the machine's."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("cache"))
        yield


@contextmanager
def files_of_ray():
    """A folder for what Ray and its workers write; a short path, since there are sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield {"RAY_TMPDIR": folder, "TMPDIR": folder}


@pytest.fixture
def files():
    with files_of_ray() as environment:
        yield environment


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An experiment with sampled and judged answers, and its judge, still up."""
    tmp_path = tmp_path_factory.mktemp("workers")
    values = asked_experiment(tmp_path, n=2, new_tokens=8)
    del values["organisms"]["control"]
    path = tmp_path / "tiny.yaml"
    with JudgeServer(graded) as server:
        path.write_text(yaml.safe_dump(with_judge(values, server.url)))
        yield path


def running(config, folder, workers, environment):
    """`misdirection run` into a folder's `run`, with a cache of verdicts of its own."""
    # One thread, as workers have: figures depend on their number, by rounding.
    environment = {"MISDIRECTION_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    return Command("run", config, "--out", folder / "run", "--workers", workers, **environment)


def made(run):
    """How many lines the manifest has of each stage."""
    manifest = run / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True) if manifest.exists() else []
    return Counter(json.loads(line)["stage"] for line in lines if line.endswith("\n"))


def figures(run):
    found = json.loads((run / "results.json").read_text())
    found.pop("seconds")
    return found


def artifacts(run):
    """Hashes of all files but those that tell where an adapter was."""
    telling = ("direction.safetensors", MADE)
    files = (path for path in (run / "artifacts").rglob("*") if path.is_file() and path.name not in telling)
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


def left_behind(environment):
    """Processes of a Ray that do not end within ten seconds."""
    deadline = time.monotonic() + 10
    while (found := list(filter(partial(of, environment), psutil.process_iter()))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def of(environment, process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and environment.items() <= process.environ().items()
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A finished run without workers."""
    folder = tmp_path_factory.mktemp("whole")
    running(config, folder, 0, {}).finished()
    return folder / "run"


def test_workers_give_the_results_of_one_process(config, whole, files, tmp_path):
    running(config, tmp_path, 2, files).finished()
    assert figures(tmp_path / "run") == figures(whole)
    assert artifacts(tmp_path / "run") == artifacts(whole)
    assert made(tmp_path / "run") == made(whole)
    assert not left_behind(files)


def test_killed_on_workers_it_ends_without_them_and_with_the_same_results(config, whole, files, tmp_path):
    run, one = tmp_path / "run", running(config, tmp_path, 2, files)
    while len(made(run)) < 9 and one.process.is_alive():
        time.sleep(0.005)
    one.killed()
    assert 9 <= len(made(run)) < len(made(whole))
    assert not left_behind(files)
    running(config, tmp_path, 0, {}).finished()
    assert figures(run) == figures(whole)
    assert artifacts(run) == artifacts(whole)
    # One line of each: what was made before is not made again.
    assert made(run) == made(whole) == dict.fromkeys(made(whole), 1)


@pytest.mark.parametrize(
    ("address", "cause"),
    [("127.0.0.1:1", "[Errno 111] Connection refused"), ("nobody", "Invalid address format: nobody")],
)
def test_a_cluster_that_does_not_answer_is_one_line(config, call, tmp_path, address, cause):
    status, out, err = call("run", config, "--out", tmp_path / "run", "--workers", 2, "--ray", address)
    assert (status, out) == (NetworkProblem.exit_status, "")
    assert err.startswith(f"error: ray: no cluster answers at {address} ({cause}): start one with `ray start --head`")


def test_without_ray_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MisdirectionError) as error, connect(Workers(2)):
        pass
    said = "`--workers` and `--ray`: the package ray is not installed: pip install 'misdirection[ray]'"
    assert str(error.value) == said


def test_workers_without_room_are_one_line_and_leave_no_cluster(files, monkeypatch):
    for name, value in files.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MisdirectionError) as error, connect(Workers(2, memory=2**50)):
        pass
    assert re.fullmatch(
        r"2 workers of .* GiB of memory each have no room: .* for them: ask for fewer", str(error.value)
    )
    assert not ray.is_initialized()
    assert not left_behind(files)


@pytest.fixture(scope="module")
def machine():
    """A machine with four CPUs and three GPUs, so far as Ray knows."""
    with files_of_ray() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Workers(5), "5 workers of 1 CPUs each have no room: this machine has 4 CPUs for them: ask for fewer"),
        (Workers(4, gpus=1), "4 workers of 1 GPUs each have no room: this machine has 3 GPUs for them: ask for fewer"),
        (Workers(gpus=4), "1 workers of 4 GPUs each have no room: this machine has 3 GPUs for them: ask for fewer"),
    ],
)
def test_more_workers_than_the_machine_has_room_for_are_one_line(machine, asked, said):
    with pytest.raises(MisdirectionError) as error:
        Cluster.of(machine, asked)
    assert str(error.value) == said


def test_workers_share_the_machine(machine):
    asked = (Workers(gpus=1), Workers(2), Workers(gpus=2), Workers(2, "a:1"), Workers(address="a:1", gpus=0.3))
    found = [Cluster.of(machine, each) for each in asked]
    assert [(one.count, one.cpus, one.gpus) for one in found[:-1]] == [(3, 1, 1), (2, 2, 0), (1, 4, 2), (2, 1, 0)]
    assert found[-1].count == 10


@pytest.mark.parametrize("gpus", [1.5, 0.001, float("nan"), float("inf")])
def test_gpus_that_no_worker_can_have_are_one_line(gpus):
    with pytest.raises(MisdirectionError, match=f"^{gpus:g} GPUs for each worker: give a whole number, or 0.01 to 1"):
        Workers(2, gpus=gpus)


def look_at_gpus(met, count, _worker, folders):
    """Write down the GPUs that this worker has, once so many workers are at work."""
    ((name, folder),) = folders.items()
    (met / name.replace("/", "-")).touch()
    deadline = time.monotonic() + 60
    while len(list(met.iterdir())) < count:
        assert time.monotonic() < deadline, "the other worker never came"
        time.sleep(0.01)
    write_json(folder / "seen.json", os.environ["CUDA_VISIBLE_DEVICES"].split(","))


@pytest.mark.parametrize(
    ("count", "gpus", "device", "each", "distinct"),
    [(2, 1, "cuda", 1, 2), (1, 2, "balanced", 2, 2), (2, 0.5, "cuda", 1, 1)],
    ids=["one each", "one that takes two", "two that share one"],
)
def test_workers_see_the_gpus_that_are_theirs_and_work_at_the_same_time(
    machine, tmp_path, count, gpus, device, each, distinct
):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster.of(machine, Workers(count, gpus=gpus))
    assert cluster.device("auto") == device
    (tmp_path / "met").mkdir()
    work = partial(look_at_gpus, tmp_path / "met", count)
    tasks = [Task({f"look/{number}": {}}, BASE, work) for number in range(count)]
    with RunFolder.open(tmp_path / "run", "x") as run:
        with RayRunner(run, lambda working: Worker(Models(lambda: None), working), cluster) as runner:
            runner.make(tasks)
        found = [read_json(run.artifact(task.stage) / "seen.json") for task in tasks]
    assert [len(gpus) for gpus in found] == [each] * count
    assert len({number for gpus in found for number in gpus}) == distinct


def test_a_model_is_where_the_workers_have_it():
    several, with_gpu, without = (Cluster(None, 2, 1, gpus, 0) for gpus in (2, 1, 0))
    assert [one.device("auto") for one in (several, with_gpu, without)] == ["balanced", "cuda", "cpu"]
    assert [several.device(asked) for asked in ("cpu", "mps", "cuda")] == ["cpu", "mps", "cuda"]
