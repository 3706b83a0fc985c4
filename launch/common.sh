# Functions that all scripts of this folder source. See docs/launch.md.
# shellcheck shell=bash

if ((BASH_VERSINFO[0] < 5)); then
  echo "error: bash 5 or newer is needed; this is $BASH_VERSION" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The versions of uv, which installs the package, and of Python. Dependencies
# are the newest that there were when the commit was made: each machine of a run,
# and one that takes the place of another, has the same.
uv=0.13.9
python=3.12
# After these exit codes of the trainer, the same command goes on where it
# stopped. See docs/faults.md.
resumable=(75 76 77 134 137 143)
# `opt` holds the options of the script, `trainer` the arguments after --.
declare -A opt
trainer=()
# Where --dry-run prints commands, also from within $(...).
exec 3>&1

say() { echo "$(basename "$0"): $*" >&2; }

# wrong MESSAGE: ends the script because of wrong arguments.
wrong() {
  say "error: $*; see --help"
  exit 2
}

# quoted WORD...: the words on one line, quoted for a shell.
quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}

# run COMMAND...: runs a command; with --dry-run only prints it.
run() {
  if [[ ${opt[dry-run]} == yes ]]; then
    quoted "$@" >&3
  else
    "$@"
  fi
}

# ask ANSWER COMMAND...: the output of a command; with --dry-run prints the
# command and takes ANSWER for its output.
ask() {
  local answer=$1
  shift
  run "$@" && { [[ ${opt[dry-run]} == no ]] || echo "$answer"; }
}

pause() { [[ ${opt[dry-run]} == yes ]] || sleep "$1"; }

