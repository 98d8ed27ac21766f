#!/bin/bash
# Trains on GPU nodes of a Slurm cluster: sbatch launch/slurm.sh [CONFIG] [--training.steps N ...]
# Replace the words in capitals and the sizes. launch/README.md explains the flags.
#SBATCH --job-name=mot
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# One task per GPU, since JAX assigns one device to a Slurm task. 120 s before the time limit, Slurm sends SIGTERM to the
# tasks, not to this script; each then saves a checkpoint and exits with 143.

set -uo pipefail

config=${1:-configs/v2.py:medium_32e}
shift || true
name=$(basename "${config/.py:/_}" .py) # configs/v2.py:medium_32e -> v2_medium_32e
workdir=${WORKDIR:-/SHARED/runs/$name}
most_restarts=${MOST_RESTARTS:-100}

export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_all_reduce_combine_threshold_bytes=134217728 \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 ${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# When a task is lost the others end on their own; a task that still runs two minutes after the first has ended is stuck.
# srun exits with the highest code of all tasks. If one exits with 2 (bad input) or 3 (diverged), the others lose it and
# exit with a higher code, so these are mapped to 255 and 254, the highest. The trap makes a task's shell wait for the
# checkpoint.
# shellcheck disable=SC2016
task='trap : TERM; "$@"; code=$?; case $code in 2 | 3) exit $((257 - code)) ;; esac; exit $code'
srun --kill-on-bad-exit=0 --wait=120 bash -c "$task" task mot train "$config" --workdir "$workdir" "$@"
code=$?

case $code in
  0) echo "finished" ;;
  255)
    code=2
    echo "bad input or a full disk: not restarted"
    ;;
  254)
    code=3
    echo "has diverged: not restarted"
    ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_restarts" ]; then
      echo "ended with code $code: restarting from the last checkpoint"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "ended with code $code after $most_restarts restarts: given up"
    fi
    ;;
esac
exit $code
