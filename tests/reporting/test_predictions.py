import made_runs
import pytest

from calm_jax.core.errors import InputError
from calm_jax.reporting import predictions, runs


def test_wilson_interval():
  low, high = predictions.wilson_interval(5, 10)
  assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
  low, high = predictions.wilson_interval(0, 100)
  assert low == 0 and high == pytest.approx(0.0370, abs=1e-4)
  assert predictions.wilson_interval(100, 100)[1] == 1
  for bad in ((1, 0), (3, 2), (-1, 2)):
    with pytest.raises(ValueError, match="not a proportion"):
      predictions.wilson_interval(*bad)


def test_predictions_are_counted_by_number_of_terms(tmp_path):
  def row(correct, terms):
    return {
      "prompt": "p", "prediction": "q", "correct": correct, "num_terms": terms
    }  # fmt: skip

  lines = [row(True, 3), row(False, 3), row(True, 6), row(True, None)]
  folder = tmp_path / "predictions"
  made_runs.write_lines(folder / "kv_math_held_out.composed.jsonl", lines)
  # Of another run: in a folder of its own, and not read.
  made_runs.write_lines(folder / "direct" / "num_math.anchor.jsonl", lines)
  assert predictions.count_by_terms(runs.Run(tmp_path, {})) == {
    "KV-MATH, all keys held-out": {"composed": {3: (1, 2), 6: (1, 1)}}
  }


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{\n", "line 1: not JSON"),
    ('{"prompt": "a", "correct": true}\n', "line 1: it has no 'prediction'"),
    ('{"prompt": "a", "prediction": "b"}\n', 'line 1: needs "correct" or'),
  ],
)
def test_bad_predictions_say_where(tmp_path, text, message):
  path = tmp_path / "a.anchor.jsonl"
  path.write_text(text)
  with pytest.raises(InputError, match=message):
    predictions.read_rows(path)


def test_what_is_right():
  assert predictions.is_right({"correct": True, "score": 0.0})
  assert not predictions.is_right({"correct": False, "score": 100.0})
  assert predictions.is_right({"score": 50.0})
  assert not predictions.is_right({"score": 49.9})
