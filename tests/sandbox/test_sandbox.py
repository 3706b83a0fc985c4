"""The sandbox: what programs try, and that it stays in there."""

from __future__ import annotations

import ast
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest
from attacks import ATTACKS, FOREVER, SYSCALLS

from calm_jax.core.errors import InputError
from calm_jax.sandbox import runner
from calm_jax.sandbox.runner import Limits, ProgramWithTests

ROOT = pathlib.Path(__file__).parents[2]
QUICK = Limits(wall_seconds=3.0, cpu_seconds=1)


def why_not() -> str:
  """Why this machine cannot sandbox; nothing where it can."""
  try:
    runner.require(True)
  except InputError as error:
    return str(error)
  return ""


WHY_NOT = why_not()
holds = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(autouse=True)
def outer_limits():
  """Should the sandbox not hold, this process still has its limits."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  before = resource.getrlimit(resource.RLIMIT_AS)
  most = pages * resource.getpagesize() + 4 * 2**30
  resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_AS, before)


def run(code: str, tests: str = "assert done", limits: Limits = QUICK):
  program = ProgramWithTests(code, tests)
  (verdict,) = runner.run(
    [program], allow_code_execution=True, limits=limits, workers=1
  )
  return verdict


@pytest.mark.skipif(not WHY_NOT, reason="this machine can sandbox")
def test_a_machine_that_cannot_sandbox_runs_nothing():
  assert "cannot be sandboxed" in WHY_NOT
  with pytest.raises(InputError, match="cannot be sandboxed"):
    run("", "assert True")


def test_nothing_runs_that_was_not_allowed():
  with pytest.raises(InputError, match="--allow_code_execution"):
    runner.run(
      [ProgramWithTests("", "assert True")], allow_code_execution=False
    )


def test_another_system_is_refused(monkeypatch):
  monkeypatch.setattr(runner.sys, "platform", "darwin")
  monkeypatch.setattr(runner.subprocess, "Popen", None)
  with pytest.raises(InputError, match="for Linux on x86_64/aarch64 only"):
    runner.require(True)


@holds
def test_a_program_without_tests_is_refused():
  with pytest.raises(InputError, match="no tests"):
    run("x = 1", " \n")


@holds
def test_a_broken_wall_stops_everything(monkeypatch, tmp_path):
  """A step that fails inside: no program, and the reason in the message."""
  child = tmp_path / "child.py"
  text = runner.CHILD.read_text()
  monkeypatch.setattr(runner, "CHILD", child)
  for step, broken in (
    ("NEWUSER = 0x6C020000, 0x10000000", "NEWUSER = -1, -1"),
    ('job["pivot_root"]', "-1"),
    ("  limit(job)\n", "  raise OSError('no limits')\n"),
    ('call("prctl", SECCOMP, FILTER_MODE', 'call("prctl", SECCOMP, 77'),
  ):
    assert text.count(step) == 1
    child.write_text(text.replace(step, broken))
    with pytest.raises((InputError, RuntimeError), match="sandbox"):
      runner.require(True)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
  """A secret file, a listening server, and this process."""
  secret = tmp_path_factory.mktemp("home") / "secret"
  secret.write_text("secret")
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(0.0)
    yield {
      "secret": secret, "parent": os.getpid(),
      "port": server.getsockname()[1], "server": server,
    }  # fmt: skip


def runs(pid: int) -> bool:
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


def descendants(pid: int) -> set[int]:
  found, parents = set(), {}
  for entry in pathlib.Path("/proc").iterdir():
    if entry.name.isdigit():
      try:
        stat = (entry / "stat").read_text()
      except OSError:
        continue  # It ended meanwhile.
      parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
  for child in parents:
    at = child
    while at := parents.get(at, 0):
      if at == pid:
        found.add(child)
  return found


@holds
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, outside):
  code, verdict, detail = ATTACKS[name]
  before = descendants(os.getpid())
  start = time.monotonic()
  got = run(code.format(**outside), "assert done")
  assert (got.name, detail in got.detail) == (verdict, True), got
  assert time.monotonic() - start < QUICK.wall_seconds + 10
  assert outside["secret"].read_text() == "secret"
  assert descendants(os.getpid()) == before
  with pytest.raises(BlockingIOError):
    outside["server"].accept()


@holds
@pytest.mark.parametrize("name", SYSCALLS)
def test_calls_past_python_fail(name, outside):
  code = (
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    f"got = {SYSCALLS[name]}\nprint(got, ctypes.get_errno())"
  )
  got = run(code.format(**outside), "assert got == -1")
  assert got.passed, got


@holds
def test_the_world_of_a_program(monkeypatch):
  """What it sees of the machine, the user and the environment."""
  monkeypatch.setenv("SECRET_KEY", "hunter2")
  got = run(
    "import os, sys, socket\n"
    f"home = {str(pathlib.Path.home())!r}\n"
    "print(os.listdir(home) if os.path.exists(home) else [])\n"
    "print(sorted(os.listdir('/')), os.getcwd(), os.listdir('.'))\n"
    "print(sorted(os.environ.items()), os.getpid(), os.getppid())\n"
    "print(sys.argv, sys.stdin.read(), socket.gethostname())\n"
    "print(os.getuid() == 0, os.geteuid() == 0, os.getgroups())",
    "assert os.getuid()",
    Limits(),
  )
  assert got.passed, got
  home, root, environment, process, user = got.output.splitlines()
  library = pathlib.Path(os.__file__).parents[1]
  assert all(name in library.parts for name in ast.literal_eval(home))
  names = set(root[: root.index("]")].strip("[").replace("'", "").split(", "))
  known = {"dev", "etc", "lib", "lib64", "tmp", "usr"}
  assert names <= known | {library.parts[1]}
  assert root.endswith("] /tmp []")
  assert environment.startswith("[('HOME', '/tmp')")
  assert environment.endswith("2 1") and "hunter2" not in got.output
  assert process == "['program']  sandbox"
  assert user.startswith("False False")


@holds
def test_threads_left_running_end_with_the_tests():
  before = descendants(os.getpid())
  got = run(FOREVER + "threading.Thread(target=forever).start()\ndone = True")
  assert got.passed and got.seconds < 1
  assert descendants(os.getpid()) == before


@holds
def test_ordinary_programs_run():
  """Files, threads, asyncio, imports, recursion, classes by name."""
  got = run(
    "from __future__ import annotations\n"
    "import asyncio, collections, dataclasses, decimal, pickle, re, shutil\n"
    "import tempfile, threading, json, sqlite3, typing\n"
    "@dataclasses.dataclass\nclass P:\n  x: typing.List[int]\n"
    "with tempfile.TemporaryDirectory() as d:\n"
    "  open(d + '/a', 'w').write('é')\n  shutil.copy2(d + '/a', d + '/b')\n"
    "  back = open(d + '/b').read()\n"
    "async def answer(): return 42\n"
    "out = []\nt = threading.Thread(target=out.append, args=(1,))\n"
    "t.start(); t.join()\nprint('naïve')",
    "assert back == 'é' and out == [1]\n"
    "assert asyncio.run(answer()) == 42\n"
    "assert pickle.loads(pickle.dumps(P([1]))) == P([1])\n",
    Limits(),
  )
  assert got.passed, got
  assert got.output == "naïve\n"


@holds
def test_the_verdict_names_the_test_that_failed():
  tests = "assert f(1) == 1\nassert f(2) == 2, 'two\\nfor two'\nassert f(3)"
  got = run("def f(x): return 1", tests)
  assert got.name == runner.FAILED
  assert got.detail == (
    "AssertionError: for two in: assert f(2) == 2, 'two\\nfor two'"
  )


@holds
def test_sets_are_in_the_same_order_in_every_run():
  code = "print(list({str(i) for i in range(50)}))\ndone = True"
  assert len({run(code).output for _ in range(3)}) == 1


@holds
def test_many_programs_keep_their_order_and_use_the_workers():
  codes = [f"import time; time.sleep(1); x = {i}" for i in range(8)]
  programs = [ProgramWithTests(code, f"assert x != {3}") for code in codes]
  start = time.monotonic()
  verdicts = runner.run(programs, allow_code_execution=True, workers=8)
  assert time.monotonic() - start < 6
  assert [v.passed for v in verdicts] == [i != 3 for i in range(8)]


DRIVER = """
import sys
from calm_jax.sandbox import runner
programs = [
  ("import os; print(os.listdir('/'))", "assert os.getuid() != 0"),
  ("", "open(%r)"),
  ("import os; os.fork()", "assert True"),
]
programs = [runner.ProgramWithTests(*texts) for texts in programs]
for verdict in runner.run(programs, allow_code_execution=True):
  print(verdict.name, verdict.detail[:40], sep=": ")
