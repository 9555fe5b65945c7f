"""The files in configs/cluster, by the programs that read them."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY_YAML = ROOT / "configs" / "cluster" / "ray.yaml"
SLURM = ROOT / "configs" / "cluster" / "slurm.sh"


def call(*words, **options):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False, **options)


def needs(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


# --- ray up -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
    return yaml.safe_load(RAY_YAML.read_text())


def prepared(cluster):
    """The file as `ray up` completes and checks it before it asks the cloud."""
    util = pytest.importorskip("ray.autoscaler._private.util", reason="needs the extra `ray`")
    full = util.prepare_config(cluster)
    util.validate_config(full)
    return full


def test_ray_accepts_the_file(cluster):
    full = prepared(cluster)
    assert full["available_node_types"]["head"]["max_workers"] == 0
    assert full["available_node_types"]["gpu"]["min_workers"] >= 1
    # None of those that Ray has for its own image are left.
    assert not [one for one in full["worker_setup_commands"] + full["head_setup_commands"] if one.startswith("pip")]


def test_ray_refuses_a_misspelt_key(cluster):
    cluster["max_worker"] = cluster.pop("max_workers")
    with pytest.raises(Exception, match="'max_worker' was unexpected"):
        prepared(cluster)


def test_ray_refuses_a_misspelt_key_of_a_node_type(cluster):
    gpu = cluster["available_node_types"]["gpu"]
    gpu["min_worker"] = gpu.pop("min_workers")
    with pytest.raises(Exception, match="'min_worker' was unexpected"):
        prepared(cluster)


def test_ray_refuses_more_machines_than_the_most(cluster):
    cluster["available_node_types"]["gpu"]["min_workers"] = cluster["max_workers"] + 1
    with pytest.raises(ValueError, match="max_workers"):
        prepared(cluster)


def test_all_that_ray_sends_is_in_a_checkout(cluster):
    sent = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert {"src", "pyproject.toml", "README.md", "constraints.txt"} <= set(sent)
    assert [path for path in sent if not (ROOT / path).exists()] == []


def test_only_a_run_needs_gpus(cluster):
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


# --- Slurm ------------------------------------------------------------------------------------------------------------

CALLED = 'printf "%s " "$0" "$@" >>"$CALLS"; echo >>"$CALLS"\n'
"""A stub's first line: it notes what it was called with."""


@pytest.fixture
def stubs(tmp_path):
    """A folder of programs in place of those that the script starts, and the environment that has it first."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, body, interpreter="#!/bin/bash"):
        (folder / name).write_text(f"{interpreter}\n{body}")
        (folder / name).chmod(0o755)

    for name in ("ray", "python"):
        add(name, CALLED)
    add("misdirection", CALLED + 'exit "${STATUS:-0}"\n')
    add.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    return add


def calls(tmp_path):
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line.strip().removeprefix(f"{tmp_path}/bin/") for line in lines]


def run_as_one_node(stubs, tmp_path, **environment):
    """The script as Slurm starts it, in an allocation of this machine alone, with a stub of srun."""
    # Tasks of a killed srun do not outlive it either.
    stubs("srun", 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 exec "$@"\n')
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "2"}
    environment = {**stubs.environment, **job, "SLURM_GPUS_ON_NODE": "3", **environment}
    return call("bash", SLURM, "run.yaml", "--out", "a b", env=environment, cwd=tmp_path)


def test_bash_parses_the_script(tmp_path):
    assert call("bash", "-n", SLURM).stderr == ""
    broken = tmp_path / "broken.sh"
    broken.write_text(SLURM.read_text().replace("\ndone\n", "\n", 1))
    assert call("bash", "-n", broken).returncode != 0


def test_shellcheck_finds_nothing(tmp_path):
    needs("shellcheck")
    assert call("shellcheck", SLURM).stdout == ""
    loose = tmp_path / "loose.sh"
    loose.write_text(SLURM.read_text().replace('misdirection run "$@"', "misdirection run $@"))
    assert "SC2068" in call("shellcheck", loose).stdout


@pytest.mark.parametrize("status", [0, 3])
def test_the_script_ends_as_the_run_ends_and_clears_up(stubs, tmp_path, status):
    ended = run_as_one_node(stubs, tmp_path, STATUS=str(status))
    assert ended.returncode == status, ended.stderr
    start, wait, run, stop = calls(tmp_path)
    assert start.startswith("ray start --head --node-ip-address ")
    assert "--num-cpus 2 --num-gpus 3" in start
    address = run.rsplit(" ", 1)[1]
    assert run == f"misdirection run run.yaml --out a b --ray {address}"
    assert wait == f"python - {address} 1"
    assert not address.startswith("127.")
    assert stop.startswith("ray stop")
    assert not Path(f"/tmp/misdirection-{os.getpid()}").exists()


def test_the_script_starts_no_run_where_ray_does_not_start(stubs, tmp_path):
    stubs("ray", CALLED + "[[ $1 != start ]]\n")
    ended = run_as_one_node(stubs, tmp_path)
    assert ended.returncode != 0
    assert [line.split()[:2] for line in calls(tmp_path)] == [["ray", "start"], ["ray", "stop"]]


def test_the_script_gives_every_job_a_secret_of_its_own(stubs, tmp_path):
    stubs("ray", 'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >>"$CALLS"\n')
    ended = [run_as_one_node(stubs, tmp_path) for _ in range(2)]
    first, second = {line for line in calls(tmp_path) if line.startswith("token ")}
    for secret in (first.split()[1], second.split()[1]):
        assert len(secret) == 64
        assert all(secret not in one.stdout + one.stderr for one in ended)


@pytest.fixture
def slurm():
    """What picks this machine in a running Slurm."""
    needs("sbatch")
    there = call("sinfo", "--noheader", "--Node", "--format", "%N").stdout.split()
    name = socket.gethostname().split(".")[0]
    if name not in there:
        pytest.skip("this machine is no node of a running Slurm")
    return "--nodes=1", f"--nodelist={name}", "--gpus-per-node=0"


def test_slurm_would_take_the_script(slurm):
    taken = call("sbatch", "--test-only", *slurm, SLURM, "run.yaml")
    assert taken.returncode == 0, taken.stderr
    assert call("sbatch", "--test-only", *slurm, "--ntasks-per-node=x", SLURM, "run.yaml").returncode != 0


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_runs_the_script(slurm, stubs, tmp_path, status):
    environment = {**stubs.environment, "STATUS": str(status)}
    ended = call("sbatch", "--wait", *slurm, SLURM, "run.yaml", "--out", "a b", env=environment, cwd=tmp_path)
    log = "".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert ended.returncode == status, log
    assert [line.split()[:2] for line in calls(tmp_path)] == [
        ["ray", "start"], ["python", "-"], ["misdirection", "run"], ["ray", "stop"]
    ]  # fmt: skip
