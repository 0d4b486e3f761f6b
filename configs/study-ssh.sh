#!/bin/bash
# A study on machines that are reached over ssh and share this folder's disk: one worker on each.
#
#   configs/study-ssh.sh "node1 node2 node3" recipes/study-healing-8b.yaml
#
# Each writes study-MACHINE.log here. Ctrl-C ends them all; the same command goes on where they stopped.
set -euo pipefail

machines=$1
shift
here=$(pwd)
arguments=$(printf ' %q' "$@")
# -tt: a worker ends with its connection.
for machine in $machines; do
    ssh -tt "$machine" "cd $(printf %q "$here") && accelerate launch --quiet --config_file configs/gpu.yaml \
train/run.py$arguments" > "study-$machine.log" 2>&1 < /dev/null &
done
trap 'kill $(jobs -p) 2>/dev/null' INT TERM
failed=0
for worker in $(jobs -p); do
    wait "$worker" || failed=1
done
exit $failed
