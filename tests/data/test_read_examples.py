"""Tests of calm_jax.data.examples."""

import json

import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.data.examples import (
  ExampleSource,
  TextExample,
  read_examples,
  read_prompts,
  take_fraction,
)


def write(path, *lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


def read(path, **fields):
  return read_examples(ExampleSource(str(path), **fields))


def test_jsonl(tmp_path):
  path = write(
    tmp_path / "data.jsonl",
    b'{"text": "plain \\u2028 text"}',
    b"",
    b'{"prompt": "2+2=", "completion": "4", "text": "ignored"}',
    '{"text": "日本\u2028 text"}'.encode(),
  )
  assert read(path) == [
    TextExample("", "plain \u2028 text", f"{path} line 1"),
    TextExample("2+2=", "4", f"{path} line 3"),
    TextExample("", "日本\u2028 text", f"{path} line 4"),
  ]


def test_named_fields(tmp_path):
  # MBPP's prompt is called text.
  path = write(tmp_path / "a.jsonl", b'{"text": "Sort", "code": "sorted(x)"}')
  (example,) = read(path, prompt_field="text", completion_field="code")
  assert (example.prompt, example.completion) == ("Sort", "sorted(x)")


def test_plain_text(tmp_path):
  path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone ", b"  ", b"", b"two\r")
  assert read(path) == [
    TextExample("", "one ", f"{path} line 1"),
    TextExample("", "two", f"{path} line 4"),
  ]


@pytest.mark.parametrize(
  "line, message",
  [
    (b"{'text': 1}", "not JSON"),
    (b"[1]", "a JSON array"),
    (b'{"txt": "a"}', "expected 'text', or 'prompt' and 'completion'.*'txt'"),
    (b'{"prompt": "a"}', "but it has 'prompt'"),
    (b'{"text": 1}', "'text' is a int"),
    (b'{"prompt": null, "completion": "a"}', "'prompt' is a NoneType"),
    (b'{"prompt": "a", "completion": ""}', "no text to learn"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "half \\ud800"}', "UTF-8 can hold"),
    (b'{"a":' * 100_000, "not JSON"),
  ],
)
def test_bad_lines(tmp_path, line, message):
  path = write(tmp_path / "data.jsonl", b'{"text": "fine"}', line)
  with pytest.raises(InputError, match=rf"data\.jsonl line 2: .*{message}"):
    read(path)


def test_bad_files(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    read(tmp_path / "absent.jsonl")
  with pytest.raises(InputError, match="no such file"):
    read(tmp_path)
  with pytest.raises(InputError, match=r"must end in \.jsonl"):
    read(write(tmp_path / "a.csv", b"a,b"))
  with pytest.raises(InputError, match="holds no examples"):
    read(write(tmp_path / "a.txt", b" "))


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


def corrupted_jsonl(path):
  """10,000 lines, 100 of them bad in ten ways; returns their numbers."""
  ways = [
    b'{"prompt": "a", "completion": "b"',
    b"prompt\tcompletion",
    b'["a", "b"]',
    b"null",
    b'{"prompt": "a", "completion": 3}',
    b'{"prompt": ["a"], "completion": "b"}',
    b'{"prompt": "a"}',
    b'{"question": "a", "answer": "b"}',
    b'{"prompt": "a", "completion": ""}',
    b'{"prompt": "a", "completion": "caf\xe9"}',
  ]
  lines = [
    json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}).encode()
    for i in range(10_000)
  ]
  numbers = np.random.default_rng(0).permutation(10_000)[:100]
  for i, number in enumerate(numbers):
    lines[number] = ways[i % len(ways)]
  write(path, *lines)
  return sorted(int(number) + 1 for number in numbers)


def corrupted_tsv(path):
  """10,000 lines, 100 of them bad in five ways; returns their numbers."""
  ways = [b"one", b"a\tb\tc", b"\xff\tb", b"a\t", b"\tb"]
  lines = [f"{i}\t{-i}".encode() for i in range(10_000)]
  numbers = np.random.default_rng(1).permutation(10_000)[:100]
  for i, number in enumerate(numbers):
    lines[number] = ways[i % len(ways)]
  write(path, *lines)
  return sorted(int(number) + 1 for number in numbers)


@pytest.mark.parametrize(
  "corrupt, name, options",
  [
    (corrupted_jsonl, "a.jsonl", {}),
    (corrupted_tsv, "a.tsv", {"prompt": "{source}", "completion": "{target}"}),
  ],
)
def test_one_percent_of_corrupted_lines_are_each_named(
  tmp_path, corrupt, name, options
):
  path = tmp_path / name
  numbers = corrupt(path)
  messages = []
  allowing = ExampleSource(str(path), bad_lines=0.01, **options)
  examples = read_examples(allowing, messages.append)
  assert len(examples) == 9900
  bad = {f"{path} line {number}" for number in numbers}
  assert not bad & {example.origin for example in examples}
  (message,) = messages
  head, *lines = message.splitlines()
  assert head == f"{path}: 100 of 10,000 lines are bad (1.00%) and skipped:"
  assert [line.split(": ")[0] for line in lines] == [
    f"{path} line {number}" for number in numbers
  ]
  assert all(line.split(": ", 1)[1] for line in lines)  # why
  # A hair less, and it is fatal; the error names the first of them.
  with pytest.raises(InputError) as error:
    strict = ExampleSource(str(path), bad_lines=0.0099, **options)
    read_examples(strict, messages.append)
  text = str(error.value)
  assert "100 of 10,000 lines are bad (1.00%), more than bad_lines" in text
  for number in numbers[:10]:
    assert f"{path} line {number}: " in text
  assert text.endswith("and 90 more") and len(messages) == 1


