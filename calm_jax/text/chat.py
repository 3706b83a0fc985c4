"""Conversations as the text and the tokens that a chat template makes of them.

A chat template is a Jinja text of a checkpoint's tokenizer, which writes
messages between the markers that its model was trained with; transformers
renders it. No BOS or EOS is added to those that it writes itself.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from calm_jax.core.errors import InputError, check_text
from calm_jax.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

ASSISTANT = "assistant"


class Frame(NamedTuple):
  """The texts that a template writes around an answer, and what ends it."""

  # Between the end of a prompt and the answer, such as a space; None if the
  # template does not write answers behind the text that asks for them.
  before: str | None
  after: str  # the end of the turn
  stop_ids: tuple[int, ...]  # the tokenizer's, and the one that ends a turn


class Conversation(NamedTuple):
  """A conversation's tokens, and which of them its assistant would generate."""

  ids: list[int]
  learnt: list[bool]


def check(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
  """Returns the messages of a conversation without fields that are None.

  Raises InputError unless each has a "role" and a "content" of text.
  """
  if not isinstance(messages, list | tuple) or not messages:
    raise InputError(
      f"{name} must be a list of messages, such as "
      '{"role": "user", "content": "Hello"}'
    )
  for i, message in enumerate(messages):
    place = f"{name}[{i}]"
    if not isinstance(message, Mapping):
      raise InputError(f"{place} is a {type(message).__name__}, not a dict")
    for key in ("role", "content"):
      check_text(f"{place}[{key!r}]", message.get(key))
  return [
    {key: value for key, value in message.items() if value is not None}
    for message in messages
  ]


def render(tokenizer: Tokenizer, messages: Messages, **options: Any) -> str:
  """Writes a conversation by the tokenizer's chat template.

  `options` are those of transformers: add_generation_prompt, for a text that an
  assistant continues, and continue_final_message. Raises InputError if there is
  no template, or it does not take the conversation.
  """
  if tokenizer.chat_template is None:
    raise InputError(
      f"the tokenizer of {tokenizer.source} has no chat template, so that "
      "nobody can tell how its model reads a conversation: give it prompts, or "
      "put the template that it was trained with beside its files, as "
      "chat_template.jinja"
    )
  # It takes a second, which no other text needs.
  from transformers.utils import chat_template_utils

  try:
    rendered, _ = chat_template_utils.render_jinja_template(
      [list(messages)],
      chat_template=tokenizer.chat_template,
      **tokenizer.named_tokens,
      **options,
    )
  except Exception as error:  # Templates raise whatever Python does.
    raise InputError(
      f"the chat template of {tokenizer.source} does not take the "
      f"conversation: {error}"
    ) from error
  return rendered[0]


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
  """Returns the ids of a conversation that an assistant is to continue."""
  text = render(tokenizer, messages, add_generation_prompt=True)
  return tokenizer.check(tokenizer.encode(text))


@functools.lru_cache(maxsize=16)
def frame(tokenizer: Tokenizer) -> Frame:
  """Finds out what a template writes around an answer, by writing one."""
  asked = [{"role": "user", "content": "What is it?"}]
  prompt = render(tokenizer, asked, add_generation_prompt=True)
  answer = "An answer."
  whole = render(tokenizer, [*asked, {"role": ASSISTANT, "content": answer}])
  if answer not in whole:
    raise InputError(
      f"the chat template of {tokenizer.source} does not write the content of "
      f"a message whose role is {ASSISTANT!r}"
    )
  before, _, after = whole.rpartition(answer)
  lead = before.removeprefix(prompt) if before.startswith(prompt) else None
  # Many templates write whitespace around the marker that ends a turn.
  end = tokenizer.encode_within(after.strip())[:1]
  stops = *tokenizer.stop_ids, *(i for i in end if i in tokenizer.added_ids)
  return Frame(lead, after, tuple(dict.fromkeys(stops)))


def without_lead(tokenizer: Tokenizer, text: str) -> str:
  """Returns an answer without what the template writes before all of them.

  Nothing is returned for as long as the text may become that.
  """
  lead = frame(tokenizer).before or ""
  return "" if lead.startswith(text) else text.removeprefix(lead)


def conversations(
  tokenizer: Tokenizer, messages: Messages, apart: bool = False
) -> list[Conversation]:
  """Returns a conversation in tokens that teach each answer of its assistant.

  Each answer stands behind the tokens that a model would be asked for it with,
  those of `encode_prompt`, and is learnt up to the token that ends its turn.
  One conversation goes on with the next answer if the tokens that ask for that
  begin with all of its own. They do not where, say, a template drops earlier
  reasoning: then another conversation begins, as after each answer if `apart`.
  Messages after the last answer are left out.

  Raises:
    InputError: nobody answers, or as `answered` does.
  """
  made: list[Conversation] = []
  stops = frame(tokenizer).stop_ids
  for i, message in enumerate(messages):
    if message["role"] != ASSISTANT:
      continue
    prompt, answer = answered(tokenizer, messages[: i + 1])
    asked = tokenizer.encode(prompt)
    if apart or not made or asked[: len(made[-1].ids)] != made[-1].ids:
      made.append(Conversation([], []))
    ids, learnt = made[-1]
    ids += asked[len(ids) :]
    learnt += [False] * (len(ids) - len(learnt))
    new = tokenizer.continuation(ids, prompt, answer)
    if not new:
      raise InputError(f"messages[{i}] has no token to learn")
    ends = [n for n, token in enumerate(new, start=1) if token in stops]
    count = ends[-1] if ends else len(new)
    ids += new
    learnt += [True] * count + [False] * (len(new) - count)
  if not made:
    raise InputError(f"no message has the role {ASSISTANT!r}")
  return made


def answered(tokenizer: Tokenizer, messages: Messages) -> tuple[str, str]:
  """Returns the text that asks for the last message, and the one it adds.

  Raises InputError if the template asks for an answer in other words than those
  that it begins one with.
  """
  prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
  whole = render(tokenizer, messages)
  if whole.startswith(prompt):
    return prompt, whole.removeprefix(prompt)
  # Mistral's, for one, write a system message only where they ask.
  before, after, _ = frame(tokenizer)
  content = messages[-1]["content"]
  for text in (content, content.strip()):
    if before is not None and whole.endswith(before + text + after):
      return prompt, before + text + after
  raise InputError(
    f"the chat template of {tokenizer.source} asks for an answer by "
    f"{prompt[-40:]!r}, and does not write answers behind that: a model cannot "
    "learn from such conversations; write them as prompts and completions"
  )
