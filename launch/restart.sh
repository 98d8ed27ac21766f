#!/bin/bash
# Runs a command, and again when it ends, unless it has finished (0), its input is bad (2) or we are told to stop:
#   launch/restart.sh mot train configs/demo.py
# Gives up after MOST_FAILURES (5) runs in a row that were shorter than SHORT (600) seconds: longer than they wait for
# each other, so that hosts do not wait for ever for one whose input was bad.

set -uo pipefail

most=${MOST_FAILURES:-5} short=${SHORT:-600} wait_s=${WAIT:-10}
failures=0 stopped=false child=

stop() { # passed on to the command, which saves a checkpoint
  stopped=true
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

while true; do
  start=$SECONDS
  "$@" &
  child=$!
  if $stopped; then stop; fi # told just before
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # the wait ended by our signal, not by the command's end
    wait "$child"
    code=$?
  done
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || $stopped; then
    exit "$code"
  fi
  if [ $((SECONDS - start)) -lt "$short" ]; then failures=$((failures + 1)); else failures=0; fi
  if [ "$failures" -ge "$most" ]; then
    echo "ended with $code, the run number $failures in a row that was shorter than $short s: given up" >&2
    exit "$code"
  fi
  echo "ended with $code: starting again from the last checkpoint in $wait_s s" >&2
  for ((i = 0; i < wait_s; i++)); do
    sleep 1
    if $stopped; then # heard of after the sleep
      exit "$code"
    fi
  done
done
