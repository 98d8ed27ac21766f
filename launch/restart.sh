#!/bin/bash
# Runs a command again while it ends with an exit code that a restart can remedy (docs/run-directory.md), until
# this script receives a signal to stop: launch/restart.sh mot train configs/demo.py
# Gives up after MOST_FAILURES (5) consecutive runs of less than SHORT (600) seconds. This is longer than processes wait
# for each other, so that hosts do not wait forever for one that is not restarted.

set -uo pipefail

most=${MOST_FAILURES:-5} short=${SHORT:-600} wait_s=${WAIT:-10}
failures=0 stopped=false child=

stop() { # forwards the signal to the command, which saves a checkpoint
  stopped=true
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

while true; do
  start=$SECONDS
  "$@" &
  child=$!
  if $stopped; then stop; fi # a signal arrived before child was set
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal interrupted the wait, and the command still runs
    wait "$child"
    code=$?
  done
  if $stopped; then exit "$code"; fi
  case $code in
    0) exit 0 ;;
    75 | 134 | 135 | 137 | 139 | 143) ;;
    *)
      echo "ended with code $code: not restarted" >&2
      exit "$code"
      ;;
  esac
  if [ $((SECONDS - start)) -lt "$short" ]; then failures=$((failures + 1)); else failures=0; fi
  if [ "$failures" -ge "$most" ]; then
    echo "ended with code $code, after $failures consecutive runs of less than $short s: given up" >&2
    exit "$code"
  fi
  echo "ended with code $code: restarting from the last checkpoint in $wait_s s" >&2
  for ((i = 0; i < wait_s; i++)); do
    sleep 1
    if $stopped; then # bash handles a signal after the sleep
      exit "$code"
    fi
  done
done
