"""Tokenizers of checkpoints: text to token ids, their bytes, and back."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from calm_jax.core import hub
from calm_jax.core.errors import InputError
from calm_jax.text import backends, special_tokens, token_bytes

# Texts to encode a continuation behind, of which one does not merge with it.
_JOINTS = ("\n", ".", "a", "0")
_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
  """Text to token ids and back; made by `load_tokenizer`.

  Attributes:
    pieces: the vocabulary, piece by id; "" at ids that the vocabulary skips.
    stop_ids: ids that end a generation: `eos_id`, then the others of
      generation_config.json.
    source: the file or hub id that it was loaded from.
  """

  pieces: tuple[str, ...]
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]
  source: str
  _backend: backends.Backend

  def __repr__(self) -> str:
    return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

  @property
  def vocab_size(self) -> int:
    """The highest token id plus one (a model's table may be larger)."""
    return len(self.pieces)

  @property
  def fingerprint(self) -> str:
    """The sha256 of the vocabulary in order of id."""
    return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of `text`; no special token is added."""
    return list(self._backend.encode(text))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids` without special tokens and unknown ids.

    One leading space may be lost: see `decode_continuation`.
    """
    size = self.vocab_size
    return self._backend.decode([int(i) for i in ids if 0 <= i < size])

  def encode_continuation(self, prompt: str, completion: str) -> list[int]:
    """Returns the ids with which a model answers `completion` to `prompt`.

    They follow `encode(prompt)`, even if `encode(prompt + completion)` differs.
    """
    return self._continue(prompt, completion)[1]

  def encode_within(self, text: str) -> list[int]:
    """Returns the token ids of `text` where other text stands before it."""
    return self._behind_joint(text)[1]

  def byte_ends(self, text: str) -> tuple[list[int], np.ndarray]:
    """Returns `encode(text)` and the byte of its UTF-8 that each id ends at.

    Exact for byte-level BPE and SentencePiece; if they normalise the text, and
    for other tokenizers, by the offsets that they give. A token without text
    ends where the one before it does, and one that ends within a character that
    the offsets do not divide, before it. The ends never decrease.

    Raises:
      InputError: the tokenizer gives no offsets that can be relied upon.
    """
    spans, spelling = self._backend.spans(text), self._backend.spelling
    if spelling.pieces is not None:
      spelled = self.spell(spans.ids)
      ends = token_bytes.known_ends(spelled, text)
      if ends is None and spelling.skips:
        # Its own offsets leave out the characters that it passes over.
        ends = token_bytes.searched_ends(spelled, text)
      if ends is not None:
        return spans.ids, ends
    if spelling.skips:
      raise self._unfit("passes over characters and changes others")
    return spans.ids, token_bytes.covered_ends(spans)

  def continuation_ends(
    self, prompt: str, completion: str
  ) -> tuple[list[int], np.ndarray]:
    """Returns `encode_continuation` and the byte that each id ends at.

    Bytes count from the start of `prompt`. Raises as `byte_ends`.
    """
    context, ids = self._continue(prompt, completion)
    ends = self.byte_ends(context + completion)[1]
    ends = ends[len(ends) - len(ids) :] - len(context.encode())
    return ids, len(prompt.encode()) + np.maximum(ends, 0)

  def spell(
    self, ids: Sequence[int], previous: Sequence[int] = ()
  ) -> list[bytes]:
    """Returns the bytes that each of `ids` adds to the text of `previous`.

    A token may hold a part of a character, and lose a space where it starts a
    text. Special and unknown tokens add nothing.

    Raises:
      InputError: the tokenizer's decoder changes text that it has written.
    """
    pieces, strips, _ = self._backend.spelling
    if pieces is None:
      return self._spell_by_decoding(ids, previous)
    size = self.vocab_size
    parts = [pieces[i] if 0 <= i < size else b"" for i in ids]
    first = next((n for n, part in enumerate(parts) if part), None)
    begins = not any(pieces[i] for i in previous if 0 <= i < size)
    if strips and begins and first is not None:
      parts[first] = parts[first].removeprefix(b" ")
    return parts

  def decode_continuation(
    self, prompt_ids: Sequence[int], new_ids: Sequence[int]
  ) -> str:
    """Returns the text that `new_ids` add to that of `prompt_ids`."""
    prompt = self.decode(prompt_ids)
    joined = self.decode([*prompt_ids, *new_ids])
    if not joined.startswith(prompt):
      # The prompt ended within a character, which `new_ids` complete.
      prompt = prompt.rstrip("\ufffd")
    return joined.removeprefix(prompt)

  def _continue(self, prompt: str, completion: str) -> tuple[str, list[int]]:
    """Returns a text to encode `completion` behind, and its ids there."""
    ids = self.encode(prompt)
    joined = self.encode(prompt + completion)
    if joined[: len(ids)] == ids:
      return prompt, joined[len(ids) :]
    # A token straddles the boundary. Encoding the completion alone would add
    # the space that Llama-style tokenizers put before a text.
    return self._behind_joint(completion)

  def _behind_joint(self, text: str) -> tuple[str, list[int]]:
    for context in _JOINTS:
      ids = self.encode(context)
      joined = self.encode(context + text)
      if ids and joined[: len(ids)] == ids:
        return context, joined[len(ids) :]
    return "", self.encode(text)

  def _spell_by_decoding(self, ids, previous) -> list[bytes]:
    before, parts = list(previous), []
    text = self.decode(before)
    for index in ids:
      before.append(int(index))
      longer = self.decode(before)
      if not longer.startswith(text):
        raise self._unfit("changes text that it has already written")
      parts.append(longer[len(text) :].encode())
      text = longer
    return parts

  def _unfit(self, reason: str) -> InputError:
    return InputError(
      f"the tokenizer of {self.source} {reason}, so that nobody can tell where "
      "its tokens end in a text; it cannot be the anchor's of models with "
      "different tokenizers"
    )


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
  """Loads the tokenizer of a checkpoint folder, a file or a hub repository.

  A folder's tokenizer.json is preferred, then tokenizer.model (SentencePiece),
  then vocab.json with merges.txt. No code of the repository is run.

  Raises:
    InputError: nothing there, no tokenizer in it, or a file cannot be read.
  """
  name, path = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
  if path.is_file():
    parent = path.parent if path.name in _FILES else None
    return _make(_read(path), parent, str(path))
  if not path.is_dir():
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
      raise InputError(
        f"no tokenizer at {name}: neither a file nor a folder; give one of "
        "them, or a hub id such as owner/name"
      )
    path = hub.locate(name, files=(*hub.TEXT_FILES, hub.CONFIG)).folder
  for file in _FILES:
    if (path / file).is_file():
      return _make(_read(path / file), path, name)
  if all((path / file).is_file() for file in ("vocab.json", "merges.txt")):
    slow = special_tokens.convert_slow(path)
    return _make(backends.HuggingFaceBackend(slow), path, name)
  raise InputError(
    f"{name} has none of tokenizer.json, tokenizer.model, vocab.json with "
    "merges.txt; copy one of them there"
  )


def find_tokenizer(folder: Path) -> Tokenizer | None:
  """Loads the tokenizer of a checkpoint's folder, None if it has none."""
  if any((folder / name).is_file() for name in (*_FILES, "merges.txt")):
    return load_tokenizer(folder)
  return None


def train_sentencepiece(
  texts: Iterable[str],
  path_prefix: str | Path,
  *,
  vocab_size: int,
  user_defined_symbols: Sequence[str] = (),
  split_digits: bool = True,
  model_type: str = "bpe",
  character_coverage: float = 1.0,
) -> Tokenizer:
  """Trains a SentencePiece model and writes it to `path_prefix`.model.

  Text is kept as it is: no normalisation, no space put in front. Ids 0 to 3
  are pad, bos, eos and unk. Two runs on the same texts write the same bytes.

  Raises:
    InputError: the texts cannot fill `vocab_size`, or another bad setting.
  """
  path = Path(f"{path_prefix}.model")
  written = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      # Written through memory: the model file records the path it was given.
      model_writer=written,
      vocab_size=vocab_size,
      user_defined_symbols=list(user_defined_symbols),
      split_digits=split_digits,
      model_type=model_type,
      character_coverage=character_coverage,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      num_threads=1,
      minloglevel=2,
    )
  except (RuntimeError, OSError, ValueError) as error:
    raise InputError(f"cannot train the tokenizer {path}: {error}") from error
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(written.getvalue())
  return load_tokenizer(path)


def _read(path: Path) -> backends.Backend:
  if path.suffix == ".json":
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
      raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    return backends.HuggingFaceBackend(tokenizer)
  try:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (RuntimeError, OSError) as error:
    raise InputError(f"cannot read {path} as SentencePiece: {error}") from error
  return backends.SentencePieceBackend(model)


def _make(
  backend: backends.Backend, folder: Path | None, source: str
) -> Tokenizer:
  ids = special_tokens.special_ids(folder, backend.vocab, backend.special_ids)
  return Tokenizer(
    pieces=backend.pieces, source=source, _backend=backend, **ids
  )
