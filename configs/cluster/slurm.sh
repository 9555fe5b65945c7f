#!/usr/bin/env bash
# One run over the nodes of a Slurm allocation:   sbatch configs/cluster/slurm.sh CONFIG [options of `misdirection run`]
# Submit it from an environment with `misdirection[ray]`, in a folder that all nodes share. Submit it again to go on:
# the run continues from its folder. The environment goes along with the job, so export HF_TOKEN first, and HF_HOME on
# the shared file system so that one download of a model serves all nodes.
#SBATCH --job-name=misdirection
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# One Ray to a node, and the node to ourselves: `ray stop` ends every Ray of the user there.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# After a preemption or the failure of a node Slurm queues the job again, and its log goes on in the same file.
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
: "${1:?the configuration of a run}"

# Whoever reaches Ray's ports runs code as you, so the Ray of this job asks for a secret of this job.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
RAY_TMPDIR=/tmp/misdirection-$SLURM_JOB_ID  # /tmp/ray may be another user's.
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_TMPDIR

# This script runs on the first node, which becomes Ray's head. /etc/hosts may give it a loopback address: skip that.
ip=$(hostname --ip-address | tr ' ' '\n' | grep -m 1 -v -E '^127\.|:') || ip=$(hostname --all-ip-addresses)
ip=${ip%% *}
port=$((20000 + SLURM_JOB_ID % 10000))  # Not 6379, which may be a Redis.

# Not `ray symmetric-run`: in 2.60 it exits with 0 where Ray cannot start, and the other nodes end a minute late.
node() {  # Ray on one node, until the standard input ends.
    trap 'ray stop --force --grace-period 1 >/dev/null 2>&1; rm -rf "$RAY_TMPDIR"' EXIT
    mkdir -p "$RAY_TMPDIR"
    export TMPDIR=$RAY_TMPDIR  # What workers leave goes with it.
    # Ray would take all CPUs and GPUs that it sees, Slurm's or not.
    set -- "$1" "$2" --num-cpus "$SLURM_CPUS_ON_NODE" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats
    if ((SLURM_NODEID == 0)); then
        ray start --head --node-ip-address "$1" --port "$2" "${@:3}" </dev/null && touch "$RAY_TMPDIR/started"
    else
        timeout 300 bash -c "until (: </dev/tcp/$1/$2) 2>/dev/null; do sleep 1; done" &&
            ray start --address "$1:$2" "${@:3}" </dev/null
    fi && cat
}
export -f node
rm -rf "$RAY_TMPDIR"  # Of this job before Slurm queued it again.
# `srun` hands its input on to all nodes, so they end as soon as this script, however it ends, closes the pipe.
exec 3> >(srun --cpu-bind=none --kill-on-bad-exit bash -c "node $ip $port")
trap 'exec 3>&-; wait' EXIT
until [[ -e $RAY_TMPDIR/started ]]; do
    sleep 1
    kill -0 $!  # Ends this script where Ray could not start.
done
# A run counts the GPUs as it starts, so wait for all nodes.
timeout --kill-after=10 300 python - "$ip:$port" "$SLURM_JOB_NUM_NODES" <<'END'
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(1)
END
misdirection run "$@" --ray "$ip:$port"
