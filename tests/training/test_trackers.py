"""What trackers keep: the same numbers, in each of their formats."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time

import numpy as np
import pytest
import tiny
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from calm_jax.core.errors import InputError
from calm_jax.training.metrics import read_metrics
from calm_jax.training.trackers import Trackers

CONFIG = {"seed": 3, "stages": {"compose": {"decay": ("a", "b")}}}
STAGES = {"augmenting": 3, "compose": 5}
HEADER = ["", "composed (ours)", "composed (low)"]
ROWS = [["KV-MATH, mixed", 91.8, 1 / 3], ["NUM-MATH", 93.75, None]]


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def events(directory):
  """All TensorBoard events, read straight from the TFRecord framing."""
  found = []
  for path in sorted(directory.glob("events.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      length = int.from_bytes(data[at : at + 8], "little")
      found.append(Event.FromString(data[at + 12 : at + 12 + length]))
      at += 12 + length + 4
  return found


def summaries(directory):
  return [v for event in events(directory) for v in event.summary.value]


@contextlib.contextmanager
def logs(directory, resume_step=0):
  """A stage in `directory`, of a run there."""
  with (
    tiny.tracked(directory) as run,
    run.stage("compose", directory, resume_step) as log,
  ):
    yield log


def numbers(step, life):
  return {"loss": step / 3, "tokens_per_second": 1e5 * life + step / 7}


def follow(folder, names):
  """Logs a run that is stopped after step 4 and goes on from step 2."""
  with Trackers(names, folder, CONFIG, STAGES) as run:
    with run.stage("augmenting", folder / "augmenting", 0) as log:
      log(3, numbers(3, 1))
    with run.stage("compose", folder / "compose", 0) as log:
      for step in range(1, 5):
        log(step, numbers(step, 1))
      log(4, {"eval_loss": 0.1})
  time.sleep(1.1)  # Files of events, and offline runs, are named by the second.
  with Trackers(names, folder, CONFIG, STAGES) as run:
    with run.stage("compose", folder / "compose", 2) as log:
      for step in range(3, 6):
        log(step, numbers(step, 2))
      log(5, {"eval_loss": 0.2})
    figure = Figure(figsize=(0.3, 0.2), facecolor="#ff0000")
    figure.savefig(folder / "red.png", dpi=100)
    (folder / "made").mkdir()
    (folder / "made" / "weights").write_bytes(b"1234")
    for tracker in run.started():
      tracker.table("table-1", HEADER, ROWS)
      tracker.figure("red", folder / "red.png")
      tracker.artefact("made", folder / "made")


def json_rows(folder):
  """Numbers by stage, step and name."""
  return {
    (stage, row["step"], name): value
    for stage in STAGES
    for row in read_metrics(folder / stage)
    for name, value in row.items()
    if name != "step"
  }


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  follow(folder, "jsonl, tensorboard")
  return folder


def test_json_lines_have_each_step_once(followed):
  rows = json_rows(followed)
  want = {("augmenting", 3): 1, ("compose", 1): 1, ("compose", 2): 1}
  want |= {("compose", step): 2 for step in (3, 4, 5)}
  assert rows == {
    (stage, step, name): value
    for (stage, step), life in want.items()
    for name, value in numbers(step, life).items()
  } | {("compose", 5, "eval_loss"): 0.2}
  assert not list(followed.glob("*/*.tmp"))


def test_json_lines_have_the_rest_in_a_file_of_the_run(followed):
  assert lines(followed / "run.jsonl") == [
    {"config": json.loads(json.dumps(CONFIG))},
    {"table": "table-1", "header": HEADER, "rows": ROWS},
    {"figure": "red", "path": "red.png"},
    {"artefact": "made", "path": "made"},
    {"failed": False},
  ]


def test_tensorboard_has_the_numbers_of_json_lines(followed):
  rows = {}
  for stage in STAGES:
    for event in events(followed / stage):
      # TensorBoard drops an earlier process's events from this step on.
      if event.session_log.status == 1:
        rows = {k: v for k, v in rows.items() if k[:2] < (stage, event.step)}
      for value in event.summary.value:
        rows[stage, event.step, value.tag] = value.simple_value
  want = {key: np.float32(x) for key, x in json_rows(followed).items()}
  assert rows == want


def test_tensorboard_has_the_rest_beside_the_stages(followed):
  found = {value.tag: value for value in summaries(followed)}
  texts = {
    tag: value.tensor.string_val[0].decode()
    for tag, value in found.items()
    if value.tensor.string_val
  }
  texts = {tag.removesuffix("/text_summary"): x for tag, x in texts.items()}
  assert json.loads(texts["config"]) == json.loads(json.dumps(CONFIG))
  header, _, *rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in texts["table-1"].splitlines()
  ]
  assert header == HEADER
  assert [[name, *map(float, filter(None, row))] for name, *row in rows] == [
    [x for x in row if x is not None] for row in ROWS
  ]
  image = found["red"].image
  assert (image.width, image.height) == (30, 20)
  assert texts["made"] == f"`{followed / 'made'}`"


def wandb_records(folder):
  """The records of the offline runs of W&B, in the order of their start."""
  from wandb.proto.wandb_internal_pb2 import Record

  for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    # LevelDB's log: blocks of 32 KiB; a header has checksum, length and kind.
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
      left = 32768 - at % 32768
      if left < 7:
        at += left
        continue
      length, kind = (
        int.from_bytes(data[at + 4 : at + 6], "little"),
        data[at + 6],
      )
      record += data[at + 7 : at + 7 + length]
      at += 7 + length
      if kind in (1, 4):  # whole, or the last piece
        yield path.parent, Record.FromString(record)
        record = b""


def finished_records(folder, lives=2):
  """Those, once W&B's own process has written the end of each life."""
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    found = list(wandb_records(folder))
    if sum(record.HasField("exit") for _, record in found) == lives:
      return found
    time.sleep(0.1)
  raise TimeoutError(f"the offline runs in {folder} have no end")


