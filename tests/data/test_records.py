"""Tests of calm_jax.data.records, through the sources that use them."""

import subprocess
import sys

import pytest

from calm_jax.core.errors import InputError
from calm_jax.data.examples import ExampleSource, read_examples

PAIRS = {"prompt": "{source} =", "completion": " {target}"}


def write(path, data):
  path.write_bytes(data)
  return str(path)


def texts(examples):
  return [(example.prompt, example.completion) for example in examples]


def test_tsv(tmp_path):
  data = '\ufeffone\tuno\r\n\r\n "two" \tdos\u2028\r\ntrês\ttrés'.encode()
  path = write(tmp_path / "a.tsv", data)
  examples = read_examples(ExampleSource(path, **PAIRS))
  assert texts(examples) == [
    ("one =", " uno"),
    (' "two"  =', " dos\u2028"),
    ("três =", " trés"),
  ]
  lines = [f"{path} line {number}" for number in (1, 3, 4)]
  assert [example.origin for example in examples] == lines
  named = ExampleSource(path, columns=("prompt", "completion"))
  assert texts(read_examples(named))[0] == ("one", "uno")
  # Of another suffix, when its kind is given.
  other = write(tmp_path / "a.en-es", data)
  assert len(read_examples(ExampleSource(other, kind="tsv", **PAIRS))) == 3


def test_bad_columns(tmp_path):
  path = write(tmp_path / "a.tsv", b"one\tuno\ntwo dos\nthree\ttres\t3\n")
  messages = []
  source = ExampleSource(path, bad_lines=0.7, **PAIRS)
  assert len(read_examples(source, messages.append)) == 1
  _, second, third = messages[0].splitlines()
  assert f"{path} line 2: 1 columns, where 2 are expected (source," in second
  assert f"{path} line 3: 3 columns" in third


def test_parallel(tmp_path):
  one = write(tmp_path / "a.eng", b"\xef\xbb\xbfone\r\n\r\ntwo\n")
  two = write(tmp_path / "a.spa", b"\xef\xbb\xbfuno\n\ndos")
  source = ExampleSource(
    one, target=two, columns=("eng", "spa"), completion="{spa}"
  )
  examples = read_examples(source)
  assert texts(examples) == [("", "uno"), ("", "dos")]
  assert examples[1].origin == f"{one} and {two} line 3"


@pytest.mark.parametrize("extra", [b"", b"\n"])
def test_parallel_files_of_other_lengths(tmp_path, extra):
  one = write(tmp_path / "a.eng", b"x\n" * 1200 + extra)
  two = write(tmp_path / "a.spa", b"x\n" * 1300)
  count = 1200 + len(extra)
  with pytest.raises(
    InputError, match=rf"a\.eng has {count:,} lines and .*a\.spa has 1,300"
  ):
    read_examples(ExampleSource(one, target=two, **PAIRS))
  with pytest.raises(
    InputError, match=rf"a\.spa has 1,300 lines and .*a\.eng has {count:,}"
  ):
    read_examples(ExampleSource(two, target=one, **PAIRS))


def test_an_empty_side_is_bad(tmp_path):
  one = write(tmp_path / "a.eng", b"one\n \nthree\nfo\xffur\n")
  two = write(tmp_path / "a.spa", b"uno\ndos\n\ncuatro\n")
  messages = []
  source = ExampleSource(one, target=two, bad_lines=0.75, **PAIRS)
  assert texts(read_examples(source, messages.append)) == [("one =", " uno")]
  _, second, third, fourth = messages[0].splitlines()
  assert f"line 2: it is empty in {one}, and not" in second
  assert f"line 3: it is empty in {two}, and not" in third
  assert f"line 4: {one}: not UTF-8" in fourth
  with pytest.raises(InputError, match=r"no examples at .*absent"):
    read_examples(ExampleSource(one, target=f"{two}.absent", **PAIRS))


