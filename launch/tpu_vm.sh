#!/bin/bash
# Trains on all hosts of a TPU VM slice: launch/tpu_vm.sh NAME ZONE CONFIG WORKDIR [--training.steps N ...]
# Requires this repository in ~/mot_jax on every host, with pip install -c requirements.lock '.[tpu,gcs]', and mot on the
# PATH of a shell without login; else set MOT, as in MOT=.venv/bin/mot for ~/mot_jax/.venv. Each host logs to ~/mot.log.
# The command can be repeated: it does nothing on a host where it runs already. launch/README.md explains the flags.

set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: $0 NAME ZONE CONFIG WORKDIR [--group.field VALUE ...]" >&2
  exit 2
fi
for argument in "$1" "$2" "$3" "$4"; do
  case $argument in
    NAME | ZONE | CONFIG | WORKDIR | *FILE.py* | *:VARIANT | *://BUCKET*)
      echo "error: $argument: replace the word in capitals by a value of yours, as in $0 pod us-east5-a" \
        "configs/v2.py:base_32e gs://my-bucket/run" >&2
      exit 2
      ;;
  esac
done
name=$1 zone=$2
shift 2

flags="--xla_enable_async_all_gather=true \
--xla_tpu_enable_async_all_to_all=true \
--xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true \
--xla_tpu_overlap_compute_collective_tc=true"

config=$1 workdir=$2
shift 2
command=$(printf '%q ' launch/restart.sh "${MOT:-mot}" train "$config" --workdir "$workdir" "$@")
# All streams of the background shell are redirected: ssh returns when nothing holds its own any more.
start="{ cd ~/mot_jax && export LIBTPU_INIT_ARGS='$flags' && (flock -n 9 || exit 0; nohup $command </dev/null); } \
9>~/mot.lock >>~/mot.log 2>&1 </dev/null &"

gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$start"
echo "started; to follow the log: gcloud compute tpus tpu-vm ssh $name --zone=$zone --worker=0 --command='tail -f mot.log'"
