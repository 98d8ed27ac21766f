#!/bin/bash
# Trains on GPU nodes of a Slurm cluster: sbatch launch/slurm.sh [CONFIG] [--training.steps N ...]
# Replace the sizes. The environment variable WORKDIR sets the workdir; without it, it is that of `mot train` below the
# directory of sbatch, which must then be on a shared file system. With IMAGE, the tasks run in a container, by enroot and
# pyxis. launch/README.md explains both, and the flags.
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

config=configs/v2.py:medium_32e
case ${1:-} in
  -*) ;;
  *) config=${1:-$config} && shift || true ;;
esac
most_restarts=${MOST_RESTARTS:-100}

export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_all_reduce_combine_threshold_bytes=134217728 \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 ${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

container=()
if [ -n "${IMAGE:-}" ]; then
  mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}"
  case "${WORKDIR:-}" in /*) # checkpoints written to a directory that is not mounted would be lost
    mkdir -p "$WORKDIR" && mounts="$mounts,$WORKDIR:$WORKDIR" ;;
  esac
  container=("--container-image=$IMAGE" "--container-mounts=$mounts" "--container-workdir=$PWD")
fi

# When a task is lost the others end on their own; a task that still runs two minutes after the first has ended is stuck.
# srun exits with the highest code of all tasks. If one exits with 2 (bad input), the others lose it and exit with 75 or
# 134, so 200 is added to small codes, which must not restart the run. The trap makes a task's shell wait for the
# checkpoint.
# shellcheck disable=SC2016
task='trap : TERM; "$@"; code=$?; if [ $code -gt 0 ] && [ $code -lt 50 ]; then exit $((200 + code)); fi; exit $code'
# Slurm 22.05 to 23.02 does not pass --cpus-per-task of sbatch on to srun.
srun --kill-on-bad-exit=0 --wait=120 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${container[@]}" \
  bash -c "$task" task mot train "$config" ${WORKDIR:+--workdir "$WORKDIR"} "$@"
code=$?
if [ $code -gt 200 ]; then code=$((code - 200)); fi

case $code in # docs/run-directory.md has the table of exit codes
  0) echo "finished" ;;
  75 | 134 | 135 | 137 | 139 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_restarts" ]; then
      echo "ended with code $code: restarting from the last checkpoint"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "ended with code $code after $most_restarts restarts: given up"
    fi
    ;;
  *) echo "ended with code $code: not restarted" ;;
esac
exit $code
