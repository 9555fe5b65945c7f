"""A Ray cluster of three hosts on one machine: each has a network, processes and shared memory of its own.

Two hosts that work stand at the head's switch. The link of one of them is cut while it has a piece in hand, for longer
than Ray takes to give the host up, and restored. Ray's own processes on that host end themselves when they hear of it;
as on a cluster, they are then started again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from misdirection.files import TEMPORARY

pytest.importorskip("ray", reason="workers need the extra `ray`")

PIECES = 40
IN_HAND = (10, 11)
WHILE_CUT = 20
LAST = range(30, PIECES)
ADDRESS = "10.0.0.1:6379"
# A host is given up when it has not answered three times in turn.
HEALTH = {"period_ms": 500, "timeout_ms": 2000, "failure_threshold": 3, "initial_delay_ms": 1000}
LARGE = 32_000_000
"""Bytes that take four seconds from host to host."""
SHAPE = ("tbf", "rate", "64mbit", "burst", "64k", "latency", "400ms")

# Whoever begins a piece says so on a disk that all hosts share, which the grid itself does without. The pieces that are
# to be in hand wait there for the cut, and the last ones for the link to be restored.
DRIVER = """
import json, socket, sys, threading, time
from functools import partial
from pathlib import Path

import ray

from misdirection.runs.tasks import Task
from misdirection.runs.worker import Models, Worker
from misdirection.runs.cluster import Workers, connect
from misdirection.runs.ray_workers import RayRunner
from misdirection.runs.folder import RunFolder

shared, address, pieces = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def make_place(working):
    return Worker(Models(None), working)

def compute(number, gate, size, place, folders):
    (folder,) = folders.values()
    with (shared / "begun").open("a") as begun:
        begun.write(f"{number} {socket.gethostname()}\\n")
    while gate and not (shared / gate).exists():
        time.sleep(0.05)
    (folder / "out.txt").write_text(str(number).zfill(size))

def tell_hosts():
    while not done.wait(0.2):
        (shared / "hosts").write_text(str(sum(node["Alive"] for node in ray.nodes())))

def piece(number, gate, size):
    return Task({f"piece/{number}": {"number": number}}, "base", partial(compute, number, gate, size))

done = threading.Event()
with RunFolder.open(shared / "run", "x") as run, connect(Workers(count=2, address=address)) as cluster:
    telling = threading.Thread(target=tell_hosts)
    telling.start()
    try:
        with RayRunner(run, make_place, cluster) as grid:
            grid.make([piece(*each) for each in pieces])
    finally:
        done.set()
        telling.join()
