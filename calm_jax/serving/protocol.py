"""OpenAI's requests and responses as they are written in JSON.

https://platform.openai.com/docs/api-reference: completions and chat
completions. What a model here cannot do is refused by name, never passed over.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from calm_jax.composition.model import Model
from calm_jax.core.errors import (
  InputError,
  check_float,
  check_int,
  check_seed,
  check_text,
)
from calm_jax.generation.sampling import Sampler
from calm_jax.serving.answers import Token
from calm_jax.serving.row_batch import TOPS
from calm_jax.serving.tickets import ServingLimits
from calm_jax.text import chat, stop_strings

# Accepted with the value that changes nothing, refused with any other.
_NEUTRAL = {
  "best_of": 1,
  "echo": False,
  "suffix": "",
  "presence_penalty": 0,
  "frequency_penalty": 0,
  "logit_bias": {},
  "tools": [],
  "response_format": {"type": "text"},
  "modalities": ["text"],
}
_MOST_STOPS, _LONGEST_STOPS = 16, 1024  # texts, characters of all
_PASSED_OVER = {"user", "store", "metadata", "safety_identifier"}
_BOTH = {
  *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n"),
  *("seed", "stop", "stream", "stream_options", "logprobs"),
}
_KEYS = {
  False: _BOTH | {"prompt"},
  True: _BOTH | {"messages", "max_completion_tokens", "top_logprobs"},
}


@dataclasses.dataclass(frozen=True)
class ApiRequest:
  """A request that was understood: prompts, and how each is continued."""

  model: str
  prompts: list[list[int]]  # ids
  is_chat: bool
  n: int  # answers to each prompt
  max_new_tokens: int
  sampler: Sampler
  seed: int
  stop: list[str]
  stop_ids: tuple[int, ...]
  is_streamed: bool
  tells_usage: bool  # at the end of a stream
  tops: int | None  # likeliest tokens that are named; None: no logprobs


def read(
  body: bytes, model: Model, is_chat: bool, limits: ServingLimits
) -> ApiRequest:
  """Reads a request's JSON; raises InputError for what it should not say."""
  try:
    given = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise InputError(f"the body is not JSON: {error}") from error
  if not isinstance(given, dict):
    raise InputError("the body is not a JSON object")
  given = {key: value for key, value in given.items() if value is not None}
  _refuse(given, is_chat)
  tokenizer = model.text()
  stop_ids = tuple(tokenizer.stop_ids)
  n = check_int("n", given.get("n", 1), 1, limits.queue)
  if is_chat:
    messages = chat.check([*map(_joined, _list(given, "messages"))])
    prompts = [chat.encode_prompt(tokenizer, messages)]
    stop_ids = chat.frame(tokenizer).stop_ids
    room = model.max_length - len(prompts[0])
    default = max(1, min(limits.new_tokens, room))
  else:
    most = limits.queue // n
    prompts, default = _prompts(given.get("prompt"), model, most), 16
  asked = given.get("max_completion_tokens", given.get("max_tokens", default))
  seed = given.get("seed", secrets.randbits(32))
  options = _object(given, "stream_options")
  stop = stop_strings.check(given.get("stop", ()))
  if len(stop) > _MOST_STOPS:
    raise InputError(f"stop has {len(stop)} texts, more than {_MOST_STOPS}")
  if (length := sum(map(len, stop))) > _LONGEST_STOPS:
    raise InputError(
      f"stop has {length} characters, more than {_LONGEST_STOPS}"
    )
  return ApiRequest(
    model=check_text("model", given.get("model", "")),
    prompts=prompts,
    is_chat=is_chat,
    n=n,
    max_new_tokens=check_int("max_tokens", asked, 1),
    sampler=Sampler(
      temperature=check_float(
        "temperature", given.get("temperature", 1.0), 0, 2
      ),
      **{k: given[k] for k in ("top_p", "top_k", "min_p") if k in given},
    ),
    seed=check_seed("seed", seed),
    stop=stop,
    stop_ids=stop_ids,
    is_streamed=_flag(given, "stream"),
    tells_usage=_flag(options, "include_usage"),
    tops=_tops(given, is_chat),
  )


def _refuse(given: dict[str, Any], is_chat: bool) -> None:
  unknown = given.keys() - _KEYS[is_chat] - _NEUTRAL.keys() - _PASSED_OVER
  if unknown:
    raise InputError(f"this server knows no parameter {sorted(unknown)}")
  for name, value in _NEUTRAL.items():
    if name in given and given[name] != value:
      raise InputError(f"{name}={given[name]!r} is not supported; leave it out")


def _flag(given: dict[str, Any], name: str) -> bool:
  value = given.get(name, False)
  if not isinstance(value, bool):
    raise InputError(f"{name}={value!r} must be true or false")
  return value


def _object(given: dict[str, Any], name: str) -> dict[str, Any]:
  value = given.get(name, {})
  if not isinstance(value, dict):
    raise InputError(f"{name} must be an object")
  return value


def _list(given: dict[str, Any], name: str) -> list:
  value = given.get(name)
  if not isinstance(value, list):
    raise InputError(f"{name} must be a list")
  return value


def _tops(given: dict[str, Any], is_chat: bool) -> int | None:
  if not is_chat:
    count = given.get("logprobs")
    return None if count is None else check_int("logprobs", count, 0, TOPS)
  count = check_int("top_logprobs", given.get("top_logprobs", 0), 0, TOPS)
  if _flag(given, "logprobs"):
    return count
  if count:
    raise InputError("top_logprobs needs logprobs=true")
  return None


