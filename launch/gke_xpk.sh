#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster made by xpk, and follows the log.
#
#   launch/gke_xpk.sh --project=P --zone=us-east5-a --cluster=C --name=calm \
#     --tpu-type=v6e-16 --storage=runs --workdir=/runs/kv \
#     -- --config=configs/kv.py:paper
#
# The cluster starts the workload again after preemption, and the run goes on.
# This script may be stopped; started again, it follows the run, or starts one
# that has ended anew.
#
#   --project= --zone= --cluster= --tpu-type=   as xpk calls them
#   --name=          of the workload
#   --workdir=       a folder that all hosts share, under the mount point of:
#   --storage=       what `xpk storage attach` or `create` has named
#   --ref=COMMIT     of this checkout, or ==VERSION of a release; default: HEAD
#   --image=python:3.12-slim     on which the package is installed
#   --create-flags=  further flags of `xpk workload create`, such as --spot
#   --delete         delete the workload at the end, after a failure too
#   --retries=20     how often the cluster starts it again
#   --grace=120      seconds to save in, between SIGTERM and SIGKILL
#   --poll=30        seconds between two looks at a state
#   --dry-run        print every command, and run none
set -euo pipefail
declare -A opt=([project]="" [zone]="" [cluster]="" [tpu-type]="" [name]=""
  [workdir]="" [storage]="" [ref]="" [image]=python:3.12-slim [create-flags]=""
  [delete]=no [retries]=20 [grace]=120 [poll]=30 [dry-run]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
require project zone cluster tpu-type name workdir storage
[[ ${opt[workdir]} == /* ]] ||
  wrong "--workdir=${opt[workdir]}: a folder under the mount point of --storage"
for_all "${opt[workdir]}"
within "${opt[grace]}"
trainer+=(--config.distributed)
need xpk "pip install xpk"
need kubectl "gcloud components install kubectl"
need gcloud "see https://cloud.google.com/sdk/docs/install"
pin tpu

place=(--project="${opt[project]}" --zone="${opt[zone]}"
  --cluster="${opt[cluster]}")
pods=(--selector=xpk.google.com/workload="${opt[name]}")
read -ra create_flags <<<"${opt[create-flags]}"

# Nothing if there is no such workload, else its name and how it ended.
state() {
  ask "$1" kubectl get jobsets "${opt[name]}" --ignore-not-found \
    --output=jsonpath="{.metadata.name} {.status.terminalState}"
}
delete() {
  run xpk workload delete --workload="${opt[name]}" "${place[@]}" --force
}

# xpk lays this folder over the image, and works in it.
sources() {
  folder="$root/build/xpk-$pinned"
  run mkdir -p "$folder" || return
  [[ -z $archive ]] || {
    make_archive && run tar -xzf "$archive" -C "$folder"
  }
}

create() {
  # xpk's SIGTERM reaches the text's last process, which is the trainer then.
  local text
  text="pip install uv==$uv && $(install_text) && $(at_text)"
  text+=" && exec $(train_text tpu)"
  sources
  run xpk workload create --workload="${opt[name]}" "${place[@]}" \
    --tpu-type="${opt[tpu-type]}" --storage="${opt[storage]}" \
    --base-docker-image="${opt[image]}" --script-dir="$folder" \
    --max-restarts="${opt[retries]}" \
    --restart-on-exit-codes="$(IFS=,; echo "${resumable[*]}")" \
    --termination-grace-period-seconds="${opt[grace]}" "${create_flags[@]}" \
    --command="$text"
}

# Shows the log, of every start, until the cluster gives the workload up.
follow() {
  local now since=()
  while true; do
    run kubectl wait --for=condition=Ready pod "${pods[@]}" --timeout=60s ||
      true
    run kubectl logs --follow --prefix --all-containers \
      --max-log-requests=1024 "${pods[@]}" "${since[@]}" || true
    since=(--since-time="$(date -u +%FT%TZ)")
    now=$(state "${opt[name]} Completed")
    case $now in
      *" Completed") return 0 ;;
      *" Failed")
        say "failed; kubectl describe jobset ${opt[name]} says why"
        return 1
        ;;
      "") say "error: ${opt[name]} has been deleted"; return 1 ;;
    esac
    pause "${opt[poll]}"
  done
}

run gcloud container clusters get-credentials "${opt[cluster]}" \
  --project="${opt[project]}" --location="${opt[zone]%-*}"
now=$(state "")
if [[ $now == *[a-z] ]]; then
  say "${opt[name]} has ended before; it is started anew"
  delete
  now=""
fi
[[ ${opt[delete]} == no ]] || trap 'delete || say "DELETE IT YOURSELF"' EXIT
[[ -n $now ]] || create
follow
