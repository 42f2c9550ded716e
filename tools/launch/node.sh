#!/usr/bin/env bash
# One machine's part of a run on several: start the same line on each of them.
#
#   HEAD=node-0 NODES=4 tools/launch/node.sh run.yaml           # four machines, all of their GPUs
#   HEAD=node-0 NODES=2:4 RESTARTS=3 tools/launch/node.sh run.yaml   # goes on with two of them at least
#
# HEAD      name or address of one of the machines (every machine must reach it)
# NODES     how many there are; N:M lets the run go on with fewer
# PROCESSES processes per machine; left out, one per GPU (torchrun's `gpu`); `cpu`: one per core
# RESTARTS  how often the run starts again after a process or machine was lost; each time it goes on
#           from the newest complete checkpoint (checkpoint.resume: latest, the default)
# PATIENCE  seconds that processes get for their last checkpoint after a SIGTERM or Ctrl-C
# PORT, JOB port and id of the rendezvous; two runs that share a head must differ in one of them
set -euo pipefail
run=${1:?usage: HEAD=host NODES=n tools/launch/node.sh RUN.yaml}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# Not `uv run torchrun`: a signal to the whole group would reach torchrun twice, by uv too, and the
# second one makes it leave its processes alone while they save.
exec "$(uv run which torchrun)" \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
  --rdzv-id "${JOB:-distill}" \
  --max-restarts "${RESTARTS:-0}" \
  --shutdown-timeout "${PATIENCE:-600}" \
  apps/train --config "$run" "$@"
