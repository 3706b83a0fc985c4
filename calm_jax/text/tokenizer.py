"""Tokenizers of checkpoints: text to token ids, their bytes, and back."""

import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from calm_jax.core.errors import InputError
from calm_jax.text import backends
from calm_jax.text.special_tokens import special_ids

# Texts to encode a continuation behind, of which one does not merge with it.
_JOINTS = ("\n", ".", "a", "0")
_FILES = ("tokenizer.json", "tokenizer.model", "merges.txt")


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
  """Text to token ids and back; made by `load_tokenizer`."""

  pieces: tuple[str, ...]  # by id; "" at ids that the vocabulary skips
  bos_id: int | None
  eos_id: int | None
  # They end a generation: `eos_id`, then others of generation_config.json.
  stop_ids: tuple[int, ...]
  source: str  # the file or folder that it was loaded from
  _backend: backends.Backend
  # Of the table of the model that it belongs to, which may be fewer or more
  # than there are tokens; None if it belongs to none.
  rows: int | None = None

  def __repr__(self) -> str:
    return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

  @property
  def vocab_size(self) -> int:
    """The highest token id plus one (a model's table may be larger)."""
    return len(self.pieces)

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of the vocabulary in order of id."""
    return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

  @functools.cached_property
  def ids(self) -> np.ndarray:
    """All token ids, ascending; a vocabulary may skip some numbers."""
    return np.sort(np.fromiter(self._backend.vocab.values(), np.int64))

  def with_rows(self, rows: int) -> "Tokenizer":
    """The tokenizer of a model whose embedding table has so many rows."""
    same = self.rows == rows
    return self if same else dataclasses.replace(self, rows=rows)

  def check(self, ids: list[int]) -> list[int]:
    """Returns `ids`; raises InputError if the model has no row for one."""
    rows = self.vocab_size if self.rows is None else self.rows
    if ids and max(ids) >= rows:
      beyond = next(i for i in ids if i >= rows)
      piece = self.pieces[beyond] if beyond < self.vocab_size else "?"
      raise InputError(
        f"the token {piece!r} has id {beyond}, and the model's table has "
        f"{rows} rows, for ids 0 to {rows - 1}: the tokenizer of {self.source} "
        "knows more tokens than its model; leave that token out of the text, "
        "or use a model whose embeddings were resized for it"
      )
    return ids

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of `text`; no special token is added.

    Raises as `check`, as does all that makes ids of text.
    """
    return self.check(list(self._backend.encode(text)))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids` without special tokens and unknown ids.

    One leading space may be lost: see `decode_continuation`.
    """
    size = self.vocab_size
    return self._backend.decode([int(i) for i in ids if 0 <= i < size])

  def with_bos(self, ids: list[int]) -> list[int]:
    """Returns the ids behind the BOS token, if there is one."""
    return ids if self.bos_id is None else self.check([self.bos_id]) + ids

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
    the offsets do not divide, before it. The ends never decrease. Raises
    InputError if the tokenizer gives no offsets that can be relied upon.
    """
    spans, spelling = self._backend.spans(text), self._backend.spelling
    self.check(list(spans.ids))
    if spelling.pieces is not None:
      spelled = self.spell(spans.ids)
      if b"".join(spelled) == text.encode():
        sizes = [len(part) for part in spelled]
        return spans.ids, np.cumsum(sizes, dtype=np.int64)
      if spelling.skips:
        # Its own offsets leave out the characters that it passes over.
        ends = _searched_ends(spelled, text)
        if ends is not None:
          return spans.ids, ends
    if spelling.skips:
      raise self._unfit("passes over characters and changes others")
    return spans.ids, _covered_ends(spans)

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
    text. Special and unknown tokens add nothing. Raises InputError if the
    tokenizer's decoder changes text that it has written.
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


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Loads a tokenizer's file, or that of a folder.

  A folder's tokenizer.json is preferred, then tokenizer.model (SentencePiece),
  then vocab.json with merges.txt. No code of the folder is run. Raises
  InputError if nothing is there, or a file cannot be read.
  """
  path = Path(path).expanduser()
  found = _load(path, path) if path.is_file() else find_tokenizer(path)
  if found is None:
    raise InputError(
      f"no tokenizer at {path}: neither a file nor a folder with one of "
      "tokenizer.json, tokenizer.model, vocab.json with merges.txt; copy one "
      "of them there"
    )
  return found


def find_tokenizer(folder: Path) -> Tokenizer | None:
  """Loads the tokenizer of a checkpoint's folder, None if it has none."""
  for name in _FILES:
    if (folder / name).is_file():
      return _load(folder / name, folder)
  return None


def _load(file: Path, source: Path) -> Tokenizer:
  backend = backends.read(file)
  folder = file.parent if file.name in _FILES else None
  ids = special_ids(folder, backend.vocab, backend.special_ids)
  return Tokenizer(backend.pieces, source=str(source), _backend=backend, **ids)


def _searched_ends(spelled: list[bytes], text: str) -> np.ndarray | None:
  """Ends of tokens that leave out characters of a text.

  None if the tokens are not found in the text in their order.
  """
  data, at, ends = text.encode(), 0, []
  for part in spelled:
    if part:
      # Both stand for a space.
      pattern = re.escape(part).replace(rb"\ ", b"(?: |\xe2\x96\x81)")
      match = re.compile(pattern).search(data, at)
      if match is None:
        return None
      at = match.end()
    ends.append(at)
  return np.array(ends, np.int64)


def _covered_ends(spans: backends.Spans) -> np.ndarray:
  """Ends by the bytes that tokens cover, never within a character.

  Of several tokens that share a character, all but the last end before it.
  """
  begins, ends = (np.array(x, np.int64) for x in (spans.begins, spans.ends))
  later = np.minimum.accumulate(begins[::-1])[::-1]
  ends[:-1] = np.minimum(ends[:-1], later[1:])
  return np.maximum.accumulate(ends)


def train_sentencepiece(
  texts: Iterable[str], path_prefix: str | Path, *, vocab_size: int, **options
) -> Tokenizer:
  """Trains a SentencePiece model and writes it to `path_prefix`.model.

  Text is kept as it is: no normalisation, no space put in front. Ids 0 to 3
  are pad, bos, eos and unk. Two runs on the same texts write the same bytes.
  The trainer's `options` replace these defaults. Raises InputError if the
  texts cannot fill `vocab_size`, or for another bad setting.
  """
  path = Path(f"{path_prefix}.model")
  written = io.BytesIO()
  defaults = {
    "model_type": "bpe",
    "split_digits": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "num_threads": 1,
    "minloglevel": 2,
  }
  ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      # Written through memory: the model file records the path it was given.
      model_writer=written,
      vocab_size=vocab_size,
      **defaults | ids | options,
    )
  except (RuntimeError, OSError, ValueError) as error:
    raise InputError(f"cannot train the tokenizer {path}: {error}") from error
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(written.getvalue())
  return load_tokenizer(path)
