"""Runs programs that a model wrote, apart from the machine.

Each program gets a process of its own that sees an empty folder (/tmp, in
memory), the standard library of Python, and nothing else: no other file, no
environment, no network, no other process. It cannot start processes, and its
time, memory, threads, files and output are limited. The walls are Linux
namespaces, a filter of system calls and resource limits; an ordinary user can
build them, and root gives up being root. Where one cannot be built, nothing is
run. They do not hold against a hole in the kernel.

A program passes only when its tests have run to their end: the process is then
given a secret that it sends back. The tests run in the program's interpreter,
so this is proof against programs that are wrong, leave early or hide their
errors, not against one that sets out to cheat.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError

PASSED = "passed"
FAILED = "failed"
TIMED_OUT = "timed out"
OUT_OF_MEMORY = "out of memory"
TOO_MUCH_OUTPUT = "too much output"
KILLED = "killed"
NOT_RUN = "did not run the tests"

CHILD = Path(__file__).with_name("child.py")
SYSCALLS = Path(__file__).with_name("syscalls.txt")
# The kernel's number of the machine, and of its calls `clone` and `pivot_root`.
MACHINES = {
  "x86_64": {"machine": 0xC000003E, "clone": 56, "pivot_root": 155},
  "aarch64": {"machine": 0xC00000B7, "clone": 220, "pivot_root": 41},
}
VISIBLE = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
VISIBLE += ["/usr/share/zoneinfo", "/dev/null", "/dev/urandom"]
# The kernel and the interpreter need a while around the program's own time.
GRACE_SECONDS = 30.0
OUTPUT_TAIL = 2000


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one program and its tests, all threads and files together.

  `memory_bytes` is address space, the interpreter's included; files, of
  `disk_bytes`, are in memory too.
  """

  wall_seconds: float = 10.0
  cpu_seconds: int = 10
  memory_bytes: int = 2**30
  disk_bytes: int = 2**24
  output_bytes: int = 2**20
  threads: int = 32


