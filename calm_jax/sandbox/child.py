"""The inside of the sandbox: builds the walls, then runs one program.

`calm_jax.sandbox.runner` starts this script for each program. Of three
processes,

- the first reads the job, makes the namespaces and a root folder of its own,
  drops all privileges, and waits;
- the second is the first of the new PID namespace: it keeps the time, and when
  it ends, the kernel ends everything in that namespace;
- the third limits itself further and runs the program and its tests.

A step that fails ends the whole before the program is started. Only the
standard library is used, for a quick start.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
import types
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534
# From linux/sched.h: mount, UTS, IPC, PID and network namespaces; user.
SPACES, NEWUSER = 0x6C020000, 0x10000000
THREAD = 0x00010000
# From linux/mount.h and linux/prctl.h.
BIND, RECURSIVE, PRIVATE, DETACH = 0x1000, 0x4000, 0x40000, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NOSUID = 442, -100, 0x8000, 3
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
# From linux/seccomp.h: its mode, what a filter answers, and the places of the
# call's number, the machine and the first argument in what it is given.
FILTER_MODE = 2
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16
# From linux/bpf_common.h: a filter's instructions.
LOAD, EQUAL, AT_LEAST, ANY_BIT, ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06
FIRST_NEW_CALL = 424  # from here on all machines number calls alike


def call(name: str, *arguments) -> None:
  """Calls the C library; raises an OSError that names the call."""
  wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
  if getattr(LIBC, name)(*wide) < 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{name}: {os.strerror(code)}")


def write(path: str, text: str) -> None:
  with open(path, "w", encoding="ascii") as file:
    file.write(text)


def read_exactly(fd: int, size: int) -> bytes:
  data = b""
  while len(data) < size:
    chunk = os.read(fd, size - len(data))
    if not chunk:
      raise EOFError("the job was cut off")
    data += chunk
  return data


def give_up(error: OSError) -> NoReturn:
  """Says what the machine lacks, instead of running a program."""
  os.write(2, json.dumps({"lacks": str(error)}).encode() + b"\n")
  os._exit(1)


def separate() -> bool:
  """Leaves the machine's processes, network and mounts; returns if as root."""
  uid, gid = os.getuid(), os.getgid()
  with open("/proc/self/uid_map", encoding="ascii") as file:
    every_user_exists = file.read().split() == ["0", "0", "4294967295"]
  # Its own files and processes would be root's, whatever it is called inside:
  # root becomes another user, who exists nowhere else.
  is_root = uid == 0 and every_user_exists
  call("unshare", SPACES if is_root else SPACES | NEWUSER)
  if not is_root:
    write("/proc/self/setgroups", "deny")
    write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
    write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
  return is_root


def change_root(job: dict) -> None:
  """Makes an empty root folder with read-only libraries and a small /tmp."""
  call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
  call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, b"size=1m,mode=755")
  os.chdir("/tmp")
  os.mkdir("old")
  call("syscall", job["pivot_root"], b".", b"old")
  os.chdir("/")
  os.mkdir("/tmp")
  size = f"size={job['disk_bytes']},nr_inodes=1024,mode=1777"
  call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, size.encode())
  for target, source in job["visible"].items():
    source = "/old" + source
    is_file = not os.path.isdir(source)
    os.makedirs(os.path.dirname(target) if is_file else target, exist_ok=True)
    if is_file:
      write(target, "")
    both = source.encode(), target.encode()
    call("mount", *both, None, BIND | RECURSIVE, None)
    protect(target, AT_RECURSIVE)
  call("umount2", b"/old", DETACH)
  os.rmdir("/old")
  protect("/", 0)
  os.chdir("/tmp")


def protect(path: str, flags: int) -> None:
  """Makes a mount read-only, without set-user-id programs."""
  attributes = struct.pack("QQQQ", READ_ONLY_NOSUID, 0, 0, 0)
  target = AT_FDCWD, path.encode(), flags
  call("syscall", MOUNT_SETATTR, *target, attributes, len(attributes))


def drop_privileges(is_root: bool) -> None:
  """Gives up being root, all capabilities, and the way back to them."""
  if is_root:
    # A user of its own for each sandbox: processes are limited per user.
    user = 2**30 + os.getpid()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
  call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
  call("prctl", DUMPABLE, 0, 0, 0, 0)


def limit(job: dict) -> None:
  """Sets the resource limits."""
  for kind, soft, hard in (
    (resource.RLIMIT_AS, job["memory_bytes"], 0),
    # The soft limit's signal can be ignored, the hard one's cannot.
    (resource.RLIMIT_CPU, job["cpu_seconds"], 1),
    (resource.RLIMIT_FSIZE, job["disk_bytes"], 0),
    (resource.RLIMIT_NPROC, job["threads"], 0),
    (resource.RLIMIT_NOFILE, 64, 0),
    (resource.RLIMIT_CORE, 0, 0),
  ):
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
      soft, hard = min(soft, most), min(hard, most - min(soft, most))
    resource.setrlimit(kind, (soft, soft + hard))


