"""Chat templates in the manner of families, with tokenizers to go with them.

`FAMILIES` has their Jinja texts and markers. What a template writes is said a
second time, in Python, by `written`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

import helpers
import real_tokenizers
import spelled
from tokenizers import (
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)
from tokenizers import Tokenizer as Backend

from calm_jax.models.hf import export
from calm_jax.text.tokenizer import load_tokenizer

LLAMA_3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
  {%- set system_message = messages[0]['content']|trim %}
  {%- set messages = messages[1:] %}
{%- else %}
  {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
  {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_3 = """{%- if messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == 'user' %}
    {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set reasoning = '' %}
    {%- if '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last %}
      {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') }}
      {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
      {{- '<|im_start|>assistant\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
  {%- set loop_messages = messages[1:] -%}
{%- else -%}
  {%- set prefix = "" -%}
  {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception("Conversation roles must alternate") }}
  {%- endif -%}
  {%- set role = message['role'] | replace('assistant', 'model') -%}
  {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
  {{- message['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
  {%- set system_message = messages[0]["content"] %}
  {%- set loop_messages = messages[1:] %}
{%- else %}
  {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
  {%- if message["role"] == "user" %}
    {%- if loop.last and system_message is defined %}
      {{- "[INST] " + system_message + "\\n\\n" + message["content"] }}
    {%- else %}
      {{- "[INST] " + message["content"] }}
    {%- endif %}
    {{- "[/INST]" }}
  {%- elif message["role"] == "assistant" %}
    {{- " " + message["content"]|trim + eos_token }}
  {%- else %}
    {{- raise_exception("Only user and assistant roles are supported") }}
  {%- endif %}
{%- endfor %}
"""
SMOLLM = (
  "{% for message in messages %}"
  "{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n'}}"
  "{% if message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Family(NamedTuple):
  """A family's template, tokenizer and special tokens."""

  template: str
  bos: str | None
  eos: str
  markers: tuple[str, ...]
  is_byte_level: bool
  end: str  # of a turn


FAMILIES = {
  "llama_3": Family(
    LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), True,
    "<|eot_id|>",
  ),
  "qwen_3": Family(
    QWEN_3, None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"), True,
    "<|im_end|>",
  ),
  "gemma": Family(
    GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), False,
    "<end_of_turn>",
  ),
  "mistral": Family(
    MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"), False, "</s>"
  ),
  "smollm": Family(
    SMOLLM, "<|im_start|>", "<|im_end|>", ("<|endoftext|>",), True,
    "<|im_end|>",
  ),
}  # fmt: skip
_WORDS = (
  "the cat sat on a mat", "é 日本", "once", "upon\n\na time", "12 cats;", "x",
  "\n", "\n\n", " ", "<|im_end|>", "</s>",
)  # fmt: skip
_LLAMA_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(folder: Path, name: str) -> Path:
  """Writes the tokenizer of a family, its template in one of its places."""
  family = FAMILIES[name]
  folder.mkdir(parents=True, exist_ok=True)
  backend = Backend(models.BPE(unk_token=None if family.is_byte_level else "?"))
  alphabet = sorted({*"".join(_WORDS), *family.template, "▁", "."})
  if family.is_byte_level:
    backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(_LLAMA_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  elif name == "gemma":
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
      [decoders.Replace("▁", " "), decoders.Fuse()]
    )
  else:
    real_tokenizers.use_metaspace(backend)
  trainer = trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=alphabet, show_progress=False,
    special_tokens=[] if family.is_byte_level else ["?"],
  )  # fmt: skip
  texts = [*real_tokenizers.TEXTS, *_WORDS, "\n\n", "\n\n\n", "system user\n"]
  backend.train_from_iterator(texts * 3, trainer)
  named = [token for token in (family.bos, family.eos) if token]
  backend.add_special_tokens([*named, *family.markers])
  if name == "qwen_3":
    backend.add_tokens(["<think>", "</think>"])
  backend.save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast"}
  config |= {"bos_token": family.bos, "eos_token": family.eos}
  if name == "llama_3":
    (folder / "chat_template.jinja").write_text(family.template)
  elif name == "smollm":
    several = {"tool_use": "no", "default": family.template}
    config["chat_template"] = [
      {"name": kind, "template": text} for kind, text in several.items()
    ]
  else:
    config["chat_template"] = family.template
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def talk(rng: random.Random, name: str) -> list[dict[str, str]]:
  """A random conversation, whose last message may be a user's."""

  def message(role: str) -> dict[str, str]:
    words = rng.choices(_WORDS, k=rng.randint(0, 5))
    content = rng.choice(("", "", " ")).join(words)
    if rng.random() < 0.9:  # else a token may reach into it
      content = content.lstrip("\n")
    if name == "qwen_3" and role == "assistant" and rng.random() < 0.3:
      content = f"<think>\nthe cat\n</think>\n\n{content}"
    return {"role": role, "content": content}

  system = [message("system")] if rng.random() < 0.4 else []
  rounds = rng.randint(1, 4)
  turns = [message(r) for _ in range(rounds) for r in ("user", "assistant")]
  more = [message("user")] if rng.random() < 0.2 else []
  return [*system, *turns, *more]


def written(name: str, messages: list[dict]) -> list[list[tuple[str, bool]]]:
  """By hand: the pieces of text of each row that a conversation makes, and
  whether they are an assistant's."""
  has_system = messages[0]["role"] == "system"
  system = messages[0]["content"] if has_system else None
  turns = messages[has_system:]
  count = len(turns) // 2
  if name == "qwen_3" or (name == "mistral" and has_system):
    return [_written(name, system, turns[: 2 * n]) for n in range(1, count + 1)]
  return [_written(name, system, turns[: 2 * count])]


def _written(name, system, turns):
  end, bos = FAMILIES[name].end, FAMILIES[name].bos
  pieces, several = [], name not in ("qwen_3", "mistral") or system is None
  several = several and name != "qwen_3"
  if name == "llama_3":
    head = f"{bos}<|start_header_id|>system<|end_header_id|>\n\nCutting "
    head += f"Knowledge Date: December 2023\n\n{(system or '').strip()}{end}"
  elif name == "smollm":
    said = "You are SmolLM" if system is None else system
    head = f"<|im_start|>system\n{said}{end}\n"
  elif name == "qwen_3":
    head = "" if system is None else f"<|im_start|>system\n{system}{end}\n"
  else:
    head = bos
  pieces.append((head, False))
  for n in range(0, len(turns), 2):
    asked, said = turns[n]["content"], turns[n + 1]["content"]
    is_last = n == len(turns) - 2
    if name == "llama_3":
      header = "<|start_header_id|>{}<|end_header_id|>\n\n"
      given = header.format("user") + asked.strip() + end
      given += header.format("assistant")
      learnt, rest = said.strip() + end, ""
    elif name == "gemma":
      first = f"{system}\n\n" if n == 0 and system is not None else ""
      given = f"<start_of_turn>user\n{first}{asked.strip()}{end}\n"
      given += "<start_of_turn>model\n"
      learnt, rest = said.strip() + end, "\n"
    elif name == "mistral":
      first = f"{system}\n\n" if is_last and system is not None else ""
      given, rest = f"[INST] {first}{asked}[/INST]", ""
      learnt = f" {said.strip()}{end}"
    else:
      given = f"<|im_start|>user\n{asked}{end}\n<|im_start|>assistant\n"
      learnt, rest = said + end, "\n"
      if name == "qwen_3":
        thought, _, after = said.rpartition("</think>")
        thought = thought.removeprefix("<think>").strip("\n")
        if thought or after != said:
          after = after.lstrip("\n")
        learnt = after + end
        if is_last:
          after = after.lstrip("\n")
          learnt = f"<think>\n{thought}\n</think>\n\n{after}{end}"
    is_learnt = several or is_last
    pieces += [(given, False), (learnt, is_learnt), (rest, False)]
  return pieces


def save_model(folder: Path, family: str) -> Path:
  """Writes a small random model of 512 tokens with a family's template."""
  write(folder, family)
  size = load_tokenizer(folder).vocab_size
  shape = spelled.SHAPE | {"max_length": 512, "vocab_size": size}
  export.save_params(folder, *helpers.model(0, **shape))
  return folder
