#!/bin/bash
# Trains on several machines of a Slurm cluster, and requeues itself until the run has finished:
#
#   sbatch --nodes 4 --time 12:00:00 docs/launch/slurm.sh imagenet256_b data.source=shards data.path=/data/shards/train
#
# Arguments after the script go to `unite-fast train`. All machines need the same virtual environment (VENV) and the
# same run folder (RUN, on a shared file system). Each start first checks the machines for about a minute, unless
# CHECK=0.
#SBATCH --job-name=unite-fast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
# If a machine fails, Slurm ends the job and starts this script again, on others. So do not add --no-kill.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=unite-fast-%j.log
# Five minutes before the time limit, every process of the job's step gets SIGUSR1: save and end.
#SBATCH --signal=USR1@300
# shellcheck disable=SC2329  # the functions are called on the other machines, which get their text
set -euo pipefail

VENV=${VENV:-$HOME/unite-fast}
RUN=${RUN:-$PWD/runs/$(basename "${1:?which recipe?}" .yaml)}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-gpu}}

# The words before each machine's command. Hundreds of GPUs should not import from a shared file system: that is 2,700
# file opens a GPU (docs/multi-node.md). Set VENV_TAR to unpack the environment on each machine, or use a container and
# set VENV to the environment in it:
#   pyxis:     INSIDE=(--container-image=/shared/unite-fast.sqsh "--container-mounts=/shared:/shared,/data:/data")
#   Apptainer: INSIDE=(apptainer exec --nv --bind /shared,/data /shared/unite-fast.sif)
INSIDE=()

# NCCL and gloo choose their network interfaces themselves, gloo the one that leads to the first process. If NCCL
# chooses badly, name it; `ip address` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The first machine holds torchrun's meeting place; this script runs there too, so it cannot outlive it.
HEAD=${HOSTS[0]} SECOND=${HOSTS[1]:-}
# Ports of its own for each job, below those that Linux gives to outgoing connections; the check uses the second.
PORT=$((20000 + SLURM_JOB_ID % 6000 * 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Seconds until torchrun kills processes that are still saving (torch 2.12 and later; before, always 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
# Otherwise torchrun keeps the address of the first round's store, also when that machine was replaced
# (next_rendezvous in torch 2.13; https://github.com/pytorch/pytorch/pull/182375 mends another case of it).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The address at which this machine reaches the machine $1; nothing is sent.
address_towards() {
    "$PYTHON" -c '
import socket, sys
family, kind, _, _, address = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind) as probe:
    probe.connect(address)
    print(probe.getsockname()[0])' "$1"
}

# On every machine: torchrun, with the port $1, restarts $2, the command $3 of unite_fast, and its arguments.
launch() {
    local port=$1 restarts=$2 is_host=$((SLURM_NODEID == 0)) address=$SLURMD_NODENAME
    shift 2
    # The limits are the login shell's. Every process holds a few sockets to every other, and RDMA needs locked memory.
    # No core dumps: each would be as large as a process with its GPU's memory.
    ulimit -n "$(ulimit -Hn)" || true
    ulimit -l "$(ulimit -Hl)" || true
    ulimit -c 0
    # To itself, a machine's name may be 127.0.1.1 (Debian). So say who is the head, which torchrun would guess from
    # names (https://github.com/pytorch/pytorch/issues/73656), and give the others an address, not a name.
    if [[ $is_host == 0 ]]; then
        address=$(address_towards "$HEAD") || address=$SLURMD_NODENAME
    elif [[ -n $SECOND ]]; then
        address=$(address_towards "$SECOND") || address=$SLURMD_NODENAME
    fi
    # A fixed number of machines is the default and what is tested. A job that may go on with fewer (--nnodes 3:4)
    # changes how many images each GPU takes, and waits for more machines before each start. read_timeout: how long the
    # others wait for the head, whose imports may be slow. join_timeout: longer than Slurm takes to notice that a
    # machine vanished (SlurmdTimeout, by default 300), so that Slurm requeues the job.
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS_PER_NODE" --local-addr "$address" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$HEAD:$port" \
        --rdzv-conf "is_host=$is_host,read_timeout=300,join_timeout=900" \
        --max-restarts "$restarts" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        -m unite_fast "$@"
}

# Runs a function of this script on every machine. Since 22.05, srun does not take --cpus-per-task from sbatch
# (https://slurm.schedmd.com/sbatch.html#OPT_cpus-per-task). When one torchrun ends, the others have five minutes to
# save.
on_every_machine() {
    srun --export=ALL --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
        --kill-on-bad-exit=0 --wait=300 \
        "${INSIDE[@]}" bash -c "$(declare -f address_towards launch unpack); \"\$@\"" bash "$@"
}

unpack() {
    mkdir -p "$VENV" && tar -xf "$1" -C "$VENV"
}

# What this job left in RUN/status; empty if the file is an earlier job's. Network file systems may show an old one
# first.
outcome() {
    local line="" end=$((SECONDS + ${STATUS_SECONDS:-60}))
    while true; do
        if [[ $(written) != "$before" ]]; then
            line=$(cat "$RUN/status" 2>/dev/null) || true
        fi
        case $line in finished* | stopped* | failed*) break ;; esac
        ((SECONDS < end)) || break
        sleep 1
    done
    echo "$line"
}

# Inode and time of RUN/status, which is always replaced, never changed.
written() {
    stat -c '%i %y' "$RUN/status" 2>/dev/null || true
}

if [[ -n ${VENV_TAR:-} ]]; then
    # Made by `tar -cf unite-fast.tar -C VENV .`. Every machine needs the same Python; many clusters empty TMPDIR
    # later.
    VENV=${TMPDIR:-/tmp}/unite-fast-$SLURM_JOB_ID
fi
PYTHON=$VENV/bin/python
export VENV RUN GPUS_PER_NODE HEAD SECOND PYTHON

# scancel and preemption send SIGTERM to this script too. It must live until the processes have saved, and then leave
# the job to Slurm, which requeues a preempted one itself.
ended_by_slurm=0
trap 'ended_by_slurm=1' TERM

ended=0
if [[ -n ${VENV_TAR:-} ]]; then
    on_every_machine unpack "$VENV_TAR"
fi
if [[ ${CHECK:-1} != 0 ]]; then
    on_every_machine launch $((PORT + 1)) 0 check-cluster "$@" "train.out=$RUN" || ended=$?
    if [[ $ended != 0 ]]; then
        echo "the check of the machines failed, so training was not started; CHECK=0 leaves the check out" >&2
        exit "$ended"
    fi
fi

before=$(written)
on_every_machine launch "$PORT" 20 train "$@" "train.out=$RUN" --resume || ended=$?
[[ $ended_by_slurm == 0 ]] || exit "$ended"

# Stopped: saved, so go on. Failed: a mistake that the same command would make again. Otherwise go on only if Slurm has
# lost one of the machines (a star is "not responding") or takes it out of use.
case $(outcome) in
finished* | failed*) ;;
stopped*) scontrol requeue "$SLURM_JOB_ID" ;;
*)
    if [[ $ended != 0 ]] && sinfo -h -N -n "$SLURM_JOB_NODELIST" -o %T | grep -qE '\*|down|drain|fail'; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$ended"
