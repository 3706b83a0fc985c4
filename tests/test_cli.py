"""Bad input ends with one screen that says what to do, and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spelled
from safetensors.numpy import load_file, save_file

from calm_jax import train
from calm_jax.core.errors import InputError
from configs import compose

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
  """Two small models and some text, which nothing is wrong with."""
  config = compose.get_config()
  config.workdir = str(tmp_path / "run")
  for i, side in enumerate(("anchor", "augmenting")):
    config[side] = str(spelled.save(tmp_path / side, i))
  for name in ("data", "eval_data"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(20 * '{"prompt": "abc", "completion": "def"}\n')
    config[name] = str(path)
  for stage in config.stages.values():
    stage.update(length=16, steps=2, warmup=1, batch_size=2)
  config.stages.compose.data.mixture.data.fraction = 1.0
  config.task.update(num_samples=0, eval_batch_size=2, eval_length=16)
  return config


def missing_folder(config):
  config.anchor = "./nowhere"


def only_pickles(config):
  weights = Path(config.anchor, "model.safetensors")
  weights.rename(weights.with_name("pytorch_model.bin"))


def truncated(config):
  path = Path(config.anchor, "model.safetensors")
  path.write_bytes(path.read_bytes()[:-100])


def misshapen(config):
  path = Path(config.augmenting, "model.safetensors")
  tensors = load_file(path)
  tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
  save_file(tensors, path)


def all_misshapen(config):
  # All tensors are wrong, of a model that has many.
  path = Path(config.augmenting, "config.json")
  changed = json.loads(path.read_text()) | {
    "hidden_size": 4, "num_hidden_layers": 200
  }  # fmt: skip
  path.write_text(json.dumps(changed))


def not_json(config):
  path = Path(config.data)
  lines = path.read_text().splitlines()
  path.write_text("\n".join([*lines[:6], '{"prompt": "abc', *lines[6:]]))


def long_prompt(config):
  with Path(config.data).open("a") as file:
    file.write(json.dumps({"prompt": 30 * "a", "completion": "b"}))


def other_vocabulary(config):
  folder = Path(config.augmenting).with_name("other")
  config.augmenting = str(spelled.save(folder, 2, text="abcdef"))
  (folder / "tokenizer.model").unlink()


def impossible_connection(config):
  config.composition.connections = ((3, 1),)


def no_such_leaf(config):
  config.stages.compose.trainable = ("composition/lora/.*",)


def no_text(config):
  config.eval_data = ""


def workdir_is_a_file(config):
  Path(config.workdir).write_text("")


def no_workdir(config):
  config.workdir = ""


def negative_seed(config):
  config.seed = -3


def no_such_family(config):
  path = Path(config.anchor, "config.json")
  path.write_text('{"model_type": "mamba"}')


@pytest.mark.parametrize(
  ("break_it", "said"),
  [
    (missing_folder, ["no folder './nowhere'", "org/name"]),
    (only_pickles, ["pytorch_model.bin", "convert them to safetensors"]),
    (truncated, ["anchor/model.safetensors", "truncated", "download it again"]),
    (misshapen, ["model.norm.weight [7]", "final_norm/scale", "[8]"]),
    (all_misshapen, ["augmenting", "more"]),
    (not_json, ["data.jsonl line 7", "not JSON"]),
    (long_prompt, ["data.jsonl line 21", "33 tokens", "16"]),
    (other_vocabulary, ["vocabulary of 10", "one of 18", "need a tokenizer"]),
    (impossible_connection, ["connection (3, 1)", "layers 1 to 2"]),
    (no_such_leaf, ["composition/lora/.*", "matches no leaf"]),
    (no_text, ["--config.eval_data="]),
    (workdir_is_a_file, ["config.workdir=", "run is a file, give a folder"]),
    (no_workdir, ["config.workdir=''", "must be a path"]),
    (negative_seed, ["config.seed=-3", "whole number, 0 to 4294967295"]),
    (no_such_family, ["anchor/config.json", "mamba", "llama"]),
  ],
)
def test_bad_input(break_it, said, config):
  break_it(config)
  with pytest.raises(InputError) as caught:
    train.main(config)
  message = str(caught.value)
  for part in said:
    assert part in message
  # One screen.
  assert len(message.splitlines()) <= 20
  assert len(message) < 2000


# The real thing.

FAULTY = """
from ml_collections import ConfigDict
def get_config():
  config = ConfigDict({"a": 1})
  config.lock()
  config.b = 2
  return config