@dataclasses.dataclass(frozen=True)
class ProgramWithTests:
  """Source code, and the tests that are run after it in its names."""

  code: str
  tests: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The end of a program."""

  name: str  # one of the constants of this module, such as PASSED
  detail: str  # the exception's last line and its test, or the signal
  output: str  # the end of what it printed
  seconds: float  # that it ran

  @property
  def passed(self) -> bool:
    return self.name == PASSED


def require(allow_code_execution: bool) -> None:
  """Raises InputError unless programs may be run, and the sandbox works."""
  if not allow_code_execution:
    raise InputError(
      "this evaluation runs programs that a model wrote: allow it with "
      "--allow_code_execution: they run in a sandbox"
    )
  verdict = _run_one(ProgramWithTests("", "assert True"), Limits())
  if not verdict.passed:
    raise InputError(f"the sandbox does not work here: {verdict}")


def run(
  programs: Sequence[ProgramWithTests],
  *,
  allow_code_execution: bool,
  limits: Limits | None = None,
  workers: int | None = None,
) -> list[Verdict]:
  """Runs programs with tests, `workers` at a time, and judges each.

  Args:
    allow_code_execution: the user's word that programs of a model may be run.
    workers: by default one for each CPU.

  Raises:
    InputError: not allowed; a program without tests; or this machine cannot
      sandbox, and then nothing was run.
    RuntimeError: the sandbox itself failed.
  """
  require(allow_code_execution)
  for i, program in enumerate(programs):
    if not program.tests.strip():
      raise InputError(f"program {i} has no tests: it could only pass")
  limits = limits or Limits()
  workers = workers or len(os.sched_getaffinity(0))
  with ThreadPoolExecutor(workers) as pool:
    return list(pool.map(lambda program: _run_one(program, limits), programs))


def _run_one(program: ProgramWithTests, limits: Limits) -> Verdict:
  setup = _job(program, limits)
  start = time.monotonic()
  token = secrets.token_hex(32).encode()
  report, its_report = os.pipe()
  # A fixed hash seed: sets of strings are in the same order in every run.
  process = subprocess.Popen(
    [sys.executable, "-SsPB", str(CHILD), str(its_report)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    pass_fds=[its_report],
    env={"PYTHONHASHSEED": "0"},
    cwd="/",
    start_new_session=True,
    bufsize=0,
  )
  os.close(its_report)
  assert process.stdin and process.stdout and process.stderr  # They are pipes.
  with process, open(report, "rb", buffering=0) as report_file:
    try:
      # A child that ended before it read its job has said why.
      with contextlib.suppress(BrokenPipeError):
        job = memoryview(len(setup).to_bytes(8, "little") + setup + token)
        while job:
          job = job[process.stdin.write(job) :]
        process.stdin.close()
      most = {process.stdout: limits.output_bytes}
      most |= {process.stderr: 2**16, report_file: 2**12}
      seconds = limits.wall_seconds + GRACE_SECONDS
      output, status, report_text, over = _read(most, seconds)
    finally:
      # Its death is that of all processes in the sandbox.
      process.kill()
  tail = output.decode(errors="replace")[-OUTPUT_TAIL:]
  if over:
    return Verdict(over, "", tail, time.monotonic() - start)
  return _judge(status, report_text, token, tail, limits)


def _job(program: ProgramWithTests, limits: Limits) -> bytes:
  machine = os.uname().machine if sys.platform == "linux" else sys.platform
  if machine not in MACHINES:
    raise InputError(_cannot(f"it is for Linux on {'/'.join(MACHINES)} only"))
  column = 1 + list(MACHINES).index(machine)
  rows = [
    line.split()
    for line in SYSCALLS.read_text(encoding="ascii").splitlines()
    if not line.startswith("#")
  ]
  library = str(Path(os.__file__).parents[1])
  job: dict[str, Any] = MACHINES[machine] | dataclasses.asdict(limits)
  job |= {"program": program.code, "tests": program.tests}
  job["syscalls"] = [int(row[column]) for row in rows if row[column] != "-"]
  job["visible"] = {
    path: os.path.realpath(path)
    for path in dict.fromkeys([*VISIBLE, library])
    if os.path.exists(path)
  }
  return json.dumps(job).encode()


def _read(most: dict, seconds: float) -> tuple[bytes, bytes, bytes, str]:
  """Reads files, each of `most` bytes, and names the limit passed, if any."""
  deadline = time.monotonic() + seconds
  data = {file: bytearray() for file in most}
  over = ""
  with selectors.DefaultSelector() as selector:
    for file in most:
      selector.register(file, selectors.EVENT_READ)
    while selector.get_map() and not over:
      for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
        chunk = os.read(key.fd, 2**16)
        data[key.fileobj] += chunk
        if not chunk:
          selector.unregister(key.fileobj)
        elif len(data[key.fileobj]) > most[key.fileobj]:
          over = TOO_MUCH_OUTPUT
      if time.monotonic() > deadline:
        over = TIMED_OUT
  output, status, report = (bytes(part) for part in data.values())
  return output, status, report, over


def _judge(
  status: bytes, report: bytes, token: bytes, output: str, limits: Limits
) -> Verdict:
  if not status:
    return Verdict(KILLED, "with its sandbox", output, 0.0)
  try:
    end = json.loads(status.splitlines()[0])
  except ValueError as error:
    raise RuntimeError(
      f"the sandbox failed: {status.decode(errors='replace')}"
    ) from error
  if "lacks" in end:
    raise InputError(_cannot(end["lacks"]))
  code, seconds = end["status"], end["seconds"]
  kinds = {b"f": FAILED, b"m": OUT_OF_MEMORY, b"x": NOT_RUN}
  name, detail = kinds.get(report[:1]), report[1:].decode(errors="replace")
  if code is None:
    name, detail = TIMED_OUT, ""
  elif code == 0 and secrets.compare_digest(report, token):
    name, detail = PASSED, ""
  elif os.WIFSIGNALED(code):
    number = os.WTERMSIG(code)
    name, detail = KILLED, signal.strsignal(number) or f"signal {number}"
    late = end["cpu_seconds"] >= limits.cpu_seconds
    if late or number == signal.SIGXCPU:
      name, detail = TIMED_OUT, "CPU time"
  elif name is None:
    code = os.waitstatus_to_exitcode(code)
    name, detail = NOT_RUN, f"ended with exit code {code}"
  return Verdict(name, detail, output, seconds)


def _cannot(why: str) -> str:
  return (
    f"generated code cannot be run here, as it cannot be sandboxed: {why}. It "
    "needs Linux 5.12 or later, namespaces and seccomp: as an ordinary user "
    "where user namespaces are allowed (sysctl user.max_user_namespaces above "
    "0, kernel.unprivileged_userns_clone not 0, "
    "kernel.apparmor_restrict_unprivileged_userns not 1), or as root; in a "
    "container only where it may make namespaces. Without, evaluate elsewhere: "
    "the predictions are kept"
  )