def wandb_items(items):
  return {
    x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items
  }


def test_weights_and_biases_offline_has_the_same(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  follow(tmp_path, "jsonl,tensorboard,wandb")
  rows, summary, media, ids = {}, {}, {}, set()
  configs, artefacts, codes = [], {}, []
  for place, record in finished_records(tmp_path):
    ids |= {record.run.run_id} - {""}
    codes += [record.exit.exit_code] if record.HasField("exit") else []
    artefacts[record.artifact.name] = record.artifact
    if record.run.config.update:
      configs.append(wandb_items(record.run.config.update))
    summary |= wandb_items(record.summary.update)
    items = wandb_items(record.history.item)
    for key, value in items.items():
      stage, _, name = key.partition("/")
      if stage in STAGES and name != "step":
        assert items["_step"] == items[f"{stage}/step"] + 3 * (
          stage == "compose"
        )
        rows[stage, items[f"{stage}/step"], name] = value
    for key in items.keys() & {"table-1/path", "red/path"}:
      media[key] = place / "files" / items[key]
  # What the first process measured after the step that it went on from.
  assert rows.pop(("compose", 4, "eval_loss")) == 0.1
  assert rows == json_rows(tmp_path)
  assert len(ids) == 1 and codes == [0, 0]
  for config in configs:
    assert config["seed"] == 3
    assert config["stages"] == {"compose": {"decay": ["a", "b"]}}
  table = json.loads(media["table-1/path"].read_text())
  assert table["columns"] == HEADER and table["data"] == ROWS
  with Image.open(media["red/path"]) as image:
    assert image.size == (30, 20)
  assert summary["table-1/KV-MATH, mixed/composed (low)"] == 1 / 3
  made = artefacts["made"].manifest.contents
  assert [x.path for x in made] == ["weights"]


def test_weights_and_biases_that_cannot_start_says_how(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb")

  def init(**_):
    raise wandb.errors.UsageError("No API key configured")

  monkeypatch.setattr(wandb, "init", init)
  with pytest.raises(InputError, match=r"cannot start.*WANDB_MODE=offline"):
    Trackers("wandb", tmp_path).started()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(InputError, match=r"pip install 'calm_jax\[wandb\]'"):
    Trackers("jsonl,wandb")


def test_an_unknown_tracker_is_named():
  with pytest.raises(InputError, match=r"'mlflow' is none of .*'wandb'"):
    Trackers("jsonl,mlflow")


def test_a_run_that_fails_is_marked(tmp_path):
  with pytest.raises(KeyError), logs(tmp_path):
    raise KeyError
  assert lines(tmp_path / "run.jsonl")[-1] == {"failed": True}


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
  with logs(tmp_path) as log:
    log(1, {"loss": 0.5, "tokens": 12})
    assert lines(tmp_path / "metrics.jsonl") == [
      {"step": 1, "loss": 0.5, "tokens": 12}
    ]


def test_non_finite_values_stay_json(tmp_path):
  values = {"a": math.nan, "b": math.inf, "c": -math.inf}

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  with logs(tmp_path) as log:
    log(1, values)
  [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
  json.loads(line, parse_constant=refuse)
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["a"])
  assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_run_that_starts_anew_drops_every_line(tmp_path):
  for _ in range(2):
    with logs(tmp_path) as log:
      log(1, {"loss": 1.0})
  assert len(read_metrics(tmp_path)) == 1


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
  with logs(tmp_path, resume_step=2) as log:
    log(2, {"loss": 2.0})
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('oops\n{"step": 1}\n')
  with (
    pytest.raises(ValueError, match="line 1: not JSON"),
    logs(tmp_path, resume_step=1),
  ):
    pass