"""


HERE = {
  "cwd": ROOT,
  "env": os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
  "text": True,
}


def test_the_command_says_what_is_wrong_and_exits_with_2(tmp_path):
  done = subprocess.run(
    [
      sys.executable, "-m", "calm_jax.train", "--config=configs/compose.py",
      f"--config.workdir={tmp_path}", "--config.anchor=./nowhere",
      "--config.augmenting=./nowhere",
    ],
    capture_output=True, **HERE,
  )  # fmt: skip
  assert done.returncode == 2
  assert done.stdout == ""
  first, *rest = done.stderr.splitlines()
  assert first.startswith("error: no folder './nowhere'")
  assert not rest


RUN_CODE = "--allow_code_execution"
# Of the command line alone: starts no JAX. Each line of input is the arguments
# of a process, which is forked when all is imported: that saves the seconds.
COMMAND = """
import json, os, signal, sys, tempfile
from calm_jax import cli
from calm_jax.core import errors
from calm_jax.core.errors import InputError
def main(config):
  if config.seed in errors.EXIT_CODES.values():
    [kind] = [k for k, code in errors.EXIT_CODES.items() if code == config.seed]
    raise kind("too bad")
  if config.seed == 9:
    os.kill(os.getpid(), signal.SIGTERM)
  if config.seed == 10:
    raise OSError(28, "No space left on device", "report.html")
  if config.seed == 11:
    raise FileExistsError(17, "File exists", "out")
  if config.seed == 12:
    print("caf\\u00e9 \\u2603")
  if config.seed == 7:
    raise InputError("seven is too many\\nuse six")
  if config.seed == 8:
    raise ValueError("a bug")
  print("seed", config.seed)
  if "allow_code_execution" in config.task:
    print("allowed", config.task.allow_code_execution)
for line in sys.stdin:
  said = [tempfile.TemporaryFile("w+") for _ in range(2)]
  pid = os.fork()
  if pid == 0:
    for descriptor, file in enumerate(said, 1):
      os.dup2(file.fileno(), descriptor)
    sys.argv = ["", *json.loads(line)]
    sys.exit(cli.run_with_config(main))
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  for file in said:
    file.seek(0)
  print(json.dumps([code, *(file.read() for file in said)]), flush=True)
"""


@pytest.fixture(scope="module")
def command():
  """Runs COMMAND: (exit code, standard output, standard error)."""
  with subprocess.Popen(
    [sys.executable, "-c", COMMAND], stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, **HERE,
  ) as process:  # fmt: skip

    def run(*arguments: str) -> tuple[int, str, str]:
      process.stdin.write(json.dumps(arguments) + "\n")
      process.stdin.flush()
      return json.loads(process.stdout.readline())

    yield run


@pytest.mark.parametrize(
  ("arguments", "code", "said"),
  [
    (["--config=configs/kv.py:tiny", "--config.seed=3"], 0, "seed 3"),
    (["--config=configs/kv.py", "--config.seed=7"], 2, "error: seven is"),
    (["--config=configs/kv.py", "--config.seed=8"], 1, "ValueError: a bug"),
    (["--config=configs/kv.py", "--config.seed=a"], 2, "--config.seed=a"),
    (["--config=configs/kv.py", "--config.sed=1"], 2, 'instead of "sed"'),
    (["--config=configs/kv.py", "--config.seed=65"], 65, "error: too bad"),
    (["--config=configs/kv.py", "--config.seed=74"], 74, "error: too bad"),
    (["--config=configs/kv.py", "--config.seed=75"], 75, "error: too bad"),
    (["--config=configs/kv.py", "--config.seed=76"], 76, "error: too bad"),
    (["--config=configs/kv.py", "--config.seed=130"], 130, "error: too bad"),
    (
      ["--config=configs/kv.py", "--config.seed=9"],
      75,
      "error: SIGTERM: runs/",
    ),
    (["--config=configs/kv.py", "--config.seed=10"], 74, "report.html"),
    (["--config=configs/kv.py", "--config.seed=11"], 2, "exists: 'out'"),
    (["--config=configs/kv.py", "--config.seed=12"], 0, "caf"),
    (["--config=configs/kv.py:nope"], 2, "'nope' is none of"),
    (["--config=configs/nope.py"], 2, "configs/nope.py"),
    (["--config=configs/kv.py", "more"], 2, "unexpected arguments: ['more']"),
    ([], 2, "--config must have a value"),
    (["--config=configs/code.py"], 0, "allowed False"),
    (["--config=configs/code.py", RUN_CODE], 0, "allowed True"),
    (["--config=configs/kv.py", RUN_CODE], 2, "runs no code"),
  ],
)
def test_exit_codes(arguments, code, said, command):
  got, out, err = command(*arguments)
  assert got == code, out + err
  assert said in (out + err).replace("\\'", "'").replace("\\n", "\n")
  # A fault of ours keeps its traceback, one of the user's has none.
  assert ("Traceback" in err) == (code == 1)
  if code == 2:
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 20


def test_a_fault_inside_a_config_file_keeps_its_traceback(tmp_path, command):
  path = tmp_path / "faulty.py"
  path.write_text(FAULTY)
  code, _, err = command(f"--config={path}", "--config.a=2")
  assert code == 1
  assert "config.b = 2" in err
