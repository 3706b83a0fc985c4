#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster made by xpk, and follows the log.
#
#   launch/gke_xpk.sh --project=P --zone=us-east5-a --cluster=C --name=calm \
#     --tpu-type=v6e-16 --storage=runs --workdir=/runs/kv \
#     -- --config=configs/kv.py:paper
#
# The cluster starts the workload again after preemption, and the run goes on.
# You may stop this script: started again, it follows the run, or starts it once
# more if it has ended.
#
#   --project= --zone= --cluster= --tpu-type=   as xpk calls them
#   --name=          the name of the workload
#   --workdir=       a folder that all hosts share, under the mount point of:
#   --storage=       the name given to `xpk storage attach` or `create`
#   --ref=COMMIT     a commit of this checkout (default: HEAD), or ==VERSION
#   --image=python:3.12-slim     the image to install the package on
#   --create-flags=  further flags of `xpk workload create`, such as --spot
#   --delete         delete the workload at the end, after a failure too
#   --retries=20     how often the cluster starts it again
#   --grace=120      seconds to save in, between SIGTERM and SIGKILL
#   --poll=30        seconds between two looks at the state of the workload
#   --dry-run        print every command and run none
set -euo pipefail
declare -A opt=([project]="" [zone]="" [cluster]="" [tpu-type]="" [name]=""
  [workdir]="" [storage]="" [ref]="" [image]=python:3.12-slim [create-flags]=""
  [delete]=no [retries]=20 [grace]=120 [poll]=30 [dry-run]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
require project zone cluster tpu-type name workdir storage
[[ ${opt[workdir]} == /* ]] ||
  wrong "--workdir=${opt[workdir]} must lie under the mount point of --storage"
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

# state ASSUMED: empty if there is no such workload, else its name and how it
# ended.
state() {
  ask "$1" kubectl get jobsets "${opt[name]}" --ignore-not-found \
    --output=jsonpath="{.metadata.name} {.status.terminalState}"
}
delete() {
  run xpk workload delete --workload="${opt[name]}" "${place[@]}" --force
}

# Makes the folder that xpk adds to the image and runs the workload in.
sources() {
  folder="$root/build/xpk-$pinned"
  run mkdir -p "$folder" || return
  [[ -z $archive ]] || {
    make_archive && run tar -xzf "$archive" -C "$folder"
  }
}

create() {
  # SIGTERM reaches the last process of the text; exec makes it the trainer.
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

# Shows the log of every start, until the workload completes or fails for good.
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
        say "failed; see why: kubectl describe jobset ${opt[name]}"
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
  say "${opt[name]} has ended before; it is started again"
  delete
  now=""
fi
[[ ${opt[delete]} == no ]] || trap 'delete || say "DELETE IT YOURSELF"' EXIT
[[ -n $now ]] || create
follow
