"""One face over Hugging Face tokenizers and SentencePiece models."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from calm_jax.errors import InputError

_HUB_FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "vocab.json",
  "merges.txt",
  "config.json",
  "generation_config.json",
)
# Text after which a continuation is encoded alone: one of them does not merge
# with the first character of the continuation.
_JOINTS = ("\n", ".", "a", "0")


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
  """Text to token ids and back. Made by `load_tokenizer`.

  Attributes:
    pieces: the vocabulary, piece by id; "" at ids that the vocabulary skips.
    bos_id, eos_id, pad_id: ids of the special tokens, None where there is none.
    stop_ids: ids that end a generation: `eos_id` first, then the others that
      generation_config.json names.
    source: the file or hub id that it was loaded from.
  """

  pieces: tuple[str, ...]
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]
  source: str
  _encode: Callable[[str], list[int]]
  _decode: Callable[[list[int]], str]

  def __repr__(self) -> str:
    return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

  @property
  def vocab_size(self) -> int:
    """The highest token id plus one (a model's table may be larger)."""
    return len(self.pieces)

  @property
  def fingerprint(self) -> str:
    """sha256 of the vocabulary in order of id; equal ids mean equal pieces."""
    return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`; no special token is added."""
    return list(self._encode(text))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special tokens and ids outside the vocabulary skipped.

    A Llama-style tokenizer strips one leading space: text generated after a
    prompt is decoded by `decode_continuation`.
    """
    size = self.vocab_size
    return self._decode([int(i) for i in ids if 0 <= i < size])

  def encode_continuation(self, prompt: str, completion: str) -> list[int]:
    """Token ids of `completion` where it follows the tokens of `prompt`.

    `encode(prompt) + encode_continuation(prompt, completion)` is what a model
    sees when it is prompted with `encode(prompt)` and answers `completion`.
    """
    prompt_ids = self.encode(prompt)
    joined_ids = self.encode(prompt + completion)
    if joined_ids[: len(prompt_ids)] == prompt_ids:
      return joined_ids[len(prompt_ids) :]
    # A token straddles the boundary. Encoding the completion alone would add
    # the space that Llama-style tokenizers put before a text.
    for joint in _JOINTS:
      joint_ids = self.encode(joint)
      ids = self.encode(joint + completion)
      if joint_ids and ids[: len(joint_ids)] == joint_ids:
        return ids[len(joint_ids) :]
    return self.encode(completion)

  def decode_continuation(
    self, prompt_ids: Sequence[int], new_ids: Sequence[int]
  ) -> str:
    """Text that `new_ids` add to the text of `prompt_ids`, spaces included."""
    prompt = self.decode(prompt_ids)
    joined = self.decode([*prompt_ids, *new_ids])
    if not joined.startswith(prompt):
      # The prompt ended within a character, which `new_ids` complete.
      prompt = prompt.rstrip("\ufffd")
    return joined.removeprefix(prompt)


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
  """Loads the tokenizer of a checkpoint folder, a file or a hub repository.

  A folder's tokenizer.json is preferred, then tokenizer.model (SentencePiece),
  then vocab.json with merges.txt. No code of the repository is run.

  Raises:
    InputError: nothing there, no tokenizer in it, or a file cannot be read.
  """
  path = Path(path_or_hub_id).expanduser()
  if path.is_dir():
    return _load_folder(path, str(path_or_hub_id))
  if path.is_file():
    named = path.name in ("tokenizer.json", "tokenizer.model")
    return _load_file(path, path.parent if named else None, str(path))
  name = str(path_or_hub_id)
  if name.startswith(("/", ".", "~")) or name.count("/") != 1:
    raise InputError(
      f"no tokenizer at {name}: neither a file nor a folder; give a checkpoint"
      " folder, a tokenizer file, or a hub id such as owner/name"
    )
  return _load_folder(_download(name), name)


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
    InputError: SentencePiece refuses the settings, such as a `vocab_size` that
      the texts cannot fill.
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


def _download(hub_id: str) -> Path:
  # Loaded here: only a hub id needs it.
  import huggingface_hub
  from huggingface_hub.errors import HfHubHTTPError

  try:
    folder = huggingface_hub.snapshot_download(
      hub_id, allow_patterns=list(_HUB_FILES)
    )
  except (OSError, ValueError, HfHubHTTPError) as error:
    raise InputError(
      f"cannot get the tokenizer of {hub_id}: it is no local folder, and the"
      f" hub answered: {error}"
    ) from error
  return Path(folder)


def _load_folder(folder: Path, source: str) -> Tokenizer:
  for name in ("tokenizer.json", "tokenizer.model"):
    if (folder / name).is_file():
      return _load_file(folder / name, folder, source)
  if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    return _from_huggingface(_convert_slow(folder), folder, source)
  raise InputError(
    f"no tokenizer in {source}: it has none of tokenizer.json, tokenizer.model,"
    " vocab.json with merges.txt; copy one of them there"
  )


def _load_file(path: Path, folder: Path | None, source: str) -> Tokenizer:
  if path.suffix == ".json":
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
      raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    return _from_huggingface(backend, folder, source)
  try:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (RuntimeError, OSError) as error:
    raise InputError(
      f"cannot read {path} as a SentencePiece model: {error}"
    ) from error
  return _from_sentencepiece(processor, folder, source)


def _convert_slow(folder: Path) -> tokenizers.Tokenizer:
  # Loaded here: slow to import, and few checkpoints lack tokenizer.json.
  import transformers

  try:
    slow = transformers.AutoTokenizer.from_pretrained(
      str(folder), trust_remote_code=False
    )
  except (OSError, ValueError, KeyError) as error:
    raise InputError(f"cannot read the tokenizer {folder}: {error}") from error
  return slow.backend_tokenizer


def _from_huggingface(
  backend: tokenizers.Tokenizer, folder: Path | None, source: str
) -> Tokenizer:
  # Some tokenizer.json carry the limits of the run that saved them.
  backend.no_truncation()
  backend.no_padding()
  vocab = backend.get_vocab(with_added_tokens=True)
  pieces = [""] * (max(vocab.values(), default=-1) + 1)
  for piece, index in vocab.items():
    pieces[index] = piece
  return Tokenizer(
    pieces=tuple(pieces),
    source=source,
    _encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
    _decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
    **_special_ids(folder, vocab, {}),
  )


def _from_sentencepiece(
  processor: sentencepiece.SentencePieceProcessor,
  folder: Path | None,
  source: str,
) -> Tokenizer:
  size = processor.vocab_size()
  pieces = tuple(processor.id_to_piece(i) for i in range(size))
  skipped = {
    i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)
  }
  own = {
    "bos": processor.bos_id(),
    "eos": processor.eos_id(),
    "pad": processor.pad_id(),
  }
  vocab = {piece: i for i, piece in enumerate(pieces)}
  return Tokenizer(
    pieces=pieces,
    source=source,
    _encode=lambda text: processor.encode(text),
    _decode=lambda ids: processor.decode([i for i in ids if i not in skipped]),
    **_special_ids(folder, vocab, {k: v for k, v in own.items() if v >= 0}),
  )


def _special_ids(
  folder: Path | None, vocab: dict[str, int], own: dict[str, int]
) -> dict:
  """The special ids: by name in the tokenizer's files, else by number.

  Order: tokenizer_config.json, special_tokens_map.json, the model file itself
  (`own`), generation_config.json, config.json. A null in the tokenizer's file
  means that there is none, whatever the model's config says (Qwen's bos).
  """
  by_name = [
    (name, _read_json(folder, name))
    for name in ("tokenizer_config.json", "special_tokens_map.json")
  ]
  generation = _read_json(folder, "generation_config.json")
  by_number = [generation, _read_json(folder, "config.json")]
  ids = {}
  for kind in ("bos", "eos", "pad"):
    ids[kind] = _special_id(kind, by_name, by_number, vocab, own)
  stops = [ids["eos"], *_as_list(generation.get("eos_token_id"))]
  return {
    "bos_id": ids["bos"],
    "eos_id": ids["eos"],
    "pad_id": ids["pad"],
    "stop_ids": tuple(dict.fromkeys(i for i in stops if i is not None)),
  }


def _special_id(kind, by_name, by_number, vocab, own) -> int | None:
  for file, config in by_name:
    if f"{kind}_token" not in config:
      continue
    token = config[f"{kind}_token"]
    if token is None:
      return None
    content = token["content"] if isinstance(token, dict) else token
    if content in vocab:
      return vocab[content]
    if kind == "pad":
      # Often added to the config alone; padding is masked, so none is needed.
      return None
    raise InputError(
      f"{file} names the {kind} token {content!r}, which the vocabulary lacks;"
      " the tokenizer files do not belong together"
    )
  if kind in own:
    return own[kind]
  for config in by_number:
    numbers = _as_list(config.get(f"{kind}_token_id"))
    if numbers:
      # A number beyond the vocabulary, such as -1, stands for no token.
      return numbers[0] if 0 <= numbers[0] < len(vocab) else None
  return None


def _as_list(value: int | list[int] | None) -> list[int]:
  if value is None:
    return []
  return value if isinstance(value, list) else [value]


def _read_json(folder: Path | None, name: str) -> dict:
  if folder is None or not (folder / name).is_file():
    return {}
  try:
    return json.loads((folder / name).read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"cannot read {folder / name}: {error}") from error
