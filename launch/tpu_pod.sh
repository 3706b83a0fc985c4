#!/usr/bin/env bash
# Trains on a TPU slice of any number of hosts. If there is no slice of that
# name, the script queues for one.
#
#   launch/tpu_pod.sh --project=P --zone=us-east5-a --name=calm \
#     --accelerator-type=v6e-256 --workdir=gs://my-bucket/kv --spot --delete \
#     -- --config=configs/kv.py:paper
#
# After preemption the script queues again, and the run goes on. The trainer
# does not depend on the script: started again, the script follows the run.
#
#   --project= --zone= --name= --accelerator-type=   as gcloud calls them
#   --workdir=       gs://BUCKET/FOLDER, or a folder that all hosts share
#   --runtime-version=v2-alpha-tpuv6e
#   --ref=COMMIT     a commit of this checkout (default: HEAD), or ==VERSION
#   --spot           cheaper, and may be preempted
#   --delete         delete the slice at the end, after a failure or Ctrl-C too
#   --create-flags=  further flags of `queued-resources create`, such as
#                    "--reserved --network=NAME"
#   --ssh-flags=     further flags of `tpu-vm ssh`, such as --tunnel-through-iap
#   --retries=20     how often to go on after preemption or a lost connection
#   --backoff=10     seconds before the first retry; doubles five times
#   --poll=30        seconds between two looks at the state of the slice
#   --wait=86400     seconds to wait in the queue
#   --dry-run        print every command and run none
set -euo pipefail
declare -A opt=([project]="" [zone]="" [name]="" [accelerator-type]=""
  [workdir]="" [runtime-version]=v2-alpha-tpuv6e [ref]="" [spot]=no [delete]=no
  [create-flags]="" [ssh-flags]="" [retries]=20 [backoff]=10 [poll]=30
  [wait]=86400 [dry-run]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
begin_tpu
trainer+=(--config.distributed)
assumed=""

state() {
  local now
  now=$(ask "$assumed" gcloud compute tpus queued-resources list "${place[@]}" \
    --filter="name~/queuedResources/${opt[name]}\$" \
    --format="value(state.state)") || return
  case $now in
    "") echo absent ;;
    # The request may outlive the slice by minutes; then the slice is gone.
    ACTIVE) now=$(vm_state READY) && echo "${now/absent/gone}" ;;
    SUSPENDED) echo gone ;;
    FAILED) echo "$now" ;;
    *) echo waiting ;;
  esac
}
create() {
  tpus queued-resources create "${opt[name]}" --node-id="${opt[name]}" \
    --accelerator-type="${opt[accelerator-type]}" \
    --runtime-version="${opt[runtime-version]}" "${create_flags[@]}"
  assumed=ACTIVE
}
# --force deletes the slice together with the request.
delete() { tpus queued-resources delete "${opt[name]}" --force; }

train_on_tpu
