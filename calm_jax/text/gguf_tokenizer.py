"""Tokenizers of GGUF files, as the files that `load_tokenizer` reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from calm_jax.core import files
from calm_jax.core.errors import InputError

_GGML = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # kinds of a token
_SPACE = "\u2581"
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before tokens are merged, by the names of llama.cpp.
_LLAMA3, _QWEN2 = _WORDS % "{1,3}", _WORDS % ""
_SPLITS = {
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
}


def write(metadata: Mapping[str, Any], folder: Path) -> None:
  """Writes a GGUF file's tokenizer, stop tokens and chat template to a folder.

  SentencePiece's BPE and byte-level BPE are known; InputError for another one.
  """
  own = {
    key.removeprefix(_GGML): value
    for key, value in metadata.items()
    if key.startswith(_GGML)
  }
  kind, split = own.get("model"), own.get("pre")
  if kind == "llama":
    is_gemma = metadata["general.architecture"].startswith("gemma")
    made, adds_bos = _sentencepiece(own, is_gemma), True
  elif kind == "gpt2" and split in _SPLITS:
    made, adds_bos = _byte_level(own), _SPLITS[split] == _LLAMA3
  else:
    raise InputError(f"its tokenizer is of kind {kind!r}, split as {split!r}")
  tokens = own["tokens"]
  for token, of_kind in zip(tokens, own["token_type"], strict=True):
    # Not Gemma's tokens of several spaces, which merging gives.
    known = made.token_to_id(token) is not None
    if known and of_kind in (_CONTROL, _USER_DEFINED):
      special = of_kind == _CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      made.add_tokens([added])
  made.save(str(folder / "tokenizer.json"), pretty=False)
  bos = own.get("bos_token_id")
  if not own.get("add_bos_token", adds_bos):
    bos = None
  named = {
    "bos_token": None if bos is None else tokens[bos],
    "eos_token": tokens[own["eos_token_id"]],
  }
  files.write_json(folder / "tokenizer_config.json", named)
  stops = [own.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
  stops = [stop for stop in dict.fromkeys(stops) if stop is not None]
  files.write_json(folder / "generation_config.json", {"eos_token_id": stops})
  if template := metadata.get("tokenizer.chat_template"):
    files.write_atomically(folder / "chat_template.jinja", template)


def _sentencepiece(own: Mapping[str, Any], is_gemma: bool) -> Any:
  """Makes the tokenizer of a SentencePiece model of kind BPE."""
  tokens = [token.replace(" ", _SPACE) for token in own["tokens"]]
  scores = own["scores"]
  if is_gemma:  # Its tokens are merged in their order, whatever their scores.
    scores = [-place for place in range(len(tokens))]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {token: index for index, token in enumerate(tokens)},
      _merges(tokens, scores),
      unk_token=tokens[own["unknown_token_id"]],
      fuse_unk=True,
      byte_fallback=_BYTE in own["token_type"],
    )
  )
  spaces = normalizers.Replace(" ", _SPACE)
  steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
  steps.append(decoders.Fuse())
  if own.get("add_space_prefix", True):
    spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    steps.append(decoders.Strip(" ", 1, 0))
  made.normalizer, made.decoder = spaces, decoders.Sequence(steps)
  return made


def _merges(
  tokens: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Lists the pairs of tokens that make a third, the best score first."""
  known, ranked = set(tokens), []
  for token, score in zip(tokens, scores, strict=True):
    for at in range(len(token) - 1, 0, -1):
      left, right = token[:at], token[at:]
      if left in known and right in known:
        ranked.append((-score, -at, -len(right), left, right))
  ranked.sort(key=lambda entry: entry[:3])
  return [(left, right) for *_, left, right in ranked]


def _byte_level(own: Mapping[str, Any]) -> Any:
  """Makes the tokenizer of byte-level BPE."""
  split = _SPLITS[own["pre"]]
  merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
  vocab = {token: index for index, token in enumerate(own["tokens"])}
  model = tokenizers.models.BPE(vocab, merges, ignore_merges=split == _LLAMA3)
  made = tokenizers.Tokenizer(model)
  if split == _QWEN2:
    made.normalizer = normalizers.NFC()
  words = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
  bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.pre_tokenizer = pre_tokenizers.Sequence([words, bytewise])
  made.decoder = decoders.ByteLevel()
  return made
