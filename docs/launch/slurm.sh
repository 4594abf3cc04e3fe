#!/bin/bash
# Trains on several machines of a Slurm cluster, without containers, and requeues itself until the run has finished:
#
#   sbatch --nodes 4 --time 12:00:00 docs/launch/slurm.sh imagenet256_b data.source=shards data.path=/data/shards/train
#
# Arguments after the script go to `unite-fast train`. All machines need the same virtual environment (VENV) and the same
# run folder (RUN, on a shared file system).
#SBATCH --job-name=unite-fast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=unite-fast-%j.log
# Five minutes before the time limit, every process of the job's step gets SIGUSR1: save and end.
#SBATCH --signal=USR1@300
set -euo pipefail

VENV=${VENV:-$HOME/unite-fast}
RUN=${RUN:-$PWD/runs/$(basename "${1:?which recipe?}" .yaml)}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of its own for each job, so that two jobs can share a machine.
PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Seconds until torchrun kills processes that are still saving (torch 2.12 and later; before, always 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270

# torchrun forwards SIGUSR1 to its processes, which have nearly the whole five minutes to save.
launch() {
    exec "$VENV/bin/torchrun" \
        --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS_PER_NODE" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$HEAD:$PORT" \
        --max-restarts 20 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        -m unite_fast train "$@" "train.out=$RUN" --resume
}
export -f launch
export VENV RUN GPUS_PER_NODE HEAD PORT

# Remove the status of an earlier job: one that fails before it trains must not look like one that was stopped.
rm -f "$RUN/status"
ended=0
srun --kill-on-bad-exit=0 --wait=120 bash -c 'launch "$@"' launch "$@" || ended=$?

# The run was stopped and has saved; see docs/multi-node.md.
if [[ -f $RUN/status && $(<"$RUN/status") == stopped* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$ended"
