import hashlib
import json
import math
import pathlib

import numpy as np
import pytest

from calm_jax.core import errors, files
from calm_jax.core.errors import InputError


def test_a_write_replaces_the_whole_file(tmp_path):
  path = tmp_path / "below" / "file.txt"
  files.write_atomically(path, "a longer text: é")
  files.write_atomically(path, b"bytes")
  assert path.read_bytes() == b"bytes"
  assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file.txt"
  files.write_atomically(path, "old")

  def fail(_):
    raise OSError("no space")

  monkeypatch.setattr(files.os, "fsync", fail)
  with pytest.raises(OSError, match="no space"):
    files.write_atomically(path, "new")
  assert path.read_text() == "old"


def test_sha256(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"x" * 10_000_000)
  assert files.sha256(path) == hashlib.sha256(b"x" * 10_000_000).hexdigest()


def test_json_has_plain_values_and_names_for_numbers_that_are_not_finite(
  tmp_path,
):
  value = {
    "array": np.float32([1, math.inf]),
    "tuple": (np.int64(3), -math.inf),
    "path": pathlib.Path("a/b"),
    "dtype": np.float32,
    1: math.nan,
  }
  files.write_json(tmp_path / "a.json", value)
  read = files.read_json(tmp_path / "a.json")
  assert read["array"] == [1, "Infinity"]
  assert read["tuple"] == [3, "-Infinity"]
  assert (read["path"], read["1"]) == ("a/b", "NaN")
  assert files.number_from_json("-Infinity") == -math.inf
  assert math.isnan(files.number_from_json("NaN"))
  assert files.number_from_json("text") == "text"
  assert files.number_from_json(2) == 2


@pytest.mark.parametrize(
  ("text", "message"), [("{", "not JSON"), ("[]", "a JSON list")]
)
def test_what_is_no_json_object_is_refused(tmp_path, text, message):
  path = tmp_path / "a.json"
  path.write_text(text)
  with pytest.raises(InputError, match=rf"a\.json.*{message}"):
    files.read_json(path)
  with pytest.raises(InputError, match=r"b\.json: no such file"):
    files.read_json(tmp_path / "b.json")


def test_json_lines_have_their_numbers(tmp_path):
  path = tmp_path / "a.jsonl"
  text = '\ufeff{"a": "\u2028"}\r\n\n  \n{"a": 2}'
  path.write_bytes(text.encode())
  assert list(files.read_json_lines(path, {"a": lambda name, value: None})) == [
    (1, {"a": "\u2028"}),
    (4, {"a": 2}),
  ]
  finished = list(files.read_json_lines(path, {}, drop_unfinished=True))
  assert [number for number, _ in finished] == [1]
  records = [{"a": "é"}, {"a": [1]}]
  files.write_json_lines(path, records)
  assert [record for _, record in files.read_json_lines(path, {})] == records


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{", "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
    (b"[1]", "a JSON array, where one object a line"),
    (b"\xff", "not UTF-8"),
    (b'{"b": 1}', "it has no 'a' and no 'c'"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "a.jsonl"
  good = json.dumps({"a": 1, "c": 2}).encode()
  path.write_bytes(good + b"\n" + line + b"\n")
  with pytest.raises(InputError, match=rf"a\.jsonl line 2: {message}"):
    list(
      files.read_json_lines(
        path, {"a": errors.check_int, "c": errors.check_int}
      )
    )
  with pytest.raises(InputError, match="no such file"):
    list(files.read_json_lines(tmp_path / "b.jsonl", {}))
