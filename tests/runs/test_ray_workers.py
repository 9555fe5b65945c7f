"""Pieces on real Ray actors: lost, failing, killed and continued."""

import _thread
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from misdirection.errors import MisdirectionError
from misdirection.files import MADE, TEMPORARY
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.folder import RunFolder
from misdirection.runs.queue import TRIES, ActorHandle, Queue, Share
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.tasks import LocalRunner, Task
from misdirection.runs.worker import BASE, Models, Worker

ray = pytest.importorskip("ray", reason="workers need the extra `ray`")
pytestmark = pytest.mark.timeout(120)

# What workers call goes to them as it is: they cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


# --- what workers do --------------------------------------------------------------------------------------------------


def make_place(working):
    return Worker(Models(lambda: None), working)


def mark(log, folders):
    """Note that these stages were begun, and where."""
    (log / f"{time.time_ns()}-{os.getpid()}").write_text("\n".join(folders))


def write(log, text, _place, folders):
    mark(log, folders)
    for name, folder in folders.items():
        (folder / "out.txt").write_text(f"{text} of {name}")


def slowly(log, size, _place, folders):
    """Half a file, a while, and the rest."""
    mark(log, folders)
    for name, folder in folders.items():
        with (folder / "out.txt").open("w") as file:
            file.write(expected(name, size)[: size // 2])
            file.flush()
            time.sleep(0.02)
            file.write(expected(name, size)[size // 2 :])


def expected(name, size):
    return (f"{name} " * size)[:size]


def meet(log, count, _place, folders):
    """Wait until so many workers are here."""
    mark(log, folders)
    deadline = time.monotonic() + 30
    while len({path.name.split("-")[1] for path in log.iterdir()}) < count:
        assert time.monotonic() < deadline, "the other worker never came"
        time.sleep(0.01)


def fail(log, bad, _place, folders):
    """Write all stages, unless a bad one is among them."""
    mark(log, folders)
    for name, folder in folders.items():
        (folder / "out.txt").write_text(name)
        if name in bad:
            raise ValueError(f"nothing is right with {name}\nat all")


def refuse(log, _place, folders):
    mark(log, folders)
    raise MisdirectionError("no such thing; choose another")


def die(log, how, _place, folders):
    mark(log, folders)
    how(3)


def lost_once(log, names, place, folders):
    """Die the first time, then `look`."""
    if not any(log.iterdir()):
        mark(log, folders)
        os.kill(os.getpid(), signal.SIGKILL)
    look(log, names, place, folders)


def look(log, names, place, folders):
    """Copy what the place's adapters hold, and note when that came."""
    mark(log, folders)
    (folder,) = folders.values()
    for name in names:
        adapter = place.adapters[name]
        for path in sorted(adapter.rglob("*")):
            if path.is_file():
                copy = folder / name / path.relative_to(adapter)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        (folder / f"{name}.came").write_text(str(max(path.stat().st_mtime_ns for path in adapter.iterdir())))
    (folder / "sent").write_text(" ".join(sorted(place.adapters)))


def keep(place, folders):
    """Write a result, and a working file."""
    ((name, folder),) = folders.items()
    (folder / "result").write_text("whole")
    (place.partial(name) / "checkpoint").write_text("half")


# --- what tests share -------------------------------------------------------------------------------------------------


@contextmanager
def files_of_ray():
    """A folder for what Ray and killed workers leave; a short path, since there are sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield {"RAY_TMPDIR": folder, "TMPDIR": folder}


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests here; its two workers fit wherever one does."""
    with pytest.MonkeyPatch.context() as patch, files_of_ray() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        with connect(Workers(1)) as found:
            yield replace(found, count=2, cpus=0)


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run for all tests here, whose stages have names of their own: a worker takes seconds to start."""
    with RunFolder.open(tmp_path_factory.mktemp("grid") / "run", "x") as run:
        yield run


@pytest.fixture(scope="module")
def grid(run, cluster):
    with RayRunner(run, make_place, cluster) as grid:
        yield grid


def piece(names, compute, *given, model=BASE, **more):
    """A piece of the stages `names`, apart by spaces."""
    return Task({name: {"value": name} for name in names.split()}, model, partial(compute, *given), **more)


def begun(log):
    """Process and stages of each try, in order."""
    tries = sorted(log.iterdir(), key=lambda path: int(path.name.split("-")[0]))
    return [(int(path.name.split("-")[1]), tuple(path.read_text().split())) for path in tries]


def places_of(log, name):
    """The process of each try of a stage alone."""
    return [process for process, names in begun(log) if names == (name,)]


def made(run, prefix=""):
    """How many lines the manifest has of each stage."""
    manifest = run.folder / "manifest.jsonl"
    lines = manifest.read_text().splitlines() if manifest.exists() else []
    names = (json.loads(line)["stage"] for line in lines)
    return Counter(name for name in names if name.startswith(prefix))


def text(run, name):
    return (run.artifact(name) / "out.txt").read_text()


def gather(grid, folder):
    """Have both workers up."""
    folder.mkdir()
    grid.make([piece(f"{folder.name}/{number}", meet, folder, 2) for number in range(2)])


@contextmanager
def beside(work):
    """A thread that runs `work` until the context is left."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- tests ------------------------------------------------------------------------------------------------------------


def cells(log):
    """200 stages in pieces of one to three, for four models; a few are too large to go with a message."""
    chance, left = random.Random(0), list(range(200))
    while left:
        together, left = left[: (count := chance.randint(1, 3))], left[count:]
        names = " ".join(f"cell/{number}" for number in together)
        size = 300_000 if chance.random() < 0.1 else 100
        yield size, piece(names, slowly, log, size, model=f"model-{chance.randrange(4)}")


def test_workers_killed_at_random_lose_nothing_and_make_nothing_twice(grid, run, log, tmp_path):
    def kill_some(stop):
        chance = random.Random(1)
        while len(killed) < 6 and not stop.is_set():
            # So many more pieces, whatever the machine's speed: the workers come back in between.
            if len(seen := begun(log)) >= 12 * (len(killed) + 1):
                worker = chance.choice([process for process, _ in seen[-4:]])
                time.sleep(chance.random() * 0.05)
                if worker not in killed and psutil.Process(worker).cmdline()[0].startswith("ray::"):
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)
            time.sleep(0.01)

    killed, wanted = [], list(cells(log))
    with beside(kill_some):
        grid.make([one for _, one in wanted])
    assert len(set(killed)) == 6
    assert made(run, "cell") == {f"cell/{number}": 1 for number in range(200)}
    for size, one in wanted:
        assert all(text(run, name) == expected(name, size) for name in one.stages)
    assert not list(run.folder.rglob(f"{TEMPORARY}*"))
    # What was lost was begun again, and nothing else.
    again = sum(count - 1 for count in Counter(names for _, names in begun(log)).values())
    assert 0 < again <= len(killed)
    gather(grid, tmp_path / "after-kills")


@pytest.mark.parametrize(
    ("compute", "given", "cause"),
    [
        (fail, [["fail/bad"]], "ValueError: nothing is right with fail/bad"),
        (refuse, [], "no such thing; choose another"),
    ],
)
def test_a_piece_that_always_fails_is_named_with_its_cause_when_all_others_are_done(
    grid, run, log, tmp_path, compute, given, cause
):
    name = compute.__name__
    gather(grid, tmp_path / f"before-{name}")
    good = [f"{name}/{number}" for number in range(6)]
    pieces = [piece(f"{name}/bad", compute, log, *given), *(piece(each, write, log, "text") for each in good)]
    with pytest.raises(MisdirectionError) as error:
        grid.make(pieces)
    assert f"again): {name}/bad: {cause}" in str(error.value)
    assert "\n" not in str(error.value)
    assert [text(run, each) for each in good] == [f"text of {each}" for each in good]
    tries = places_of(log, f"{name}/bad")
    assert len(tries) == TRIES
    assert all(one != other for one, other in pairwise(tries))
    with pytest.raises(MisdirectionError, match=f"{name}/bad"):
        grid.make(pieces)
    assert Counter(names for _, names in begun(log)) == {(f"{name}/bad",): 2 * TRIES} | {(each,): 1 for each in good}
    assert made(run, name) == dict.fromkeys(good, 1)


def test_a_piece_that_ends_its_worker_is_given_up_and_other_workers_go_on(grid, run, log):
    bad = [piece("dies/exits", die, log, os._exit), piece("dies/leaves", die, log, sys.exit)]
    with pytest.raises(MisdirectionError) as error:
        grid.make([*bad, *(piece(f"dies/{number}", write, log, "text") for number in range(6))])
    assert "(2 of " in str(error.value)
    for one in bad:
        assert f"{one.stage}: its worker was lost (" in str(error.value)
        assert len(set(places_of(log, one.stage))) == len(places_of(log, one.stage)) == TRIES
    assert made(run, "dies") == {f"dies/{number}": 1 for number in range(6)}
    grid.make([piece(f"goes-on/{number}", write, log, "text") for number in range(6)])
    assert made(run, "goes-on") == {f"goes-on/{number}": 1 for number in range(6)}


def test_of_stages_that_fail_together_only_the_bad_one_is_given_up(grid, run, log):
    whole = piece("parts/a parts/b parts/c", fail, log, ["parts/b"])
    with pytest.raises(MisdirectionError, match=r"again\): parts/b: ValueError: nothing is right with parts/b$"):
        grid.make([whole])
    assert made(run, "parts") == {"parts/a": 1, "parts/c": 1}
    tries = {tuple(whole.stages): TRIES, ("parts/b",): TRIES, ("parts/a",): 1, ("parts/c",): 1}
    assert Counter(names for _, names in begun(log)) == tries
    with pytest.raises(MisdirectionError, match="again\\): parts/b: "):
        grid.make([whole])
    assert Counter(names for _, names in begun(log)) == tries | {("parts/b",): 2 * TRIES}


def test_what_holds_is_left_and_a_stage_of_two_pieces_is_made_once(grid, run, log):
    grid.make([piece("h/a h/b", write, log, "first")])
    wanted = [
        piece("h/b h/c", write, log, "second"),
        piece("h/c h/d", write, log, "third"),
        piece("h/d", write, log, ""),
    ]
    for _ in range(2):
        grid.make(wanted)
    assert Counter(names for _, names in begun(log)) == {("h/a", "h/b"): 1, ("h/c",): 1, ("h/d",): 1}
    texts = ["first of h/a", "first of h/b", "second of h/c", "third of h/d"]
    assert [text(run, f"h/{name}") for name in "abcd"] == texts
    assert made(run, "h/") == {f"h/{name}": 1 for name in "abcd"}


def test_stopped_twice_it_ends_with_another_number_of_workers(cluster, log, tmp_path):
    def stop_at(count):
        def work(stop):
            while not stop.is_set():
                if sum(made(run).values()) >= count:
                    _thread.interrupt_main()
                    return
                time.sleep(0.01)

        return beside(work)

    wanted = [piece(f"s/{number}", slowly, log, 100) for number in range(60)]
    for workers, stop in ((2, 10), (1, 25)):
        with RunFolder.open(tmp_path / "run", "x") as run:
            before, tries = made(run), begun(log)
            grid = RayRunner(run, make_place, replace(cluster, count=workers))
            with grid, pytest.raises(KeyboardInterrupt), stop_at(stop):
                grid.make(wanted)
            assert stop <= len(made(run)) < 60
            assert not before.keys() & {name for _, names in begun(log)[len(tries) :] for name in names}
    with RunFolder.open(tmp_path / "run", "x") as run:
        before = made(run)
        LocalRunner(run, make_place(run.partial)).make(wanted)
        here = {name for process, (name,) in begun(log) if process == os.getpid()}
        assert here == {f"s/{number}" for number in range(60)} - before.keys()
        assert made(run) == {f"s/{number}": 1 for number in range(60)}
        assert all(text(run, f"s/{number}") == expected(f"s/{number}", 100) for number in range(60))


@pytest.fixture
def adapters(tmp_path):
    """Two adapters: odd files, and below one of them what is no part of it."""
    for name in ("one", "two"):
        folder = tmp_path / "adapters" / name
        (folder / "checkpoint-1").mkdir(parents=True)
        (folder / "checkpoint-1" / "large").write_text("")
        (folder / "weights").write_bytes(bytes(range(256)) * 1000 + name.encode())
        (folder / ".empty").touch()
    return tmp_path / "adapters"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_pieces_that_stay_are_made_here(grid, run, log):
    grid.make([piece("here/stays", write, log, "", here=True), piece("here/goes", write, log, "")])
    assert places_of(log, "here/stays") == [os.getpid()] != places_of(log, "here/goes")


def test_workers_take_their_files_away_when_they_leave(run, cluster, log, adapters):
    def homes():
        return set(Path(os.environ["TMPDIR"]).glob("misdirection-*"))

    before = homes()
    with RayRunner(run, make_place, replace(cluster, count=1)) as grid:
        grid.make([piece("leaves/a", look, log, ["one"], adapters={"one": adapters / "one"})])
        (home,) = homes() - before
        assert contents(home / "adapters" / "one") == contents(adapters / "one")
    assert not home.exists()


def test_working_files_are_not_part_of_a_result(grid, run):
    grid.make([piece("working/files", keep)])
    assert sorted(path.name for path in run.artifact("working/files").iterdir()) == [MADE, "result"]


@pytest.fixture
def single(run, cluster):
    """A grid of one worker."""
    with RayRunner(run, make_place, replace(cluster, count=1)) as grid:
        yield grid


def test_a_worker_is_sent_once_the_files_of_adapters_that_its_pieces_name(single, run, log, adapters):
    one, two = ({name: adapters / name} for name in ("one", "two"))
    single.make([piece("sent/0", look, log, ["one"], adapters=one)])
    single.make([piece("sent/1", look, log, ["two", "one"], adapters=two | one)])
    single.make([piece("sent/2", look, log, ["one"], adapters=one)])
    found = [run.artifact(f"sent/{number}") for number in range(3)]
    assert [(folder / "sent").read_text() for folder in found] == ["one", "one two", "one two"]
    for folder, name in [(found[0], "one"), (found[1], "one"), (found[1], "two"), (found[2], "one")]:
        assert contents(folder / name) == contents(adapters / name)
        assert not (folder / name / "checkpoint-1").exists()
    assert len({(folder / "one.came").read_text() for folder in found}) == 1


def test_a_worker_in_the_place_of_another_is_sent_what_its_pieces_name(single, run, log, adapters):
    single.make([piece("sent-again/0", lost_once, log, ["two"], adapters={"two": adapters / "two"})])
    assert len(begun(log)) == 2
    assert contents(run.artifact("sent-again/0") / "two") == contents(adapters / "two")


def test_one_folder_can_be_two_adapters(grid, run, log, adapters):
    for name in ("plain", "other"):
        grid.make([piece(f"twice/{name}", look, log, [name], adapters={name: adapters / "one"})])
        assert contents(run.artifact(f"twice/{name}") / name) == contents(adapters / "one")


def test_workers_that_cannot_start_are_one_line_and_start_when_its_cause_is_gone(run, cluster, log, tmp_path):
    def broken(working):
        # Only workers have one.
        if os.getpid() != driver and missing.exists():
            (log / f"{time.time_ns()}-{os.getpid()}").touch()
            raise OSError("the model's weights are not there")
        return make_place(working)

    driver, missing = os.getpid(), tmp_path / "missing"
    missing.touch()
    with RayRunner(run, broken, cluster) as grid:
        with pytest.raises(MisdirectionError) as error:
            grid.make([piece("start/a", write, log, "text")])
        assert str(error.value) == "no worker can be started: OSError: the model's weights are not there"
        # Two begin together.
        assert TRIES <= len(list(log.iterdir())) <= TRIES + 1
        missing.unlink()
        grid.make([piece("start/a", write, log, "text")])
    assert text(run, "start/a") == "text of start/a"


# --- which piece comes next -------------------------------------------------------------------------------------------


def unit(number, model):
    return Share(piece(f"s/{number}", write, model=model), (f"s/{number}",))


def queue_of(*models):
    queue = Queue()
    for number, model in enumerate(models):
        queue.add(unit(number, model))
    return queue


def taken(queue, worker, alone=False):
    """The stages that a worker takes until nothing is left for it."""
    found = []
    while one := queue.take(worker, alone):
        worker.model = one.task.model
        found += [int(name.split("/")[1]) for name in one.names]
    return found


def test_a_worker_stays_with_its_model_then_takes_that_of_most_pieces():
    queue = queue_of("a", "b", "c", "b", "a", "b", "a", "a")
    assert len(queue) == 8
    assert taken(queue, ActorHandle(None, "b")) == [1, 3, 5, 0, 4, 6, 7, 2]
    assert len(queue) == 0


def test_a_worker_without_a_piece_of_its_model_takes_from_the_longest_queue():
    queue = queue_of("a", "b", "c", "b")
    assert queue.take(ActorHandle(None, "none"), False).task.model == "b"


def test_what_failed_on_a_worker_goes_to_another_one():
    queue, worker, other = queue_of("a", "a"), ActorHandle(None, "a"), ActorHandle(None, "b")
    first = queue.take(worker, False)
    (again,) = first.retries("a cause", worker)
    queue.add(again)
    assert taken(queue, worker) == [1]
    assert len(queue) == 1
    assert taken(queue, other) == [0]


def test_a_worker_that_is_alone_takes_what_failed_on_it():
    queue, worker = queue_of("a"), ActorHandle(None, "a")
    queue.add(*queue.take(worker, True).retries("a cause", worker))
    assert taken(queue, worker) == []
    assert taken(queue, worker, alone=True) == [0]


def test_a_unit_is_tried_whole_then_each_stage_then_no_more():
    worker = ActorHandle(None)
    whole = Share(piece("s/a s/b", write), ("s/a", "s/b"))
    for number in range(TRIES - 1):
        assert whole.retries(f"cause {number}", worker) == [whole]
    parts = whole.retries("the last", worker)
    assert [part.names for part in parts] == [("s/a",), ("s/b",)]
    for number in range(TRIES - 1):
        assert parts[0].retries(f"cause {number}", worker) == [parts[0]]
    assert parts[0].retries("the last", worker) == []
    assert parts[1].causes == []
