"""Reads special token ids from the files of a tokenizer."""

from pathlib import Path

from calm_jax.core import files
from calm_jax.core.errors import InputError


def special_ids(
  folder: Path | None, vocab: dict[str, int], own: dict[str, int]
) -> dict:
  """Returns bos_id, eos_id, stop_ids and named_special_ids of `Tokenizer`.

  They are looked up by name in tokenizer_config.json, special_tokens_map.json,
  the model file itself (`own`), then by number in generation_config.json and
  config.json. A null in the tokenizer's files means that there is none,
  whatever the model's config says (Qwen's bos).
  """

  def read(name: str) -> dict:
    if folder is None or not (folder / name).is_file():
      return {}
    return files.read_json(folder / name)

  names = ("tokenizer_config.json", "special_tokens_map.json")
  by_name = {name: read(name) for name in names}
  generation = read("generation_config.json")
  by_number = [generation, read("config.json")]
  ids: dict = {
    f"{kind}_id": _special_id(kind, by_name, by_number, vocab, own)
    for kind in ("bos", "eos")
  }
  stops = [ids["eos_id"], *_as_list(generation.get("eos_token_id"))]
  ids["stop_ids"] = tuple(dict.fromkeys(i for i in stops if i is not None))
  named = [
    text
    for config in by_name.values()
    for key, value in config.items()
    if key.endswith(("_token", "_special_tokens"))
    for text in _token_texts(value)
  ]
  ids["named_special_ids"] = frozenset(vocab[t] for t in named if t in vocab)
  return ids


def _token_texts(value) -> list[str]:
  """The texts of a token, of a list of them, or of a dict by name."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, dict):
    value = [value["content"]] if "content" in value else [*value.values()]
  if not isinstance(value, list):  # a flag, such as add_bos_token, or null
    return []
  return [text for token in value for text in _token_texts(token)]


def _special_id(kind, by_name, by_number, vocab, own) -> int | None:
  for file, config in by_name.items():
    if f"{kind}_token" not in config:
      continue
    token = config[f"{kind}_token"]
    if token is None:
      return None
    content = token["content"] if isinstance(token, dict) else token
    if content in vocab:
      return vocab[content]
    raise InputError(
      f"{file} names the {kind} token {content!r}, which the vocabulary lacks: "
      "the tokenizer files do not belong together"
    )
  if kind in own:
    return own[kind]
  for config in by_number:
    if numbers := _as_list(config.get(f"{kind}_token_id")):
      # A number beyond the vocabulary, such as -1, stands for no token.
      return numbers[0] if 0 <= numbers[0] < len(vocab) else None
  return None


def _as_list(value: int | list[int] | None) -> list[int]:
  if value is None:
    return []
  return value if isinstance(value, list) else [value]
