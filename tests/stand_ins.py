"""Stand-ins for the programs that launch/ calls: they record and play."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MADE = "2026-01-02T03:04:05+00:00"
# It writes its arguments down. The first line of PLAY that fits the call is
# what it does then, once; otherwise it succeeds and says nothing.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" >>"$CALLS"
printf '\036' >>"$CALLS"
number=0
while IFS=$'\t' read -r pattern code answer; do
  number=$((number + 1))
  [[ "${0##*/} $*" == $pattern ]] || continue
  sed -i "${number}d" "$PLAY"
  [[ -z $answer ]] || echo "$answer"
  exit "$code"
done <"$PLAY"
"""
TOOLS = (
  "bash", "env", "dirname", "basename", "sed", "cat", "mkdir", "date", "rm",
  "setsid", "tail", "flock", "touch",
)  # fmt: skip
STAND_INS = (
  "gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol", "ssh", "git", "uv",
  "tar", "sleep", "trainer",
)  # fmt: skip
# Arguments of the scripts.
TPU = [
  "--project=P", "--zone=us-z1-a", "--name=calm", "--accelerator-type=v6e-16",
  "--workdir=gs://bucket/kv",
]  # fmt: skip
GKE = [
  "--project=P", "--zone=us-z1-a", "--name=calm", "--tpu-type=v6e-16",
  "--cluster=C", "--storage=runs", "--workdir=/runs/kv",
]  # fmt: skip
SLURM = ["--workdir=/shared/kv", "--nodes=2"]
LOCAL = ["--python=trainer"]
TRAIN = ["--", "--config=configs/kv.py"]
# What gcloud answers while a slice, or a VM, is made and is then there.
QUEUE = "*queued-resources list*\t0\t"
VM = "*tpu-vm list*\t0\t"
POD_UP = [QUEUE, QUEUE + "ACTIVE", VM + "READY"]
VM_UP = [VM, VM + "READY"]
HERE = [QUEUE + "ACTIVE", VM + "READY"]
TRAINS = "*--command=*calm_jax.train*\t"
JOBSETS = "*get jobsets*\t0\t"


@dataclasses.dataclass
class Place:
  """A checkout with launch/ alone, and a PATH of stand-ins."""

  folder: Path

  def __post_init__(self):
    shutil.copytree(LAUNCH, self.folder / "checkout" / "launch")
    self.bin = self.folder / "bin"
    self.bin.mkdir()
    for name in TOOLS:
      (self.bin / name).symlink_to(shutil.which(name))
    for name in STAND_INS:
      self.stand_in(self.bin / name)
    self.env = {
      "PATH": str(self.bin),
      "HOME": str(self.folder),
      "USER": "me",
      "CALLS": str(self.folder / "calls"),
      "PLAY": str(self.folder / "play"),
    }

  def stand_in(self, path: Path, text: str = STAND_IN) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def play(self, *lines: str) -> None:
    """What stand-ins do from here on; forgets the calls so far."""
    commit = f"git*rev-parse*\t0\t{COMMIT}", f"git*show*\t0\t{MADE}"
    (self.folder / "calls").write_text("")
    (self.folder / "play").write_text(
      "".join(f"{x}\n" for x in [*commit, *lines])
    )

  def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ["bash", *command],
      env=self.env | env,
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=30,
    )

  def launch(self, name: str, *arguments: str, **env: str):
    """Runs a script; all that was played must have been needed."""
    done = self.run(
      str(self.folder / "checkout/launch" / name), *arguments, **env
    )
    rest = (self.folder / "play").read_text().splitlines()
    assert [x for x in rest if not x.startswith("git")] == [], done.stderr
    return done

  def calls(self, *, of: str = "", reads: bool = False) -> list[list[str]]:
    """All calls, without those that only look or wait; or those of one name."""
    text = (self.folder / "calls").read_text()
    found = [call.split("\0")[:-1] for call in text.split("\x1e")[:-1]]
    if of:
      return [call[1:] for call in found if call[0] == of]
    quiet = ("rev-parse", "cat-file", "status", "show")
    return [
      call
      for call in found
      if call[0] != "sleep" and (reads or not set(quiet) & set(call))
    ]


def verbs(calls: list[list[str]]) -> list[str]:
  """What each call of gcloud was for."""
  names = []
  for call in calls:
    if call[0] == "gcloud":
      (text,) = [x for x in call if x.startswith("--command=")] or [""]
      what = "codes" if "calm_jax.exit" in text else "install"
      what = "train" if "calm_jax.train" in text else what
      names.append(what if text else " ".join(call[3:5]))
  return names
