import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

from calm_jax.training.metrics import MetricWriter, read_metrics


def lines(directory):
  return (directory / "metrics.jsonl").read_text().splitlines()


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


def test_one_line_and_one_scalar_per_value(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {"loss": 0.5, "tokens": 12})
    # Readable while the run goes on, not only once it is closed.
    assert [json.loads(x) for x in lines(tmp_path)] == [
      {"step": 1, "loss": 0.5, "tokens": 12}
    ]
    writer.write(2, {"loss": 0.25})
  assert read_metrics(tmp_path)[1] == {"step": 2, "loss": 0.25}
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in events(tmp_path)
    for value in event.summary.value
  ]
  assert scalars == [(1, "loss", 0.5), (1, "tokens", 12), (2, "loss", 0.25)]


def test_non_finite_values_stay_json(tmp_path):
  values = {"a": math.nan, "b": math.inf, "c": -math.inf}

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  with MetricWriter(tmp_path) as writer:
    writer.write(1, values)
  json.loads(lines(tmp_path)[0], parse_constant=refuse)
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["a"])
  assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_has_each_step_once(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": step})
  with MetricWriter(tmp_path, resume_step=3) as writer:
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    for step in range(4, 7):
      writer.write(step, {"loss": 10 * step})
  rows = read_metrics(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  assert [row["loss"] for row in rows] == [1, 2, 3, 40, 50, 60]
  # What makes TensorBoard drop the events of the first process.
  assert 4 in [e.step for e in events(tmp_path) if e.session_log.status == 1]
  assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_anew_drops_every_line(tmp_path):
  for _ in range(2):
    with MetricWriter(tmp_path) as writer:
      writer.write(0, {"loss": 1.0})
  assert len(read_metrics(tmp_path)) == 1


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
  with MetricWriter(tmp_path, resume_step=2) as writer:
    writer.write(2, {"loss": 2.0})
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('oops\n{"step": 1}\n')
  with pytest.raises(ValueError, match="line 1: not JSON"):
    MetricWriter(tmp_path, resume_step=1)


def test_an_inactive_writer_leaves_no_trace(tmp_path):
  with MetricWriter(tmp_path / "new", active=False) as writer:
    writer.write(1, {"loss": 1.0})
  assert not (tmp_path / "new").exists()