def filter_calls(job: dict) -> None:
  """Allows the job's system calls only; no process or program can be started.

  With one process, RLIMIT_AS is a limit on all its memory.
  """
  # Instruction, steps to skip if true, if false, and its number.
  rules = [
    (LOAD, 0, 0, MACHINE),
    (EQUAL, 1, 0, job["machine"]),
    (ANSWER, 0, 0, KILL),
    (LOAD, 0, 0, NUMBER),
  ]
  for known in job["syscalls"]:
    rules += [(EQUAL, 0, 1, known), (ANSWER, 0, 0, ALLOW)]
  rules += [
    # The C library falls back to older calls where a new one is missing
    # (ENOSYS), not where it is forbidden (EPERM).
    (AT_LEAST, 0, 1, FIRST_NEW_CALL),
    (ANSWER, 0, 0, ERRNO | errno.ENOSYS),
    (EQUAL, 0, 3, job["clone"]),
    (LOAD, 0, 0, FIRST_ARGUMENT),
    (ANY_BIT, 0, 1, THREAD),
    (ANSWER, 0, 0, ALLOW),
    (ANSWER, 0, 0, ERRNO | errno.EPERM),
  ]
  code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
  buffer = ctypes.create_string_buffer(code, len(code))
  program = struct.pack("HP", len(rules), ctypes.addressof(buffer))
  call("prctl", SECCOMP, FILTER_MODE, program, 0, 0)


def describe(error: BaseException, tests: str) -> bytes:
  """Writes a letter for the kind of end, and the exception's last line."""
  if isinstance(error, MemoryError):
    return b"m" + b"MemoryError"
  text = ""
  # The program's own exceptions may fail to print.
  with contextlib.suppress(Exception):
    text = str(error)
  lines = [line for line in text.splitlines() if line.strip()]
  said = type(error).__name__ + (f": {lines[-1].strip()}" if lines else "")
  line, at = 0, error.__traceback__
  while at:
    if at.tb_frame.f_code.co_filename == "<tests>":
      line = at.tb_lineno
    at = at.tb_next
  if line:
    said += f" in: {tests.splitlines()[line - 1].strip()}"
  kind = "x" if isinstance(error, SystemExit) else "f"
  if isinstance(error, OSError) and error.errno == errno.ENOMEM:
    kind = "m"
  return (kind + said[:500]).encode(errors="replace")


def run_program(job: dict, token: int, report: int) -> None:
  """Runs the program, then its tests in the same names; never returns."""
  # The program may replace any of them.
  run, read, write_to, leave = exec, os.read, os.write, os._exit
  flush = sys.stdout.flush
  module = types.ModuleType("program")
  sys.modules["program"] = module
  try:
    parts = ("program", "tests")
    codes = [compile(job[p], f"<{p}>", "exec", 0, True) for p in parts]
    for code in codes:
      run(code, module.__dict__)
  except BaseException as error:
    said = describe(error, job["tests"])
  else:
    # Only now: while the program ran, this process did not hold it.
    said = read(token, 64)
  write_to(report, said)
  with contextlib.suppress(Exception):
    flush()
  leave(0)


def become_program(job: dict, report: int) -> None:
  """Cuts this process down to the program; never returns."""
  os.setsid()
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
  signal.signal(signal.SIGINT, signal.default_int_handler)
  token, null = os.dup(0), os.open("/dev/null", os.O_RDONLY)
  os.dup2(null, 0)
  os.environ.clear()
  os.environ["HOME"] = "/tmp"
  sys.argv[:] = ["program"]
  for fd in range(3, 64):
    if fd not in (token, report):
      with contextlib.suppress(OSError):
        os.close(fd)
  try:
    limit(job)
    filter_calls(job)
  except OSError as error:
    give_up(error)
  os.dup2(1, 2)
  run_program(job, token, report)


def watch(job: dict, report: int) -> None:
  """Runs the program for its time and writes how it ended; never returns."""
  call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  # The first process of a PID namespace gets no signal that it does not handle.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
  start = time.monotonic()
  program = os.fork()
  if not program:
    become_program(job, report)
  ended, status, usage = 0, None, None
  while not ended:
    left = start + job["wall_seconds"] - time.monotonic()
    if left <= 0:
      break
    signal.sigtimedwait({signal.SIGCHLD}, left)
    ended, status, usage = os.wait4(program, os.WNOHANG)
  result = {"status": None, "seconds": time.monotonic() - start}
  if ended and usage:
    cpu_seconds = usage.ru_utime + usage.ru_stime
    result |= {"status": status, "cpu_seconds": cpu_seconds}
  os.write(2, json.dumps(result).encode() + b"\n")
  os._exit(0)


def main(report: int) -> None:
  call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  os.umask(0o022)
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  size = int.from_bytes(read_exactly(0, 8), "little")
  job = json.loads(read_exactly(0, size))
  try:
    # Should memory run out, this goes first, not what started it.
    write("/proc/self/oom_score_adj", "1000")
    is_root = separate()
    change_root(job)
    call("sethostname", b"sandbox", 7)
    drop_privileges(is_root)
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    watcher = os.fork()
  except OSError as error:
    give_up(error)
  if not watcher:
    watch(job, report)
  os.waitpid(watcher, 0)


if __name__ == "__main__":
  main(int(sys.argv[1]))
