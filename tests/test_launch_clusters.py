"""launch/ on GKE and Slurm, against stand-ins; see stand_ins.py."""

from __future__ import annotations

import shutil

import pytest
from stand_ins import GKE, JOBSETS, SLURM, TRAIN


def test_gke_follows_what_is_there_and_starts_anew_what_has_ended(place):
  place.play(JOBSETS + "calm ", JOBSETS + "calm ", JOBSETS + "calm Completed")
  done = place.launch("gke_xpk.sh", *GKE, *TRAIN)
  assert done.returncode == 0 and place.calls(of="xpk") == []
  first, second = [c for c in place.calls(of="kubectl") if c[0] == "logs"]
  assert "--follow" in first and second[:-1] == first
  assert second[-1].startswith("--since-time=20")

  place.play(JOBSETS + "calm Failed", JOBSETS + "calm Completed")
  done = place.launch("gke_xpk.sh", *GKE, *TRAIN)
  assert done.returncode == 0
  assert [c[:2] for c in place.calls(of="xpk")] == [
    ["workload", "delete"],
    ["workload", "create"],
  ]


def test_gke_failure_is_told_and_deleted(place):
  place.play(JOBSETS, JOBSETS + "calm Failed")
  done = place.launch("gke_xpk.sh", *GKE, "--delete", "--retries=3", *TRAIN)
  assert done.returncode == 1 and "describe jobset calm" in done.stderr
  create, delete = place.calls(of="xpk")
  assert any(" --config.grace=115.0 " in word for word in create)
  assert {
    "--max-restarts=3",
    "--restart-on-exit-codes=75,76,77,134,137,143",
  } < set(create)
  where = ["--project=P", "--zone=us-z1-a", "--cluster=C"]
  assert delete == ["workload", "delete", "--workload=calm", *where, "--force"]


@pytest.mark.parametrize(
  "code, restarts, requeued",
  [(75, "", True), (76, "19", True), (75, "20", False), (2, "", False)],
)
def test_slurm_queues_again(place, code, restarts, requeued):
  place.play()
  assert place.launch("slurm_gpu.sbatch", *SLURM, *TRAIN).returncode == 0
  (submitted,) = place.calls(of="sbatch")
  assert submitted[:3] == [
    "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8"
  ]  # fmt: skip
  script, *arguments = submitted[3:]
  spooled = place.folder / "spool" / "slurm_script"
  spooled.parent.mkdir()
  shutil.copy(script, spooled)
  place.play(f"srun*\t{code}\t")
  env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": f"{place.folder}/checkout"}
  env |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
  done = place.run(str(spooled), *arguments, **env)
  assert done.returncode == code, done.stderr
  (srun,) = place.calls(of="srun")
  assert srun[:3] == ["--kill-on-bad-exit=0", "--wait=600", "bash"]
  assert " --config.grace=295.0 " in srun[-1]
  again = [["requeue", "7"]] if requeued else []
  assert place.calls(of="scontrol") == again
