"""Tests of calm_jax.data.sources."""

import json

import pytest

from calm_jax.data.sources import TextExample, read_examples, take_fraction
from calm_jax.errors import InputError


def write(path, *lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


def test_jsonl(tmp_path):
  path = write(
    tmp_path / "data.jsonl",
    b'{"text": "plain \\u2028 text"}',
    b"",
    b'{"prompt": "2+2=", "completion": "4", "text": "ignored"}',
    '{"text": "日本\u2028 text"}'.encode(),
  )
  assert read_examples(path) == [
    TextExample("", "plain \u2028 text", f"{path} line 1"),
    TextExample("2+2=", "4", f"{path} line 3"),
    TextExample("", "日本\u2028 text", f"{path} line 4"),
  ]


def test_named_fields(tmp_path):
  # MBPP's prompt is called text.
  path = write(tmp_path / "a.jsonl", b'{"text": "Sort", "code": "sorted(x)"}')
  (example,) = read_examples(path, prompt_field="text", completion_field="code")
  assert (example.prompt, example.completion) == ("Sort", "sorted(x)")


def test_plain_text(tmp_path):
  path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone ", b"  ", b"", b"two\r")
  assert read_examples(path) == [
    TextExample("", "one ", f"{path} line 1"),
    TextExample("", "two", f"{path} line 4"),
  ]


@pytest.mark.parametrize(
  "line, message",
  [
    (b"{'text': 1}", "not JSON"),
    (b"[1]", "a JSON list"),
    (b'{"txt": "a"}', "expected 'text', or 'prompt' and 'completion'.*'txt'"),
    (b'{"prompt": "a"}', "but it has 'prompt'"),
    (b'{"text": 1}', "'text' is a int"),
    (b'{"prompt": null, "completion": "a"}', "'prompt' is a NoneType"),
    (b'{"prompt": "a", "completion": ""}', "no text to learn"),
    (b'{"text": "\xff"}', "not UTF-8"),
  ],
)
def test_bad_lines(tmp_path, line, message):
  path = write(tmp_path / "data.jsonl", b'{"text": "fine"}', line)
  with pytest.raises(InputError, match=rf"data\.jsonl line 2: .*{message}"):
    read_examples(path)


def test_bad_files(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    read_examples(tmp_path / "absent.jsonl")
  with pytest.raises(InputError, match="no such file"):
    read_examples(tmp_path)
  with pytest.raises(InputError, match=r"must end in \.jsonl"):
    read_examples(write(tmp_path / "a.csv", b"a,b"))
  with pytest.raises(InputError, match="holds no examples"):
    read_examples(write(tmp_path / "a.txt", b" "))


def test_fractions_are_nested():
  everything = [json.dumps(i) for i in range(1000)]
  small = take_fraction(everything, 0.05, seed=1)
  large = take_fraction(everything, 0.07, seed=1)
  assert (len(small), len(large)) == (50, 70)
  assert set(small) < set(large)
  assert large == sorted(large, key=int)
  assert small != take_fraction(everything, 0.05, seed=2)
  assert take_fraction(everything, 1, seed=1) == everything


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, 0.01])
def test_bad_fractions(fraction):
  with pytest.raises(InputError, match="fraction"):
    take_fraction([1, 2, 3], fraction, seed=0)
