"""What programs in the sandbox try, and how each must end.

Each is written so that it does little harm even where the walls do not hold: it
forks a few times only, and the tests limit what can be allocated.
"""

from __future__ import annotations

import os

# name: (program, verdict, part of its detail). `{secret}` is a file of the
# user's, `{parent}` this process, `{port}` a server of this machine.
FOREVER = """
import threading, time
def forever():
  while True: time.sleep(0.01)
"""
ATTACKS = {
  "infinite loop": ("while True: pass", "timed out", "CPU"),
  "sleep": ("import time\ntime.sleep(60)", "timed out", ""),
  "fork bomb": (
    "import os\nfor _ in range(6): os.fork()",
    "failed", "PermissionError",
  ),
  "fork bomb that goes on": (
    "import os, time\n"
    "for _ in range(6):\n"
    "  try: os.fork()\n"
    "  except OSError: pass\n"
    "time.sleep(60)",
    "timed out", "",
  ),
  "another program": (
    "import os\nos.execv('/bin/sh', ['sh'])", "failed", "PermissionError",
  ),
  "subprocess": (
    "import subprocess\nsubprocess.run(['true'])", "failed", "PermissionError",
  ),
  "1.5 GB": ("x = bytearray(3 * 2**29)", "out of memory", "MemoryError"),
  "10 GB": ("x = bytearray(10 * 2**30)", "out of memory", "MemoryError"),
  "10 GB of maps": (
    "import mmap\nx = [mmap.mmap(-1, 2**26) for _ in range(160)]",
    "out of memory", "Cannot allocate memory",
  ),
  "10 GB of output": (
    "for _ in range(10 * 2**14): print('x' * 2**16)", "too much output", "",
  ),
  "10 GB of errors": (
    "import os\nfor _ in range(10 * 2**14): os.write(2, b'x' * 2**16)",
    "too much output", "",
  ),
  "a large file": (
    "with open('large', 'wb') as f:\n"
    "  for _ in range(40): f.write(bytes(2**20))",
    "failed", "File too large",
  ),
  "many files": (
    "for i in range(40):\n"
    "  with open(str(i), 'wb') as f: f.write(bytes(2**20))",
    "failed", "No space left",
  ),
  "very many files": (
    "for i in range(5000): open(str(i), 'w').close()", "failed", "No space left"
  ),
  "many threads": (
    FOREVER + "threading.stack_size(2**16)\n"
    "for _ in range(500): threading.Thread(target=forever).start()",
    "failed", "can't start new thread",
  ),
  "writes outside": ("open('{secret}', 'w')", "failed", "FileNotFoundError"),
  "writes to the root": ("open('/x', 'w')", "failed", "Read-only"),
  "writes to a library": (
    "import os\nopen(os.__file__, 'a')", "failed", "Error: [Errno",
  ),
  "reads the user's file": ("open('{secret}')", "failed", "FileNotFoundError"),
  "reads through ..": (
    "open('../../../..{secret}')", "failed", "FileNotFoundError",
  ),
  "a symlink out": (
    "import os\nos.symlink('{secret}', 'link')\nopen('link')",
    "failed", "FileNotFoundError",
  ),
  "reads /proc": ("open('/proc/1/environ')", "failed", "FileNotFoundError"),
  "makes a device": (
    "import os, stat\nos.mknod('sda', 0o600 | stat.S_IFBLK, 2048)",
    "failed", "PermissionError",
  ),
  "loopback": (
    "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "failed", "PermissionError",
  ),
  "outside": (
    "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)",
    "failed", "PermissionError",
  ),
  "kills the parent": (
    "import os\nos.kill({parent}, 9)", "failed", "ProcessLookupError",
  ),
  "kills what it can": (
    "import os\n"
    "os.kill(os.getppid(), 9)\nos.kill(1, 15)\nos.kill(1, 2)\nos.kill(-1, 9)",
    "failed", "ProcessLookupError",
  ),
  "stops its keeper": (
    "import os, time\nos.kill(1, 19)\ntime.sleep(60)", "timed out", "",
  ),
  "stops itself": ("import os\nos.kill(os.getpid(), 19)", "timed out", ""),
  "kills its group": ("import os\nos.kill(0, 9)", "killed", "Killed"),
  "signals ignored": (
    "import signal\n"
    "for s in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:\n"
    "  signal.signal(s, signal.SIG_IGN)\n"
    "while True: pass",
    "timed out", "",
  ),
  "errors caught": (
    "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "timed out", "",
  ),
  "a wild pointer": (
    "import ctypes\nctypes.string_at(1)", "killed", "Segmentation fault",
  ),
  "aborts": ("import os\nos.abort()", "killed", "Aborted"),
  "leaves": ("import os\nos._exit(0)", "did not run the tests", "exit code 0"),
  "exits": ("raise SystemExit(0)", "did not run the tests", "SystemExit: 0"),
  "exits in a thread": (
    "import os, threading, time\n"
    "threading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)",
    "did not run the tests", "exit code 0",
  ),
  "exits when tested": (
    "class done:\n  def __bool__(self): raise SystemExit(0)\ndone = done()",
    "did not run the tests", "SystemExit: 0 in: assert done",
  ),
  "new builtins": (
    "import builtins, os\ndone = False\n"
    "builtins.AssertionError = None\nbuiltins.exec = print\n"
    "builtins.compile = print\nos._exit = os.write = os.read = print",
    "failed", "AssertionError in: assert done",
  ),
  "says it passed": (
    "import os\n"
    "for fd in range(3, 200):\n"
    "  try: os.write(fd, b'0' * 64)\n"
    "  except OSError: pass\n"
    "os._exit(0)",
    "did not run the tests", "",
  ),
  "closes all": (
    "import os\nos.closerange(0, 200)\ndone = True",
    "did not run the tests", "",
  ),
  "no syntax": ("def f(:", "failed", "SyntaxError"),
  "an open string": ("done = True\nx = '''", "failed", "SyntaxError"),
  "an error that does not print": (
    "class E(Exception):\n  def __str__(self): raise E\nraise E", "failed", "E",
  ),
}  # fmt: skip

# Through the C library, past Python: the call must fail (-1), or reach nobody.
SYSCALLS = {
  "fork": "libc.fork()",
  "vfork": "libc.syscall(58)" if os.uname().machine == "x86_64" else "-1",
  "clone3": "libc.syscall(435, 0, 0)",
  "unshare": "libc.unshare(0x10000000)",
  "setns": "libc.setns(0, 0)",
  "mount": "libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
  "umount": "libc.umount2(b'/tmp', 2)",
  "chroot": "libc.chroot(b'/tmp')",
  "ptrace": "libc.ptrace(16, 1, 0, 0)",
  "socket": "libc.socket(2, 1, 0)",
  "unix socket": "libc.socket(1, 1, 0)",
  "setuid": "libc.setuid(0)",
  "execve": "libc.execve(b'/usr/lib', None, None)",
  "bpf": "libc.syscall(321)",
  "io_uring": "libc.syscall(425, 8, 0)",
  "kill": "libc.kill({parent}, 9)",
  "memfd": "libc.memfd_create(b'x', 0)",
  "shm": "libc.shmget(0, 2**20, 0o1600)",
  "prctl": "libc.prctl(38, 0, 0, 0, 0)",
  "keyctl": "libc.syscall(250, 0, -3)",
}
