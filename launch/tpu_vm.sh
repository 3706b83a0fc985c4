#!/usr/bin/env bash
# Trains on a TPU VM of one host (such as v5litepod-8 or v6e-8). If there is no
# VM of that name, the script creates it.
#
#   launch/tpu_vm.sh --project=P --zone=us-east5-a --name=calm \
#     --accelerator-type=v6e-8 --workdir=gs://my-bucket/kv --spot --delete \
#     -- --config=configs/kv.py:paper
#
# After preemption the script creates it again, and the run goes on. The trainer
# does not depend on the script: started again, the script follows the run.
#
#   --project= --zone= --name= --accelerator-type=   as gcloud calls them
#   --workdir=       gs://BUCKET/FOLDER, or a folder that outlives the VM
#   --runtime-version=v2-alpha-tpuv6e
#   --ref=COMMIT     a commit of this checkout (default: HEAD), or ==VERSION
#   --spot           cheaper, and may be preempted
#   --delete         delete the VM at the end, after a failure or Ctrl-C too
#   --create-flags=  further flags of `tpu-vm create`, with spaces between
#   --ssh-flags=     further flags of `tpu-vm ssh`, such as --tunnel-through-iap
#   --retries=20     how often to go on after preemption or a lost connection
#   --backoff=10     seconds before the first retry; doubles five times
#   --poll=30        seconds between two looks at the state of the VM
#   --wait=3600      seconds to wait for a VM that is not ready
#   --dry-run        print every command and run none
set -euo pipefail
declare -A opt=([project]="" [zone]="" [name]="" [accelerator-type]=""
  [workdir]="" [runtime-version]=v2-alpha-tpuv6e [ref]="" [spot]=no [delete]=no
  [create-flags]="" [ssh-flags]="" [retries]=20 [backoff]=10 [poll]=30
  [wait]=3600 [dry-run]=no)
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
parse "$@"
begin_tpu
assumed=""

state() { vm_state "$assumed"; }
create() {
  tpus tpu-vm create "${opt[name]}" \
    --accelerator-type="${opt[accelerator-type]}" \
    --version="${opt[runtime-version]}" "${create_flags[@]}"
  assumed=READY
}
delete() { tpus tpu-vm delete "${opt[name]}"; }

train_on_tpu