"""


def paths() -> dict[str, str]:
  """The environment of a process that imports this package."""
  others = filter(None, [os.environ.get("PYTHONPATH")])
  return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *others])}


def as_another(*command: str) -> subprocess.CompletedProcess:
  """Runs the driver below `unshare`, which makes us another user."""
  if not shutil.which("unshare"):
    pytest.skip("no `unshare` here, to be another user with")
  script = DRIVER % str(ROOT / "setup.cfg")
  return subprocess.run(
    ["unshare", *command, sys.executable, "-c", script],
    env=paths(), capture_output=True, text=True,
  )  # fmt: skip


@holds
@pytest.mark.parametrize(
  "user",
  [["--map-user=1000", "--map-group=1000"], ["--map-root-user"]],
  ids=["user", "root"],
)
def test_an_ordinary_user_and_the_root_of_a_container_can(user):
  run = as_another("--user", *user)
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines() == [
    "passed: ",
    "failed: FileNotFoundError: [Errno 2] No such fil",
    "failed: PermissionError: [Errno 1] Operation not",
  ]


@holds
def test_where_namespaces_are_forbidden_it_fails_closed():
  """No more user namespaces, as an administrator can set it."""
  forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
  run = as_another("--user", "--map-root-user", "sh", "-c", forbid, "sh")
  assert run.returncode == 1
  assert "cannot be sandboxed: [Errno 28] unshare" in run.stderr
  assert "passed" not in run.stdout


@holds
def test_programs_end_with_the_process_that_started_them():
  script = (
    "from calm_jax.sandbox import runner as sandbox\n"
    "program = sandbox.ProgramWithTests('import time; time.sleep(60)', 'x')\n"
    "limits = sandbox.Limits(wall_seconds=30.0)\n"
    "sandbox.run([program], allow_code_execution=True, limits=limits)\n"
  )
  with subprocess.Popen([sys.executable, "-c", script], env=paths()) as parent:
    deadline = time.monotonic() + 20
    started = set()
    while len(started) < 3 or started != descendants(parent.pid):
      assert time.monotonic() < deadline
      started = descendants(parent.pid)
      time.sleep(0.5)
    parent.kill()
  deadline = time.monotonic() + 5
  while any(map(runs, started)):
    assert time.monotonic() < deadline
    time.sleep(0.1)


def test_the_numbers_of_system_calls_are_the_kernels():
  """Against the kernel's own headers, where they are installed."""
  generic = pathlib.Path("/usr/include/asm-generic/unistd.h")
  native = pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
  if not (generic.exists() and native.exists()):
    pytest.skip("no headers of the kernel")

  def numbers(path):
    rows = [line.split() for line in path.read_text().splitlines()]
    names = {
      row[1].removeprefix("__NR_"): row[2]
      for row in rows
      if row[:1] == ["#define"] and len(row) > 2
    }
    return {name: names.get(value, value) for name, value in names.items()}

  x86, arm = numbers(native), numbers(generic)
  for line in runner.SYSCALLS.read_text().splitlines():
    if not line.startswith("#"):
      name, *both = line.split()
      assert both[0] == x86.get(name), name
      assert both[1] in (arm.get(name), "-"), name
  for name in ("clone", "pivot_root"):
    assert runner.MACHINES["x86_64"][name] == int(x86[name])
    assert runner.MACHINES["aarch64"][name] == int(arm[name])
