#!/usr/bin/env bash
# Trains on this machine, and goes on after what a run can go on from.
#
#   launch/local.sh -- --config=configs/kv.py --config.mesh.fsdp=-1
#
# SIGTERM and Ctrl-C are passed on: the trainer saves, and this script ends with
# its exit code.
#
#   --python=PATH    default: .venv of the checkout, else python3
#   --retries=20     how often to go on, after a hung step or a lost process
#   --backoff=10     seconds before the first of them; doubles five times
#   --dry-run        print every command, and run none
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
  # Told to stop while it waited to go on.
  [[ $stopped == no ]] || return 143
  # Not `run`, whose process the signals would end in the trainer's stead.
  "${command[@]}" &
  child=$!
  while true; do
    code=0 interrupted=no
    wait "$child" || code=$?
    # A signal ends `wait`, not the trainer.
    [[ $interrupted == yes ]] || return "$code"
  done
}
again() { [[ $stopped == no ]] && can_resume "$1"; }

retrying train