def test_nothing_is_reported_of_good_files(tmp_path):
  path = write(tmp_path / "a.txt", b"one", b"", b"two")
  messages = []
  read_examples(ExampleSource(str(path), bad_lines=0.5), messages.append)
  assert messages == []


def test_patterns_of_files(tmp_path):
  for name in ("b.txt", "a.txt", "c.jsonl"):
    write(tmp_path / name, f'{{"text": "{name}"}}'.encode())
  found = read_examples(ExampleSource(f"{tmp_path}/*.txt"))
  assert [e.origin for e in found] == [
    f"{tmp_path}/a.txt line 1",
    f"{tmp_path}/b.txt line 1",
  ]
  mixed = read_examples(ExampleSource(f"{tmp_path}/*"))
  assert [e.completion for e in mixed][2] == "c.jsonl"
  with pytest.raises(InputError, match="no file's name is like it"):
    read_examples(ExampleSource(f"{tmp_path}/*.json"))
  # A name that reads as a pattern is that of a file if there is one.
  odd = write(tmp_path / "[x].txt", b"odd")
  assert [e.completion for e in read_examples(ExampleSource(str(odd)))] == [
    "odd"
  ]


def test_bad_lines_are_counted_over_all_files(tmp_path):
  write(tmp_path / "a.jsonl", *[b'{"text": "a"}'] * 8)
  write(tmp_path / "b.jsonl", b"{", b'{"text": "b"}')
  messages = []
  source = ExampleSource(f"{tmp_path}/*.jsonl", bad_lines=0.1)
  assert len(read_examples(source, messages.append)) == 9
  assert f"{tmp_path}/b.jsonl line 1: not JSON" in messages[0]


def test_every_line_is_bad(tmp_path):
  path = write(tmp_path / "a.jsonl", b"{", b"[]")
  with pytest.raises(InputError, match="every line is bad"):
    read_examples(ExampleSource(str(path), bad_lines=1.0))


def test_rows(tmp_path):
  lines = [b"{", *(b'{"text": "%d"}' % i for i in range(9))]
  path = write(tmp_path / "a.jsonl", *lines)

  def texts(rows):
    source = ExampleSource(str(path), rows=rows, bad_lines=0.1)
    return [int(example.completion) for example in read_examples(source)]

  assert texts(":3") + texts("3:") == texts("") == list(range(9))
  assert texts("-2:") == [7, 8] and texts("2:4") == [2, 3]
  with pytest.raises(InputError, match="'9:' of 9 good examples leave none"):
    texts("9:")
  for rows in ("3", "a:", "1:2:3", "-:"):
    with pytest.raises(InputError, match="rows"):
      texts(rows)


def test_lines_are_joined_to_longer_texts(tmp_path):
  path = write(tmp_path / "a.txt", *(b"%d" % i for i in range(9)))
  joined = read(path, rows="1:8", join=3, separator=", ")
  texts = [example.completion for example in joined]
  assert texts == ["1, 2, 3", "4, 5, 6", "7"]
  assert joined[1].origin == f"{path} line 5" and joined[1].is_plain
  with pytest.raises(InputError, match=r"join=2 .* plain text, and .* line 1"):
    read(path, join=2, prompt="{text}", completion="{text}")


def test_templates_of_a_source(tmp_path):
  path = write(
    tmp_path / "a.jsonl",
    b'{"q": {"de": "ja"}, "a": 3}',
    b'{"q": {"de": "nein"}}',
  )
  options = {"prompt": "{q[de]}? ", "completion": "{a}"}
  (example,) = read_examples(ExampleSource(str(path), bad_lines=0.5, **options))
  assert (example.prompt, example.completion) == ("ja? ", "3")
  with pytest.raises(
    InputError, match=r"a\.jsonl line 2: .*'\{a\}' asks for 'a', but it has 'q'"
  ):
    read_examples(ExampleSource(str(path), **options))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"kind": "csv"}, r"a\.txt: unknown kind 'csv'; one of jsonl, text"),
    ({"kind": "text", "target": "b"}, "target is of kind parallel"),
    ({"prompt": "{text}"}, "none of the completion"),
    ({"join": 0}, "join=0 must be 1 or more"),
    ({"bad_lines": 1.5}, "bad_lines 1.5 is a share"),
    ({"bad_lines": 1}, "every line is blank"),
    ({"completion": "{txt}"}, r"a\.txt: .*asks for 'txt', but there is 'text'"),
    ({"completion": "{"}, r"a\.txt: the template '\{' cannot be read"),
    ({"kind": "parallel"}, "a second file"),
    ({"kind": "tsv", "columns": ("a", "a")}, "repeat a name"),
    ({"kind": "tsv"}, "no column is called text, or prompt and completion"),
    ({"kind": "tsv", "columns": ("text", "b")}, "1 columns, where 2"),
  ],
)
def test_bad_sources(tmp_path, options, message):
  path = write(tmp_path / "a.txt", *([b"one"] if len(options) > 1 else [b" "]))
  with pytest.raises(InputError, match=message):
    read_examples(ExampleSource(str(path), **options))


def test_prompts(tmp_path):
  path = write(tmp_path / "a.jsonl", b'{"prompt": "a"}', b"", b'{"prompt": ""}')
  assert read_prompts(path) == ["a", ""]
  for line, message in [
    (b"{}", "it has no 'prompt'"),
    (b"[]", "a JSON array"),
    (b'{"prompt": 1}', "'prompt' is a int"),
  ]:
    with pytest.raises(InputError, match=f"a.jsonl line 1: .*{message}"):
      read_prompts(write(path, line))
  with pytest.raises(InputError, match="no such file"):
    read_prompts(tmp_path / "absent.jsonl")