def _joined(message: Any) -> Any:
  """A message whose content, if it is a list of texts, is one text."""
  if not isinstance(message, dict) or not isinstance(
    message.get("content"), list
  ):
    return message
  parts = message["content"]
  for part in parts:
    if not isinstance(part, dict) or part.get("type") != "text":
      raise InputError("a message's content has parts that are no text")
  texts = [check_text("the text of a part", part.get("text")) for part in parts]
  return message | {"content": "".join(texts)}


def _prompts(prompt: Any, model: Model, most: int) -> list[list[int]]:
  """Ids of one prompt or up to `most`, each a text or a list of ids."""
  if isinstance(prompt, str) or _is_ids(prompt):
    prompt = [prompt]
  if not isinstance(prompt, list) or not prompt:
    raise InputError("prompt must be a text, token ids, or a list of either")
  if len(prompt) > most:  # Before work and memory are spent on them.
    raise InputError(
      f"prompt has {len(prompt)} texts; with n this server takes {most} at once"
    )
  out = []
  for i, each in enumerate(prompt):
    if not _is_ids(each):
      each = model.text().encode_prompt(check_text(f"prompt[{i}]", each))
    out.append(each)
  return out


def _is_ids(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
  )


class Writer:
  """Writes the responses to one request, or the chunks of its stream."""

  def __init__(self, asked: ApiRequest, name: str):
    self._asked = asked
    kind = "chatcmpl" if asked.is_chat else "cmpl"
    self._head = {
      "id": f"{kind}-{secrets.token_hex(12)}",
      "created": int(time.time()),
      "model": name,
    }
    self._offsets: dict[int, int] = {}  # characters of each choice's tokens

  def whole(
    self, choices: Sequence[tuple[str, list[Token], str]], usage: dict[str, int]
  ) -> dict[str, Any]:
    """The response that holds (text, tokens, reason) of each choice."""
    kind = "chat.completion" if self._asked.is_chat else "text_completion"
    written = []
    for i, (text, tokens, reason) in enumerate(choices):
      content: dict[str, Any] = {"text": text}
      if self._asked.is_chat:
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message}
      written.append(self._choice(i, content, tokens, reason))
    return self._head | {"object": kind, "choices": written, "usage": usage}

  def chunk(
    self, i: int, text: str, tokens: list[Token], reason: str | None
  ) -> dict[str, Any]:
    """A piece of choice i, as an event of a stream."""
    content: dict[str, Any] = {"text": text}
    if self._asked.is_chat:
      content = {"delta": {"content": text} if text or tokens else {}}
    return self._event([self._choice(i, content, tokens, reason)])

  def opening(self, i: int) -> dict[str, Any]:
    """The first event of a choice of a chat's stream."""
    delta = {"role": "assistant", "content": ""}
    return self._event([self._choice(i, {"delta": delta}, [], None)])

  def closing(self, usage: dict[str, int]) -> dict[str, Any]:
    """The event with the usage, after all choices."""
    return self._event([]) | {"usage": usage}

  def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
    return self._head | {"object": kind, "choices": choices}

  def _choice(
    self,
    i: int,
    content: dict[str, Any],
    tokens: list[Token],
    reason: str | None,
  ) -> dict[str, Any]:
    logprobs = None
    if self._asked.tops is not None:
      write = self._chat_logprobs if self._asked.is_chat else self._logprobs
      logprobs = write(i, tokens)
    head = {"index": i, "logprobs": logprobs, "finish_reason": reason}
    return head | content

  def _chat_logprobs(self, i: int, tokens: list[Token]) -> dict[str, Any]:
    def entry(spelled: bytes, value: float) -> dict[str, Any]:
      text = spelled.decode(errors="replace")
      return {"token": text, "logprob": value, "bytes": list(spelled)}

    content = [
      entry(token.spelled, token.logprob)
      | {"top_logprobs": [entry(*top) for top in self._top(token)]}
      for token in tokens
    ]
    return {"content": content, "refusal": None}

  def _logprobs(self, i: int, tokens: list[Token]) -> dict[str, Any]:
    texts = [token.spelled.decode(errors="replace") for token in tokens]
    offsets = []
    for text in texts:
      offsets.append(self._offsets.get(i, 0))
      self._offsets[i] = offsets[-1] + len(text)
    top = [
      {spelled.decode(errors="replace"): value for spelled, value in tops}
      for tops in map(self._top, tokens)
    ]
    return {
      "tokens": texts,
      "token_logprobs": [token.logprob for token in tokens],
      "top_logprobs": top if self._asked.tops else None,
      "text_offset": offsets,
    }

  def _top(self, token: Token) -> list[tuple[bytes, float]]:
    return token.likeliest[: self._asked.tops]


def usage(prompt: int, completion: int) -> dict[str, int]:
  """Counts of tokens as responses have them."""
  counts = {"prompt_tokens": prompt, "completion_tokens": completion}
  return counts | {"total_tokens": prompt + completion}


def error_body(message: str, kind: str) -> dict[str, Any]:
  """An error as OpenAI's clients read it."""
  body = {"message": message, "type": kind, "param": None, "code": kind}
  return {"error": body}
