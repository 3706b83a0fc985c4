#!/usr/bin/env bash
# Trains on this machine, and starts again after faults that a run can resume
# from.
#
#   launch/local.sh -- --config=configs/kv.py --config.mesh.fsdp=-1
#
# SIGTERM and Ctrl-C are passed on to the trainer, which saves; this script then
# ends with the trainer's exit code.
#
#   --python=PATH    default: .venv of the checkout, else python3
#   --retries=20     how often to start again after a hung step or lost process
#   --backoff=10     seconds before the first retry; doubles five times
#   --dry-run        print every command and run none
set -euo pipefail
declare -A opt=([python]="" [retries]=20 [backoff]=10 [dry-run]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"

if [[ -z ${opt[python]} ]]; then
  opt[python]=python3
  [[ ! -x $root/.venv/bin/python ]] || opt[python]=$root/.venv/bin/python
fi
need "${opt[python]}" "install Python 3.11 or newer, or give --python=PATH"

stopped=no interrupted=no child=""
stop() {
  stopped=yes interrupted=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

train() {
  local code command=("${opt[python]}" -m calm_jax.train "${trainer[@]}")
  if [[ ${opt[dry-run]} == yes ]]; then
    run "${command[@]}"
    return
  fi
  # A signal came during the pause before this retry.
  [[ $stopped == no ]] || return 143
  # Not through `run`: signals would end its process instead of the trainer.
  "${command[@]}" &
  child=$!
  while true; do
    code=0 interrupted=no
    wait "$child" || code=$?
    # A signal interrupts `wait` while the trainer still runs.
    [[ $interrupted == yes ]] || return "$code"
  done
}
again() { [[ $stopped == no ]] && can_resume "$1"; }

retrying train
