"""Every reader of files of lines, on files as people have them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import pathlib
import re
import zipfile
from collections.abc import Callable

import pytest

from calm_jax.core.errors import InputError
from calm_jax.data.examples import ExampleSource, read_examples, read_prompts
from calm_jax.evals import code_execution, code_to_text, fewshot, maths
from calm_jax.evals.translation import read_flores, read_pairs
from calm_jax.reporting import predictions

TEXTS = (
  *("uma casa \u2028 azul", "um\u0085dois\x0b\x0c três", " dois "),
  *("日本\u00a0\U0001f600", "\ufeffum", "caf\u00e9 e cafe\u0301"),
)


@dataclasses.dataclass(frozen=True)
class Reader:
  name: str  # of the file
  write: Callable[[str], str]  # a text to its line
  read: Callable[[pathlib.Path], list[str]]

  @property
  def is_json(self):
    return self.write("a").startswith("{")


def json_line(field, **others):
  return lambda text: json.dumps({field: text} | others, ensure_ascii=False)


def training(columns=("text",), parallel=False):
  def read(path):
    target = str(path) if parallel else ""
    source = ExampleSource(str(path), columns=columns, target=target)
    return [example.completion for example in read_examples(source)]

  return read


def of_field(name, read):
  return lambda path: [row[name] for row in read(path)]


def flores(as_zip):
  """The file as both languages of FLORES, in a folder or a zip file."""

  def read(path):
    names = [f"dev/{code}.dev" for code in ("lij_Latn", "eng_Latn")]
    place = path.parent / ("flores.zip" if as_zip else "flores")
    if as_zip:
      with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
          archive.writestr(f"flores200_dataset/{name}", path.read_bytes())
    else:
      (place / "dev").mkdir(parents=True)
      for name in names:
        (place / name).write_bytes(path.read_bytes())
    return [pair["source"] for pair in read_flores(place, "lij_Latn", "dev")]

  return read


def same(text):
  return text


READERS = {
  "training jsonl": Reader("a.jsonl", json_line("text"), training()),
  "training text": Reader("a.txt", same, training()),
  "training tsv": Reader(
    "a.TSV", "{}\tb".format, training(columns=("text", "b"))
  ),
  "training parallel": Reader(
    "a.lij", same, training(columns=("b", "text"), parallel=True)
  ),
  "prompts": Reader("a.jsonl", json_line("prompt"), read_prompts),
  "humaneval": Reader(
    "a.jsonl",
    json_line("prompt", task_id="", test="", entry_point=""),
    of_field("prompt", code_execution.read_humaneval),
  ),
  "mbpp": Reader(
    "a.jsonl",
    lambda text: json_line(
      "text", task_id=abs(hash(text)), code="", test_setup_code="", test_list=[]
    )(text),
    of_field("text", lambda path: code_execution.read_mbpp(path).values()),
  ),
  "gsm8k": Reader(
    "a.jsonl",
    json_line("question", answer="#### 1"),
    of_field("question", maths.read_gsm),
  ),
  "mgsm": Reader("a.tsv", "{}\t1".format, of_field("question", maths.read_gsm)),
  "flores folder": Reader("a", same, flores(as_zip=False)),
  "flores zip": Reader("a", same, flores(as_zip=True)),
  "aligned files": Reader(
    "a.txt",
    same,
    of_field("source", lambda path: read_pairs(path, path, "lij_Latn")),
  ),
  "codexglue": Reader(
    "a.jsonl",
    lambda text: json_line(
      "code_tokens", language="go", docstring_tokens=["b"]
    )([text.replace(" ", "_")]),
    lambda path: [
      row["code"].replace("_", " ") for row in code_to_text.read_codexglue(path)
    ],
  ),
  "predictions": Reader(
    "a.jsonl",
    json_line("prompt", prediction="b", correct=True),
    of_field("prompt", predictions.read_rows),
  ),
}
BOM = b"\xef\xbb\xbf"
LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CRCRLF": b"\r\r\n", "CR": b"\r"}
VARIANTS = {
  "plain": lambda lines: b"".join(line + b"\n" for line in lines),
  "no last newline": b"\n".join,
  "CRLF, no last one": b"\r\n".join,
  "CR, no last one": b"\r".join,
  "a BOM": lambda lines: BOM + b"\n".join(lines),
  "a BOM and CRLF": lambda lines: BOM + b"\r\n".join(lines),
  "a BOM and CR": lambda lines: BOM + b"\r".join(lines),
  "files with BOMs, joined": lambda lines: BOM + (b"\n" + BOM).join(lines),
  "blank lines": lambda lines: b"\n  \n" + b"\n\n\r\n".join(lines) + b"\n\n\n",
  "gzip": lambda lines: gzip.compress(b"\n".join(lines)),
  "gzip of CRLF and a BOM": lambda lines: gzip.compress(
    BOM + b"".join(line + b"\r\n" for line in lines)
  ),
  "gzip of CR": lambda lines: gzip.compress(b"\r".join(lines) + b"\r"),
  "joined gzips": lambda lines: b"".join(
    gzip.compress(line + b"\n") for line in lines
  ),
} | {
  name: lambda lines, end=end: b"".join(line + end for line in lines)
  for name, end in LINE_ENDS.items()
}


JSON_READERS = [reader for reader in READERS.values() if reader.is_json]


@pytest.fixture(params=READERS)
def reader(request):
  return READERS[request.param]


@pytest.mark.parametrize("variant", VARIANTS)
def test_texts_are_read_alike(reader, variant, tmp_path):
  suffix = ".gz" if variant == "gzip" else ""  # The others by their content.
  path = tmp_path / (reader.name + suffix)
  texts = list(TEXTS)
  if not reader.is_json:
    # A BOM at the beginning of a line is none of its text.
    texts = [text.removeprefix("\ufeff") for text in texts]
    if "CR" not in variant:
      texts.append("um\rdois")
  lines = [reader.write(text).encode() for text in texts]
  path.write_bytes(VARIANTS[variant](lines))
  expected = texts
  if reader is READERS["codexglue"]:  # Its code has no line ends.
    expected = [" ".join(text.replace(" ", "_").split()) for text in texts]
    expected = [text.replace("_", " ") for text in expected]
  assert reader.read(path) == expected


GOOD = "café do Zé"
# What lines are made of, and what is said of it.
UNREADABLE = {
  "latin-1": (lambda text: text.encode("latin-1"), "line 1: .*not UTF-8.*0xe9"),
  "latin-1 later": (
    lambda text: text.encode() + text.encode("latin-1"),
    "line 3: .*not UTF-8.*0xe9",
  ),
  "latin-1 in gzip": (
    lambda text: gzip.compress(text.encode("latin-1")),
    "line 1: .*not UTF-8.*0xe9",
  ),
  "UTF-16": (lambda text: text.encode("utf-16"), "line 1: .*UTF-16"),
  "UTF-16, big end": (
    lambda text: ("\ufeff" + text).encode("utf-16-be"),
    "line 1: .*UTF-16",
  ),
  "UTF-16 without a BOM": (
    lambda text: text.encode("utf-16-le"),
    "line 1: .*UTF-16",
  ),
  "UTF-32": (lambda text: text.encode("utf-32"), "line 1: .*NUL"),
  "a file system's zeros": (
    lambda text: text.encode() + b"\0" * 500,
    "line 3: .*NUL",
  ),
  "gzip, cut": (
    lambda text: gzip.compress(text.encode())[:-9],
    "cannot be read",
  ),
  "gzip, cut later": (
    lambda text: gzip.compress(text.encode()) + b"\x1f\x8b\x08",
    "cannot be read after line 2",
  ),
  "gzip with something after it": (
    lambda text: gzip.compress(text.encode()) + b"what",
    "cannot be read after line 2: Not a gzipped file",
  ),
  "gzip, damaged": (
    lambda text: gzip.compress(text.encode(), mtime=0)[:12] + b"\xff" * 60,
    "cannot be read",
  ),
  "zstd": (lambda text: b"\x28\xb5\x2f\xfd\x04", "compressed by zstd"),
  "xz": (lambda text: lzma.compress(text.encode()), "compressed by xz"),
  "zip": (lambda text: b"PK\x03\x04\x14", "is no file of lines.*zip file"),
  "a pointer": (
    lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "git lfs pull",
  ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_named(reader, kind, tmp_path):
  encode, message = UNREADABLE[kind]
  path = tmp_path / reader.name
  path.write_bytes(encode(f"{reader.write(GOOD)}\n" * 2))
  with pytest.raises(InputError, match=message) as raised:
    reader.read(path)
  assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("reader", JSON_READERS)
@pytest.mark.parametrize("layout", ["[{}]", "[{},\n{}]\n", "[\n{},\n{}\n]\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_array_is_named(reader, layout, bom, tmp_path):
  line = reader.write(GOOD)
  path = tmp_path / reader.name
  path.write_text(bom + layout.format(line, line), encoding="utf-8")
  with pytest.raises(InputError, match=r"line 1: a JSON array, .*jq -c"):
    reader.read(path)


@pytest.mark.parametrize("reader", JSON_READERS)
def test_half_a_character_is_named(reader, tmp_path):
  path = tmp_path / reader.name
  good = reader.write(GOOD)
  path.write_text(f"{good}\n{good.replace(GOOD, chr(92) + 'ud83d')}\n")
  path.write_text(path.read_text().replace(GOOD.replace(" ", "_"), r"\udc00"))
  with pytest.raises(InputError, match=r"line [12]: .*UTF-8 can hold"):
    reader.read(path)


@pytest.mark.parametrize("reader", JSON_READERS)
@pytest.mark.parametrize("value", [1, None, {}, True, [None]])
def test_a_field_of_another_type_is_named(reader, value, tmp_path):
  path = tmp_path / reader.name
  record = json.loads(reader.write(GOOD))
  name = next(iter(record))
  path.write_text(f"{reader.write(GOOD)}\n{json.dumps(record | {name: value})}")
  with pytest.raises(
    InputError, match=f"line 2: .*'{name}'(\\[0\\])? is a \\w+, where"
  ):
    reader.read(path)


def test_the_sanitized_mbpp_is_named(tmp_path):
  path = tmp_path / "sanitized-mbpp.json"
  path.write_text('[{"task_id": 2, "prompt": "Sort."}]')
  with pytest.raises(InputError, match=r"JSON array.*its sanitized part"):
    code_execution.read_mbpp(path)
  path.write_text('{"task_id": 2, "prompt": "Sort."}')
  with pytest.raises(InputError, match=r"no 'text'.*its sanitized part"):
    code_execution.read_mbpp(path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.parquet", "a"])
def test_names_that_say_no_kind(name, tmp_path):
  (tmp_path / name).write_text('[{"text": "a"}]')
  with pytest.raises(InputError, match=r"must end in \.jsonl .*\.gz"):
    read_examples(ExampleSource(str(tmp_path / name)))


# Named, since gzip writes the time into its head.
@pytest.mark.parametrize("data", [
  pytest.param(b"", id="empty"), pytest.param(b"\n", id="newline"),
  pytest.param(BOM, id="BOM"),
  pytest.param(gzip.compress(b"\r\n \n"), id="gzip"),
])  # fmt: skip
def test_nothing_is_no_text(reader, data, tmp_path):
  path = tmp_path / reader.name
  path.write_bytes(data)
  try:
    assert reader.read(path) == []
  except InputError as error:
    assert re.search("no examples|empty", str(error))


def test_pairs_of_lines(tmp_path):
  def pairs(source, target):
    paths = tmp_path / "a.lij", tmp_path / "a.eng"
    for path, data in zip(paths, (source, target), strict=True):
      path.write_bytes(data)
    return [
      (pair["id"], pair["source"], pair["target"])
      for pair in read_pairs(*paths, "lij_Latn")
    ]

  expected = [(1, "Uña", "One"), (3, "Doe", "Two")]
  lines = "Uña\r\n\r\nDoe".encode()
  assert pairs(lines, b"One\n\nTwo\n") == expected
  # Editors leave blank lines at the end.
  assert pairs(lines + b"\n\n", b"One\r\rTwo") == expected
  assert pairs(lines, gzip.compress(b"One\n \nTwo\n \n\n")) == expected
  with pytest.raises(InputError, match=r"a\.eng line 2: it is empty in .*lij"):
    pairs(lines, b"One\nOr\nTwo")
  with pytest.raises(InputError, match=r"a\.eng has 4"):
    pairs(lines, b"One\n\nTwo\nThree")


def test_which_flores(tmp_path):
  folder = tmp_path / "dev"
  folder.mkdir()
  for name in ("lij_Latn.dev", "eng_Latn.dev"):
    (folder / name).write_text("Un.\n")
  place = tmp_path / "elsewhere"
  place.mkdir()
  archive = zipfile.ZipFile(place / "flores.zip", "w")
  with archive, pytest.warns(UserWarning, match="Duplicate name"):
    for _ in range(2):
      archive.writestr("dev/lij_Latn.dev", "Un.\n")
  with pytest.raises(
    InputError, match=r"flores\.zip holds several files of one"
  ):
    read_flores(place, "lij_Latn", "dev")
  # Only what it is asked for counts: macOS puts such folders into its zips.
  with zipfile.ZipFile(place / "flores.zip", "w") as archive:
    for name in ("lij_Latn.dev", "eng_Latn.dev"):
      archive.writestr(f"dev/{name}", "Un.\n")
      archive.writestr(f"__MACOSX/dev/._{name}", "")
  assert len(read_flores(place, "lij_Latn", "dev")) == 1
  (folder / "eng_Latn.dev").unlink()
  (folder / "eng_Latn.dev.gz").write_bytes(gzip.compress(b"One.\n"))
  folder.rename(place / "dev")
  assert len(read_flores(tmp_path, "lij_Latn", "dev")) == 1
  other = tmp_path / "other" / "dev"
  other.mkdir(parents=True)
  with pytest.raises(InputError, match="several folders dev/"):
    read_flores(tmp_path, "lij_Latn", "dev")


def test_a_prompt_file(tmp_path):
  path = tmp_path / "mine.txt"
  path.write_bytes(BOM + "Pergunta: {q}\r\nÉ: {a}\r\n".encode())
  template = fewshot.load_template(path)
  assert template.before == "Pergunta: {q}\nÉ: "
  assert template.stop == "\nPergunta:"
  path.write_bytes("Pergunta: {q}\nÉ: {a}\n".encode("latin-1"))
  with pytest.raises(InputError, match=r"mine\.txt line 2: not UTF-8"):
    fewshot.load_template(path)
