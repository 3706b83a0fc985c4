"""Tokenizers of checkpoints: text to token ids, their bytes, and back."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_text
from calm_jax.text import backends, side_files

# Texts to encode a continuation behind, of which one does not merge with it.
_JOINTS = ("\n", ".", "a", "0")
_FILES = ("tokenizer.json", "tokenizer.model", "merges.txt")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
  """Text to token ids and back; made by `load_tokenizer`."""

  pieces: tuple[str, ...]  # by id; "" at ids that the vocabulary skips
  bos_id: int | None
  eos_id: int | None
  # They end a generation: `eos_id`, then others of the model's configs.
  stop_ids: tuple[int, ...]
  # All that its files call special, padding too.
  named_special_ids: frozenset[int]
  source: str  # the file or folder that it was loaded from
  _backend: backends.Backend
  # Of the table of the model that it belongs to, which may be fewer or more
  # than there are tokens; None if it belongs to none.
  rows: int | None = None
  # Of its files, for `text.chat`, with the tokens that a template may name.
  chat_template: str | None = None
  named_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

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

    They may be more than the model knows: the functions below, which make ids
    that a model reads, raise as `check`.
    """
    return list(self._backend.encode(check_text("a text", text)))

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids` without special tokens and unknown ids.

    One leading space may be lost: see `decode_continuation`.
    """
    size = self.vocab_size
    return self._backend.decode([int(i) for i in ids if 0 <= i < size])

  def with_bos(self, ids: list[int]) -> list[int]:
    """Returns the ids with one BOS first, if there is such a token."""
    bos = self.bos_id
    if bos is None or bos in ids[:1]:
      return ids
    return self.check([bos]) + ids

  def encode_prompt(self, text: str) -> list[int]:
    """Returns the ids of a text, with one BOS whether it spells one or not."""
    return self.with_bos(self.check(self.encode(text)))

  def encode_pair(
    self, prompt: str, completion: str
  ) -> tuple[list[int], list[int]]:
    """Returns `encode_prompt`, and the ids of the completion behind it.

    A BOS that plain text (an empty prompt) spells is the prompt's.
    """
    ids = self.encode(prompt)
    given = self.with_bos(self.check(ids))
    new = self.continuation(ids, prompt, completion)
    spells_bos = not ids and given == new[:1] == [self.bos_id]
    return given, new[1:] if spells_bos else new

  def encode_continuation(self, prompt: str, completion: str) -> list[int]:
    """Returns the ids with which a model answers `completion` to `prompt`.

    They follow `encode(prompt)`, even if `encode(prompt + completion)` differs.
    """
    return self.continuation(self.encode(prompt), prompt, completion)

  def continuation(
    self, ids: list[int], prompt: str, completion: str
  ) -> list[int]:
    """`encode_continuation` of a prompt that was encoded as `ids`."""
    joined = self.encode(prompt + completion)
    if joined[: len(ids)] == ids:
      return self.check(joined[len(ids) :])
    # A token straddles the boundary. Encoding the completion alone would add
    # the space that Llama-style tokenizers put before a text.
    return self.encode_within(completion)

  def encode_within(self, text: str) -> list[int]:
    """Returns the token ids of `text` where other text stands before it."""
    for context in _JOINTS:
      ids = self.encode(context)
      joined = self.encode(context + text)
      if ids and joined[: len(ids)] == ids:
        return self.check(joined[len(ids) :])
    return self.check(self.encode(text))

  def spell(
    self, ids: Sequence[int], previous: Sequence[int] = ()
  ) -> list[bytes]:
    """Returns the bytes that each of `ids` adds to the text of `previous`.

    A token may hold a part of a character, and lose a space where it starts a
    text. Special tokens, whether they are flagged so, named so in a file, or
    used as BOS, EOS or stop, and unknown tokens add nothing. Raises InputError
    if the tokenizer's decoder changes text that it has written.
    """
    spelled = self._spelled
    if spelled is None:
      return self._spell_by_decoding(ids, previous)
    parts = [spelled.get(i, b"") for i in ids]
    first = next((n for n, part in enumerate(parts) if part), None)
    begins = not any(map(spelled.get, previous))
    if self._backend.spelling.strips and begins and first is not None:
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

  @property
  def added_ids(self) -> frozenset[int]:
    """Ids of tokens that are found in a text before it is split."""
    return self._backend.added_ids

  @functools.cached_property
  def _silent_ids(self) -> frozenset[int | None]:
    used = self.bos_id, self.eos_id, *self.stop_ids
    return self.named_special_ids.union(used)

  @functools.cached_property
  def _spelled(self) -> dict[int, bytes] | None:
    """The bytes of each token that has some; None if only decoding can tell."""
    pieces = self._backend.spelling.pieces
    if pieces is None:
      return None
    silent = self._silent_ids
    return {i: b for i, b in enumerate(pieces) if b and i not in silent}

  def _spell_by_decoding(self, ids, previous) -> list[bytes]:
    # A character that is begun decodes to U+FFFD until its last token.
    before = [i for i in previous if i not in self._silent_ids]
    text, parts = self.decode(before).rstrip("\ufffd"), []
    for index in ids:
      if index not in self._silent_ids:
        before.append(index)
      longer = self.decode(before).rstrip("\ufffd")
      if not longer.startswith(text):
        raise InputError(
          f"the tokenizer of {self.source} changes text that it has already "
          "written, so that nobody can tell what its tokens spell; it cannot "
          "be the anchor's of models with different tokenizers"
        )
      parts.append(longer[len(text) :].encode())
      text = longer
    return parts


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Loads a tokenizer's file, or that of a folder.

  A folder's tokenizer.json is preferred, then tokenizer.model (SentencePiece),
  then vocab.json with merges.txt. Tokens and options that only the files beside
  it give count as in transformers; docs/generation.md says which do not. No
  code of the folder is run. Raises InputError if nothing is there, a file
  cannot be read, or the files contradict each other.
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
  for path in (file, file.with_name("vocab.json")):
    files.check_content(path)
  side = side_files.read(file.parent if file.name in _FILES else None)
  backend = backends.read(file, side)
  ids = side.special_ids(backend.vocab, backend.special_ids)
  numbers = {f"{kind}_token": ids[f"{kind}_id"] for kind in ("bos", "eos")}
  numbered = {n: backend.pieces[i] for n, i in numbers.items() if i is not None}
  return Tokenizer(
    backend.pieces,
    source=str(source),
    _backend=backend,
    chat_template=side.chat_template(),
    named_tokens=numbered | side.named_tokens(),
    **ids,
  )


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
  defaults: dict[str, Any] = {
    "model_type": "bpe",
    "split_digits": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "num_threads": 1,
    "minloglevel": 2,
  }
  defaults |= {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      # Written through memory: the model file records the path it was given.
      model_writer=written,
      vocab_size=vocab_size,
      **defaults | options,
    )
  except (RuntimeError, OSError, ValueError) as error:
    raise InputError(f"cannot train the tokenizer {path}: {error}") from error
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(written.getvalue())
  return load_tokenizer(path)