"""


def require(call):
    """Change a network; skip the test where this system cannot."""
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this system's network cannot do `{' '.join(call)}`: {done.stderr.strip()}")


class Host:
    """Namespaces that end with this process: the first process in them waits for it, and all others end with that."""

    def __init__(self, name):
        script = f"""
            echo {name} > /proc/sys/kernel/hostname && mount -t tmpfs tmpfs /dev/shm && ip link set lo up &&
            echo up && exec cat
        """
        call = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
        pipe = subprocess.PIPE
        self.name = name
        self.outer = subprocess.Popen(call, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        said = self.outer.stdout.readline()
        if said != "up\n":
            self.end()
            pytest.skip(f"this system gives no namespaces: {said.strip()}")
        self.pid = int(Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text())

    def call(self, *words):
        """The command that runs a command on this host."""
        return ["nsenter", "--all", "--target", str(self.pid), *words]

    def link(self, command):
        """Have `ip` or `tc` do something on this host."""
        require(self.call(*command.split()))

    def received(self, link):
        """Bytes that came in over a link."""
        lines = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.strip().startswith(f"{link}:"))

    def end(self):
        self.outer.stdin.close()
        self.outer.wait(30)
        self.outer.stdout.close()


class Cluster:
    """The head, where the driver runs, and the hosts `one` and `two`."""

    def __init__(self, shared):
        self.shared = shared
        self.hosts = []
        self.processes = []
        self.log = (shared / "log").open("w")

    def start(self):
        self.hosts.append(Host("head"))
        head = self.hosts[0]
        # An address by which a host finds its own.
        route = "ip route add default dev"
        for command in ("link add switch type bridge", "addr add 10.0.0.1/24 dev switch", "link set switch up"):
            head.link(f"ip {command}")
        head.link(f"{route} switch")
        self.ray(head, "--head --num-cpus=0 --include-dashboard=false --port=6379 --node-ip-address=10.0.0.1").wait(60)
        for number, name in ((2, "one"), (3, "two")):
            self.hosts.append(Host(name))
            host = self.hosts[-1]
            # Not by `link`: the head has no number for another host's processes.
            ends = f"ip link add {name} type veth peer name eth0 netns {host.pid}"
            require(["nsenter", "--net", "--target", str(head.pid), *ends.split()])
            head.link(f"ip link set {name} master switch up")
            host.link(f"ip addr add 10.0.0.{number}/24 dev eth0")
            host.link("ip link set eth0 up")
            host.link(f"{route} eth0")
            host.link(f"tc qdisc add dev eth0 root {' '.join(SHAPE)}")
            self.ray(host, f"--block --address={ADDRESS} --num-cpus=1 --node-ip-address=10.0.0.{number}", again=True)

    def ray(self, host, options, again=False):
        """Start Ray on a host; `again` and again when it ends, as a cluster's manager does."""
        ray = Path(sys.executable).with_name("ray")
        call = f"{ray} start --temp-dir=/dev/shm/ray --object-store-memory=100000000 --disable-usage-stats {options}"
        return self.run(host, "sh", "-c", f"while true; do {call}; sleep 1; done" if again else call)

    def run(self, host, *words):
        health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
        # What a host leaves is left in its own memory; and nobody else is in its network.
        own = {"TMPDIR": "/dev/shm", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(host.call(*words), env=os.environ | health | own, stdout=self.log, stderr=self.log)
        self.processes.append(process)
        return process

    def end(self):
        for host in self.hosts:
            host.end()
        for process in self.processes:
            process.wait(30)
        self.log.close()


@pytest.fixture
def cluster(tmp_path):
    if os.geteuid():
        pytest.skip("only root can give a host a network of its own")
    if missing := [name for name in ("unshare", "nsenter", "ip", "tc") if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)}: not installed; they come with util-linux and iproute2")
    made = Cluster(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.end()


class Driver:
    """The process that has the run, and what is heard of it."""

    def __init__(self, cluster, pieces):
        self.shared = cluster.shared
        (self.shared / "begun").touch()
        words = (sys.executable, "-c", DRIVER, str(self.shared), ADDRESS, json.dumps(pieces))
        self.process = cluster.run(cluster.hosts[0], *words)

    @property
    def begun(self):
        """Number and host of every piece that was begun."""
        lines = (self.shared / "begun").read_text().splitlines()
        return [(int(number), host) for number, host in (line.split() for line in lines)]

    def hosts_of(self, numbers):
        return {host for number, host in self.begun if number in numbers}

    def one_is_given_up(self):
        told = (self.shared / "hosts").read_text()
        return told and int(told) < 3

    def until(self, happened):
        """Wait for something while the driver is at work."""
        ends = time.monotonic() + 90
        while not happened():
            assert self.process.poll() is None and time.monotonic() < ends, (self.shared / "log").read_text()[-5000:]
            time.sleep(0.05)

    def open(self, gate):
        """Let those pieces go on that wait for it."""
        (self.shared / gate).touch()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("moment", ["computed", "sent"])
def test_a_host_that_cannot_be_reached_loses_its_piece_alone_and_works_again_when_it_is_back(cluster, moment):
    """The piece in hand is being computed, or its files are on their way."""
    gates = dict.fromkeys(IN_HAND, "cut") | dict.fromkeys(LAST, "restored")
    sizes = dict.fromkeys(IN_HAND, LARGE) if moment == "sent" else {}
    driver = Driver(cluster, [(number, gates.get(number), sizes.get(number, 10)) for number in range(PIECES)])
    head = cluster.hosts[0]
    driver.until(lambda: driver.hosts_of(IN_HAND) == {"one", "two"})
    lost = next(number for number, host in driver.begun if number in IN_HAND and host == "two")

    if moment == "sent":
        before = head.received("two")
        driver.open("cut")
        driver.until(lambda: head.received("two") > before + LARGE * 2 / 3)
    head.link("ip link set two down")
    driver.open("cut")
    driver.until(driver.one_is_given_up)
    driver.until(lambda: driver.hosts_of({WHILE_CUT}) == {"one"})
    head.link("ip link set two up")
    driver.until(lambda: "two" in driver.hosts_of(LAST))
    driver.open("restored")

    assert driver.process.wait(60) == 0, (cluster.shared / "log").read_text()[-5000:]
    run = cluster.shared / "run"
    made = {path.parent.name: path.read_text() for path in (run / "artifacts").glob("piece/*/*")}
    texts = {str(number): str(number).zfill(sizes.get(number, 10)) for number in range(PIECES)}
    assert made.keys() == texts.keys()
    assert not [name for name, text in texts.items() if made[name] != text]
    stages = [json.loads(line)["stage"] for line in (run / "manifest.jsonl").read_text().splitlines()]
    assert sorted(stages) == sorted(f"piece/{number}" for number in range(PIECES))
    assert not list(run.rglob(f"{TEMPORARY}*"))
    assert [number for number, _ in driver.begun].count(lost) > 1