# Dataset: five rows {"n": i, "text": "é text i"}, prepared without a network.
PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="short")]

  def _info(self):
    features = {"text": tfds.features.Text(), "n": np.int64}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    counts = {"train": 5, "test": 2}
    return {name: self._generate_examples(n) for name, n in counts.items()}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"text": f"é text {i}", "n": i}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

READ = """
import sys
from calm_jax.data.examples import ExampleSource, read_examples

folder = sys.argv[1]
source = ExampleSource(
  "tfds:tiny/short", data_dir=folder, completion="{n} {text}"
)
examples = read_examples(source)
assert sorted(e.completion for e in examples) == [
  f"{i} é text {i}" for i in range(5)
], examples
assert examples[3].origin == "tfds:tiny/short train row 3"
test = ExampleSource("tfds:tiny/short", data_dir=folder, split="test[:1]")
some = read_examples(test)
assert len(some) == 1 and some[0].completion.startswith("é text")
assert "tensorflow" not in sys.modules
"""


def python(code, *arguments):
  command = [sys.executable, "-c", code, *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True)


def test_tfds_without_tensorflow(tmp_path):
  run = python(PREPARE, tmp_path)
  assert run.returncode == 0, run.stderr[-3000:]
  run = python(READ, tmp_path)
  assert run.returncode == 0, run.stderr[-3000:]
  for path, split in (("tfds:tiny/short", "dev"), ("tfds:absent", "train")):
    with pytest.raises(
      InputError, match=f"cannot read {path}, split '{split}'"
    ):
      read_examples(ExampleSource(path, split=split, data_dir=str(tmp_path)))


@pytest.fixture
def datasets(tmp_path, monkeypatch):
  found = pytest.importorskip(
    "datasets", reason="the extra hf is not installed"
  )
  monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  monkeypatch.setattr(found.config, "HF_HUB_OFFLINE", True)
  return found


def test_hf_saved_to_disk(tmp_path, datasets):
  rows = [
    {"translation": {"en": f"{i}", "es": f"{-i}"}, "text": None}
    for i in range(4)
  ]
  made = datasets.Dataset.from_list(rows)
  splits = datasets.DatasetDict({"train": made, "test": made.select([1])})
  splits.save_to_disk(tmp_path / "splits")
  pair = {"prompt": "{translation[en]}=", "completion": "{translation[es]}"}
  path = f"hf:{tmp_path}/splits"
  examples = read_examples(ExampleSource(path, **pair))
  assert texts(examples) == [(f"{i}=", f"{-i}") for i in range(4)]
  assert examples[2].origin == f"{path} train row 2"
  assert texts(read_examples(ExampleSource(path, split="test", **pair))) == [
    ("1=", "-1")
  ]
  with pytest.raises(InputError, match="no split 'dev'; it has train, test"):
    read_examples(ExampleSource(path, split="dev", **pair))
  with pytest.raises(InputError, match="row 0: 'text' is a NoneType"):
    read_examples(ExampleSource(path))
  made.save_to_disk(tmp_path / "one")
  assert len(read_examples(ExampleSource(f"hf:{tmp_path}/one", **pair))) == 4
  with pytest.raises(InputError, match="no split 'test'; it has train"):
    read_examples(ExampleSource(f"hf:{tmp_path}/one", split="test", **pair))


def test_hf_folder_of_files(tmp_path, datasets):
  folder = tmp_path / "files"
  folder.mkdir()
  made = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
  made.to_parquet(folder / "train-0.parquet")
  path = f"hf:{folder}"
  assert texts(read_examples(ExampleSource(path))) == [("", t) for t in "abc"]
  sliced = ExampleSource(f"{path}:default", split="train[1:]")
  assert texts(read_examples(sliced)) == [("", "b"), ("", "c")]
  for changes in ({"split": "test"}, {"path": f"{path}:other"}):
    with pytest.raises(InputError, match=f"cannot read {path}"):
      read_examples(ExampleSource(**{"path": path} | changes))


def test_hf_without_datasets(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(
    InputError, match=r"hf:a/b: .*pip install 'calm_jax\[hf\]'"
  ):
    read_examples(ExampleSource("hf:a/b:c"))
