"""Text in, text out: generation and scoring above token ids."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from calm_jax.composition.model import Model
from calm_jax.core.errors import (
  InputError,
  check_int,
  check_seed,
  check_text,
  check_texts,
)
from calm_jax.generation import decode, scoring
from calm_jax.generation.replacements import Replacement
from calm_jax.generation.sampling import Sampler
from calm_jax.generation.scoring import Score
from calm_jax.text import chat, stop_strings
from calm_jax.text.chat import Messages
from calm_jax.text.tokenizer import Tokenizer


def generate(
  model: Model,
  prompts: str | Sequence[str] | None = None,
  max_new_tokens: int = 64,
  *,
  messages: Messages | Sequence[Messages] | None = None,
  stop: str | Sequence[str] = (),
  seed: int | Sequence[int] = 0,
  batch_size: int = 64,
  replacement: Replacement | None = None,
  **sampling,
) -> list[str] | Any:
  """Continues texts or conversations, greedily unless a temperature is given.

  Args:
    prompts: texts; each gets a BOS token if the tokenizer has one.
    max_new_tokens: longest continuation, which ends early at EOS.
    messages: in place of prompts, a conversation that the model answers, such
      as [{"role": "user", "content": "Hello"}], or a list of several; they are
      written by the checkpoint's chat template, which also ends an answer.
    stop: texts that end a continuation; they are not returned.
    seed: of the drawing: one for all, from which prompt i draws with
      seed + i, or one a prompt. Neighbours in the batch make no difference.
    batch_size: rows that decode together.
    replacement: of the states that the anchor is given of its augmenting
      models; None to give them as they are.
    **sampling: temperature, top_k, top_p, min_p, repetition_penalty; see
      `Sampler`.

  Returns:
    The continuations without their prompts: a list for a list.

  Raises:
    InputError: the model has no tokenizer, or no chat template for messages, or
      a prompt is too long.
  """
  sampler = Sampler(**sampling)
  stop = stop_strings.check(stop)
  max_new_tokens = check_int("max_new_tokens", max_new_tokens)
  batch_size = check_int("batch_size", batch_size, 1)
  asked = _asked(model, prompts, messages)
  seeds = _seeds(seed, len(asked.ids))

  def stopped(i, new):
    return stop_strings.find(asked.text(i, new), stop) >= 0

  out = decode.generate(
    model,
    asked.ids,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    seeds=seeds,
    finished=stopped if stop else None,
    batch_size=batch_size,
    replacement=replacement,
    stop_ids=asked.stop_ids,
  )
  texts = [asked.text(i, new) for i, new in enumerate(out)]
  made = [stop_strings.cut(text, stop) for text in texts]
  return made[0] if asked.is_one else made


def stream(
  model: Model,
  prompt: str | None = None,
  max_new_tokens: int = 64,
  *,
  messages: Messages | None = None,
  stop: str | Sequence[str] = (),
  seed: int = 0,
  **sampling,
) -> Iterator[str]:
  """The continuation of one text in pieces; arguments of `generate`."""
  # Not in the generator: wrong options are to raise at once.
  if messages is None:
    prompt = check_text("prompt", prompt)
  else:
    messages = chat.check(messages)
  stop = stop_strings.check(stop)
  options = {
    "max_new_tokens": check_int("max_new_tokens", max_new_tokens),
    "seeds": [check_seed("seed", seed)],
    "sampler": Sampler(**sampling),
  }
  asked = _asked(model, prompt, messages)
  return _stream(model, asked, stop, **options)


def _stream(
  model: Model, asked: "_Asked", stop: list[str], **options
) -> Iterator[str]:
  options["stop_ids"] = asked.stop_ids
  new: list[int] = []
  sent, text = 0, ""
  for _, tokens in decode.stream(model, asked.ids, **options):
    new += tokens
    text = asked.text(0, new)
    if stop_strings.find(text, stop) >= 0:
      text = stop_strings.cut(text, stop)
      break
    settled = stop_strings.settled_length(text, stop)
    if settled > sent:
      yield text[sent:settled]
      sent = settled
  if text[sent:]:
    yield text[sent:]


def spelled_bytes(tokenizer: Tokenizer, prompt: str, completion: str) -> int:
  """Counts the bytes of a completion that its tokens spell, which are those
  without unknown characters."""
  text = tokenizer.decode_continuation(
    *tokenizer.encode_pair(prompt, completion)
  )
  # Normalisation may write more than there was.
  return min(len(text.encode()), len(completion.encode()))


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The ids of prompts or conversations, and how their answers are read."""

  tokenizer: Tokenizer
  ids: list[list[int]]
  is_one: bool  # rather than a list
  is_chat: bool

  @property
  def stop_ids(self) -> Sequence[int]:
    if self.is_chat:
      return chat.frame(self.tokenizer).stop_ids
    return self.tokenizer.stop_ids

  def text(self, i: int, new: list[int]) -> str:
    """The text of the new ids of prompt i."""
    text = self.tokenizer.decode_continuation(self.ids[i], new)
    return chat.without_lead(self.tokenizer, text) if self.is_chat else text


def _asked(
  model: Model,
  prompts: str | Sequence[str] | None,
  messages: Messages | Sequence[Messages] | None,
) -> _Asked:
  """Encodes prompts or conversations; InputError for both, and for neither."""
  if messages is None:
    is_one = isinstance(prompts, str)
    texts = [prompts] if is_one else prompts
    texts = check_texts("prompts", texts)
    tokenizer = model.text()
    ids = [tokenizer.encode_prompt(text) for text in texts]
    return _Asked(tokenizer, ids, is_one, False)
  if prompts is not None:
    raise InputError("give prompts or messages, not both")
  is_one = not isinstance(messages, Sequence) or not any(
    isinstance(each, list | tuple) for each in messages
  )
  tokenizer = model.text()
  several = {"messages": messages}
  if not is_one:
    several = {f"messages[{i}]": each for i, each in enumerate(messages)}
  ids = [
    chat.encode_prompt(tokenizer, chat.check(each, name))
    for name, each in several.items()
  ]
  return _Asked(tokenizer, ids, is_one, True)


def _seeds(seed: Any, count: int) -> list[int]:
  try:
    seeds = list(seed)
  except TypeError:
    first = check_seed("seed", seed)
    seeds = [first + i for i in range(count)]
  if len(seeds) != count:
    raise InputError(f"{len(seeds)} seeds for {count} prompts")
  return [check_seed(f"seed of prompt {i}", s) for i, s in enumerate(seeds)]


def score(
  model: Model,
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  batch_size: int = 16,
  replacement: Replacement | None = None,
) -> list[Score]:
  """Log-likelihoods in nats of completions, one after each prompt.

  Prompts get a BOS token if the tokenizer has one; `batch_size` rows are
  computed together. `replacement` is as for `generate`.

  Raises:
    InputError: the model has no tokenizer, a prompt is too long, or has no
      tokens while there is no BOS to begin with.
  """
  prompts = check_texts("prompts", prompts)
  completions = check_texts("completions", completions)
  batch_size = check_int("batch_size", batch_size, 1)
  if len(prompts) != len(completions):
    raise InputError(
      f"{len(prompts)} prompts and {len(completions)} completions: give as "
      "many of the one as of the other"
    )
  pairs = list(map(model.text().encode_pair, prompts, completions))
  prompt_ids, completion_ids = zip(*pairs, strict=True) if pairs else ((), ())
  return scoring.score(
    model,
    prompt_ids,
    completion_ids,
    batch_size=batch_size,
    replacement=replacement,
  )
