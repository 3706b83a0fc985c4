"""Files beside a tokenizer's own: tokens, options and ids that they give."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_text

CHAT_TEMPLATE = "chat_template.jinja"
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


class SideFiles(NamedTuple):
  """JSON objects of a checkpoint's folder; empty where there is no file."""

  tokenizer_config: dict[str, Any]
  special_tokens_map: dict[str, Any]
  added_tokens: dict[str, Any]
  generation_config: dict[str, Any]
  config: dict[str, Any]

  @property
  def of_tokenizer(self) -> bool:
    """True if one of the files is of the tokenizer, not of the model."""
    return any(self[:3])

  def tokens(self) -> dict[str, dict[str, Any]]:
    """The "id" and flags of each token that the files give, as far as said."""
    found: dict[str, dict[str, Any]] = {}
    for file in (self.special_tokens_map, self.tokenizer_config):
      for name, value in file.items():
        if name.endswith(("_token", "_special_tokens")):
          found |= {content: {"special": True} for content in _contents(value)}
    added = self.tokenizer_config.get("added_tokens_decoder")
    if added is None:
      for content, index in self.added_tokens.items():
        found.setdefault(content, {})["id"] = index
    for index, token in (added or {}).items():
      said = {flag: token[flag] for flag in _FLAGS if flag in token}
      content = token["content"]
      found[content] = said | found.get(content, {}) | {"id": int(index)}
    return found

  def special_ids(self, vocab: dict[str, int], own: dict[str, int]) -> dict:
    """Returns bos_id, eos_id, stop_ids and named_special_ids of `Tokenizer`.

    They are looked up by name in tokenizer_config.json,
    special_tokens_map.json, the model file itself (`own`), then by number in
    generation_config.json and config.json. A null in the tokenizer's files
    means that there is none, whatever the model's config says (Qwen's bos). The
    eos ids of generation_config.json, or else of config.json, end a text too.
    """
    ids: dict = {
      f"{kind}_id": self._special_id(kind, vocab, own)
      for kind in ("bos", "eos")
    }
    stops = [ids["eos_id"], *self._numbers("eos")]
    ids["stop_ids"] = tuple(dict.fromkeys(i for i in stops if i is not None))
    special = [t for t, said in self.tokens().items() if said.get("special")]
    ids["named_special_ids"] = frozenset(map(vocab.get, special)) - {None}
    return ids

  def named_tokens(self) -> dict[str, str]:
    """The tokens that a chat template may name, such as "eos_token"."""
    names = {*self.special_tokens_map, *self.tokenizer_config}
    kinds = [n.removesuffix("_token") for n in names if n.endswith("_token")]
    return {f"{k}_token": piece for k in kinds if (piece := self._named(k))}

  def chat_template(self) -> str | None:
    """The chat template, the default one of several; None without one."""
    found = self.tokenizer_config.get("chat_template")
    if isinstance(found, list):
      named = {each["name"]: each["template"] for each in found}
      found = named.get("default")
    return None if found is None else check_text("chat_template", found)

  def check_named(self, kind: str, vocab: Collection[str]) -> None:
    """Raises InputError if a kind of token is named that is not of `vocab`."""
    piece = self._named(kind)
    if piece and piece not in vocab:
      raise InputError(
        f"the files of a tokenizer name the {kind} token {piece!r}, which the "
        "vocabulary lacks: they do not belong together"
      )

  def _named(self, kind: str) -> str | None:
    """The token of a kind; "" if the files say that there is none."""
    name = f"{kind}_token"
    for file in (self.tokenizer_config, self.special_tokens_map):
      if name in file:
        pieces = _contents(file[name]) or [""]
        if len(pieces) > 1:
          raise InputError(
            f"a tokenizer's files name several of {name}: {pieces}"
          )
        return pieces[0]
    return None

  def _special_id(
    self, kind: str, vocab: dict[str, int], own: dict[str, int]
  ) -> int | None:
    self.check_named(kind, vocab)
    if (piece := self._named(kind)) is not None:
      return vocab.get(piece)
    if kind in own:
      return own[kind]
    # A number beyond the vocabulary, such as -1, stands for no token.
    [index, *_] = self._numbers(kind) or [-1]
    return index if 0 <= index <= max(vocab.values(), default=-1) else None

  def _numbers(self, kind: str) -> list[int]:
    name = f"{kind}_token_id"
    for config in (self.generation_config, self.config):
      if (value := config.get(name)) is None:
        continue
      numbers = value if isinstance(value, list) else [value]
      if not all(type(number) is int for number in numbers):
        raise InputError(f"{name}={value!r} of a checkpoint is no token's id")
      return numbers
    return []


def read(folder: Path | None) -> SideFiles:
  """Reads the side files of a folder, if any; InputError if one is no JSON."""
  side = SideFiles({}, {}, {}, {}, {})
  if folder is None:
    return side
  for name, content in side._asdict().items():
    if (path := folder / f"{name}.json").is_file():
      content.update(files.read_json(path))
  if (path := folder / CHAT_TEMPLATE).is_file():
    side.tokenizer_config["chat_template"] = read_chat_template(path)
  return side


def read_chat_template(path: Path) -> str:
  """The text of a chat_template.jinja; InputError if it is not UTF-8."""
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _contents(value: Any) -> list[str]:
  """The texts of a token, or of a list or dict of several; a flag has none."""
  if isinstance(value, str):
    return [value] if value else []
  if isinstance(value, dict):
    value = [value["content"]] if "content" in value else [*value.values()]
  if not isinstance(value, list):
    return []
  return [content for token in value for content in _contents(token)]