# Reads --name=value and --flag into `opt`, and the arguments after -- into
# `trainer`. `opt` must hold the default of every option: "no" for a flag.
parse() {
  local word name
  while (($#)); do
    word=$1 name=${1#--} name=${name%%=*}
    shift
    if [[ $word == --help ]]; then
      sed -n '/^#SBATCH/d; 2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit 0
    elif [[ $word == -- ]]; then
      trainer=("$@")
      break
    elif [[ ! $word =~ ^--[a-z-]+(=|$) || -z ${opt[$name]+known} ]]; then
      wrong "there is no option $word; put the trainer's arguments after --"
    elif [[ ${opt[$name]} == no || ${opt[$name]} == yes ]]; then
      [[ $word != *=* ]] || wrong "--$name takes no value"
      opt[$name]=yes
    else
      [[ $word == *=* ]] || wrong "--$name needs a value: --$name=VALUE"
      opt[$name]=${word#*=}
    fi
  done
  for name in retries backoff poll wait grace; do
    [[ ${opt[$name]:-0} =~ ^[0-9]+$ ]] ||
      wrong "--$name=${opt[$name]} must be a whole number"
  done
  [[ " ${trainer[*]}" == *" --config="* ]] ||
    wrong "give the trainer at least --config=FILE, after --"
}

# require NAME...: ends the script unless these options were given.
require() {
  local name
  for name; do
    [[ -n ${opt[$name]} ]] || wrong "--$name= is missing"
  done
}

# need COMMAND HOW: ends the script unless a program is installed; HOW says
# how to install it.
need() {
  [[ ${opt[dry-run]} == yes ]] || command -v "$1" >/dev/null || {
    say "error: there is no $1 on PATH: $2"
    exit 127
  }
}

# for_all FOLDER: gives the trainer its folder, and all devices unless the
# arguments name a mesh.
for_all() {
  local own=" ${trainer[*]}"
  [[ $own != *" --config.workdir"* ]] ||
    wrong "--config.workdir: give --workdir= to this script instead"
  trainer+=(--config.workdir="$1")
  [[ $own == *" --config.mesh."* ]] || trainer+=(--config.mesh.fsdp=-1)
}

# within SECONDS: tells the trainer how many seconds it has to save after
# SIGTERM, unless the arguments do.
within() {
  [[ " ${trainer[*]}" == *" --config.grace"* ]] ||
    trainer+=(--config.grace="$(($1 > 10 ? $1 - 5 : $1)).0")
}

# pin EXTRA: sets from --ref `pinned` (a short name), `archive` (the file with
# the source; empty for a release), `source` (the requirement that is installed,
# with EXTRA and what runs may need) and `made` (when; empty for a release).
pin() {
  local extra="$1,report,quant,sacrebleu" file
  if [[ ${opt[ref]} == ==* ]]; then
    pinned=${opt[ref]#==} archive="" made="" source="calm_jax[$extra]${opt[ref]}"
    return
  fi
  need git "install git, or give a release: --ref===VERSION"
  commit=$(git -C "$root" rev-parse --verify --quiet \
    "${opt[ref]:-HEAD}^{commit}") ||
    wrong "--ref=${opt[ref]} is not a commit of $root"
  pinned=${commit:0:12} source=".[$extra]"
  made=$(git -C "$root" show --no-patch --format=%cI "$commit")
  archive="$root/build/calm_jax-$pinned.tar.gz"
  for file in "${trainer[@]}"; do
    [[ $file == --config=* ]] || continue
    file=${file#--config=} file=${file%%:*}
    git -C "$root" cat-file -e "$commit:$file" 2>/dev/null ||
      wrong "--config=$file is not in commit $pinned; commit it, or give --ref="
  done
  [[ -n ${opt[ref]} || -z $(git -C "$root" status --porcelain -uno) ]] ||
    say "warning: runs commit $pinned, without changes that are not committed"
}

make_archive() {
  run mkdir -p "$root/build" &&
    run git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
}

# Shell text that installs `source` into .venv of the current folder.
install_text() {
  echo "uv venv --allow-existing --python $python .venv &&" \
    "uv pip install --python .venv/bin/python" \
    "${made:+--exclude-newer $made }$(quoted "$source")"
}

# Shell text that sets $at to the folder where install_text installed, and goes
# to the folder that holds configs/. A release puts it into share/ of .venv.
# shellcheck disable=SC2016 # Another shell expands it.
at_text() {
  if [[ -n $archive ]]; then
    echo 'at=$PWD'
  else
    echo 'at=$PWD && cd .venv/share/calm_jax'
  fi
}

# train_text PLATFORM: shell text that trains. It names the platform, so that a
# process that cannot use its devices fails instead of training on the CPU.
train_text() {
  echo "env JAX_PLATFORMS=$1,cpu \"\$at/.venv/bin/python\" -m calm_jax.train" \
    "$(quoted "${trainer[@]}")"
}

can_resume() { [[ " ${resumable[*]} " == *" $1 "* ]]; }

# retrying FUNCTION: runs a function again as long as it fails and `again CODE`
# is true, at most --retries times, with growing pauses.
retrying() {
  local tries=0 code seconds
  while true; do
    code=0
    "$@" || code=$?
    ((code)) || return 0
    if ! again "$code"; then
      say "ended with exit code $code; starting again would not help"
      return "$code"
    elif ((tries >= opt[retries])); then
      say "ended with exit code $code; gave up after $tries retries"
      return "$code"
    fi
    seconds=$((opt[backoff] << (tries < 5 ? tries : 5)))
    tries=$((tries + 1))
    say "ended with exit code $code;" \
      "retry $tries of ${opt[retries]} in $seconds s"
    sleep "$seconds"
  done
}

# The rest is for TPU VMs. The scripts that use it define `state`, `create` and
# `delete` for the machines that they rent.
tpus() { run gcloud compute tpus "$@" "${place[@]}"; }

begin_tpu() {
  require project zone name accelerator-type workdir
  [[ ${opt[name]} =~ ^[a-z][a-z0-9-]*$ ]] ||
    wrong "--name=${opt[name]}: lower-case letters, digits and hyphens"
  need gcloud "see https://cloud.google.com/sdk/docs/install"
  pin tpu
  place=(--project="${opt[project]}" --zone="${opt[zone]}" --quiet)
  read -ra create_flags <<<"${opt[create-flags]}"
  read -ra ssh_flags <<<"${opt[ssh-flags]}"
  [[ ${opt[spot]} == no ]] || create_flags+=(--spot)
  # Every worker mounts a bucket at the same folder.
  workdir=${opt[workdir]} bucket=""
  if [[ $workdir == gs://* ]]; then
    bucket=${workdir#gs://} bucket=${bucket%%/*}
    workdir=/mnt/$bucket${workdir#gs://"$bucket"}
    [[ $bucket =~ ^[a-z0-9._-]+$ ]] ||
      wrong "--workdir=$workdir does not name a bucket"
  fi
  for_all "$workdir"
  folder=calm_jax-$pinned
  # How often machines were created, and whether they were ever ready.
  created=0 met=no
}

# Waits until machines are ready; rents them if there are none.
ready() {
  local now waited=0
  while true; do
    now=$(state) || return
    case $now in
      ready)
        met=yes
        return 0
        ;;
      absent)
        ((++created <= opt[retries] + 1)) || {
          say "error: preempted $created times before it was ready"
          return 1
        }
        create || return
        ;;
      gone)
        say "${opt[name]} has been preempted; it is created again"
        delete || return
        ;;
      waiting)
        ((waited < opt[wait])) || {
          say "error: ${opt[name]} was not ready after $waited s (--wait)"
          return 1
        }
        pause "${opt[poll]}"
        waited=$((waited + opt[poll]))
        ;;
      *)
        say "error: ${opt[name]} is in state $now, which will not change"
        return 1
        ;;
    esac
  done
}

# vm_state ASSUMED: the state of a VM or slice, in the words that `ready` uses.
vm_state() {
  local now
  now=$(ask "$1" gcloud compute tpus tpu-vm list "${place[@]}" \
    --filter="name~/nodes/${opt[name]}\$" --format="value(state)") || return
  case $now in
    "") echo absent ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED) echo gone ;;
    CREATING | STARTING | RESTARTING | REPAIRING | DELETING) echo waiting ;;
    *) echo "$now" ;;
  esac
}

on_workers() {
  tpus tpu-vm ssh "${opt[name]}" --worker=all "${ssh_flags[@]}" --command="$1"
}

# Shell text that mounts a bucket as a folder. Nothing is cached, so that all
# workers see at once what one of them has written.
mount_text() {
  local list=/etc/apt/sources.list.d/gcsfuse.list
  local keys=/usr/share/keyrings/cloud.google.asc
  local repo=https://packages.cloud.google.com/apt
  echo "{ command -v gcsfuse || { curl -fsSL $repo/doc/apt-key.gpg |" \
    "sudo tee $keys >/dev/null && echo deb [signed-by=$keys] $repo" \
    "gcsfuse-\$(lsb_release -cs) main | sudo tee $list && sudo apt-get update" \
    "&& sudo apt-get install --yes gcsfuse; }; }" \
    "&& { mountpoint -q /mnt/$bucket || { sudo mkdir -p /mnt/$bucket &&" \
    "sudo chown \$USER /mnt/$bucket && gcsfuse --implicit-dirs" \
    "--rename-dir-limit=100000 --metadata-cache-ttl-secs=0" \
    "--metadata-cache-negative-ttl-secs=0 $bucket /mnt/$bucket; }; } && "
}

install() {
  local text="" unpack=""
  if [[ -n $archive ]]; then
    make_archive || return
    tpus tpu-vm scp "$archive" "${opt[name]}:$folder.tar.gz" --worker=all \
      "${ssh_flags[@]}" || return
    unpack="tar -xzf ../$folder.tar.gz && "
  fi
  [[ -z $bucket ]] || text=$(mount_text)
  text+="export PATH=~/.local/bin:\$PATH && { uv --version | grep -qwF $uv ||"
  text+=" curl -LsSf https://astral.sh/uv/$uv/install.sh | sh; }"
  text+=" && mkdir -p $folder && cd $folder && $unpack$(install_text)"
  on_workers "$text"
}

# Shell text that a worker runs. It starts the trainer independently of the ssh
# connection, or finds the trainer that an earlier connection started; shows its
# log; and ends with its exit code.
# shellcheck disable=SC2016
worker_text() {
  local keep='"$@" >~/calm_jax.log 2>&1; echo $? >~/calm_jax.exit'
  echo "cd $folder && $(at_text) && exec 9>~/calm_jax.lock &&" \
    'if flock -n 9; then rm -f ~/calm_jax.exit; : >~/calm_jax.log;' \
    "setsid bash -c '$keep' - $(train_text tpu) </dev/null >/dev/null 2>&1 &" \
    'echo $! >~/calm_jax.pid;' \
    'else echo "a run is under way here: this follows it"; fi; exec 9>&-;' \
    'tail -n +1 -f --pid="$(cat ~/calm_jax.pid)" ~/calm_jax.log;' \
    'exit "$(cat ~/calm_jax.exit || echo 137)"'
}

attempt() { ready && install && on_workers "$(worker_text)"; }

# again CODE: whether to start again: if a machine is no longer there, if the
# connection was lost (255), or if every worker ended with a resumable code. The
# codes of all workers are read, because one worker's own error ends the others
# with codes that look resumable.
again() {
  local now codes code
  [[ $1 != 2 ]] || return 1
  now=$(state) || { [[ $met == yes ]]; return; }
  [[ $now == ready ]] || return 0
  can_resume "$1" || [[ $1 == 255 ]] || return
  codes=$(on_workers "cat ~/calm_jax.exit") || return 0
  for code in $codes; do
    [[ ! $code =~ ^[1-9][0-9]*$ ]] || can_resume "$code" || {
      say "one worker ended with exit code $code"
      return 1
    }
  done
}

# Trains. With --delete, deletes the machines at the end, after a failure too.
train_on_tpu() {
  local code=0
  [[ ${opt[delete]} == no ]] || trap 'delete || say "DELETE IT YOURSELF"' EXIT
  retrying attempt || code=$?
  [[ ${opt[delete]} == yes ]] ||
    say "${opt[name]} goes on costing money: delete it, or give --delete"
  return "$code"
}
