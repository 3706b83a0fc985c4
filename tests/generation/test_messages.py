"""Conversations in, answers out, by the template of the checkpoint."""

from __future__ import annotations

import io
import json
import shutil

import chats
import helpers
import pytest
import spelled

import calm_jax
from calm_jax import cli, generate
from calm_jax.core.errors import InputError
from calm_jax.generation import decode
from calm_jax.generation.sampling import Sampler
from calm_jax.models.hf import export
from calm_jax.text import chat
from calm_jax.text.tokenizer import load_tokenizer

SHAPE = spelled.SHAPE | {"max_length": 512}
TALKS = [
  [{"role": "user", "content": text}] for text in ("the cat", "once", "12", "x")
]
OPTIONS = {"temperature": 2.0, "seed": 1, "max_new_tokens": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return chats.save_model(tmp_path_factory.mktemp("models") / "m", "llama_3")


@pytest.fixture(scope="module")
def model(folder):
  return calm_jax.load_model(folder)


def test_answers_end_where_the_template_ends_a_turn(model):
  tokenizer = model.tokenizer
  sampler = Sampler(temperature=OPTIONS["temperature"])
  ids = [chat.encode_prompt(tokenizer, talk) for talk in TALKS]
  whole = decode.generate(
    model, ids, max_new_tokens=100, sampler=sampler, seeds=[1, 2, 3, 4],
    stop_ids=(),
  )  # fmt: skip
  ends = {tokenizer.pieces.index(e) for e in ("<|eot_id|>", "<|end_of_text|>")}
  cut = [
    next((n for n, token in enumerate(new) if token in ends), len(new))
    for new in whole
  ]
  assert min(cut) < 100
  want = [tokenizer.decode(new[:n]) for new, n in zip(whole, cut, strict=True)]
  assert model.generate(messages=TALKS, **OPTIONS) == want
  one = model.generate(messages=TALKS[0], **OPTIONS)
  assert one == want[0]
  assert "".join(model.stream(messages=TALKS[0], **OPTIONS)) == want[0]


def test_the_space_before_answers_is_the_templates(model, monkeypatch):
  _, after, stop_ids = chat.frame(model.tokenizer)
  said = model.generate(messages=TALKS[0], max_new_tokens=100, stop="\n")
  lead, rest = said[:2], said[2:]
  assert len(rest) > 2
  frame = chat.Frame(lead, after, stop_ids)
  monkeypatch.setattr(chat, "frame", lambda _: frame)
  options = {"max_new_tokens": 100, "stop": "\n"}
  assert model.generate(messages=TALKS[0], **options) == rest
  pieces = list(model.stream(messages=TALKS[0], **options))
  assert "".join(pieces) == rest


def test_a_command_keeps_the_conversation(
  model, folder, monkeypatch, capsys, tmp_path
):
  def run(*flags, stdin="") -> str:
    flags = f"--model={folder}", "--chat", "--max_new_tokens=9", *flags
    monkeypatch.setattr("sys.argv", ["", *flags])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    generate.main()
    return capsys.readouterr().out

  monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
  talk, want = [], []
  for text in ("the cat", "once"):
    talk.append({"role": "user", "content": text})
    want.append(model.generate(messages=talk, max_new_tokens=9))
    talk.append({"role": "assistant", "content": want[-1]})
  assert run(stdin="the cat\nonce\n") == "\n".join(want) + "\n"
  asked = tmp_path / "asked.jsonl"
  asked.write_text('{"prompt": "the cat"}\n')
  talk = [{"role": "system", "content": "x"}, talk[0]]
  want = model.generate(messages=talk, max_new_tokens=9)
  line = json.loads(run("--system=x", f"--prompts={asked}"))
  assert line == {"prompt": "the cat", "completion": want}
  with pytest.raises(SystemExit, match="2"):
    run("--attention=a.png")
  assert "no --chat" in capsys.readouterr().err


def test_what_cannot_be_answered(model, tmp_path):
  for asked, said in (
    ({"prompts": "a", "messages": TALKS[0]}, "prompts or messages, not both"),
    ({}, "prompts is a NoneType"), ({"messages": "a"}, "list of messages"),
    ({"messages": [TALKS[0], []]}, r"messages\[1\] must be a list"),
    ({"messages": [[{"role": "user"}]]}, r"messages\[0\]\[0\]\['content'\]"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=said):
      model.generate(**asked)
  for asked in ({"prompt": "a", "messages": TALKS[0]}, {"messages": TALKS}):
    with pytest.raises(InputError):
      model.stream(**asked)
  base = calm_jax.load_model(spelled.save(tmp_path / "base", 1))
  with pytest.raises(InputError, match="base has no chat template"):
    base.generate(messages=TALKS[0])
  with pytest.raises(InputError, match="base has no chat template"):
    base.stream(messages=TALKS[0])


def test_a_composition_keeps_its_template(model, folder, tmp_path):
  moved = tmp_path / "anchor"
  shutil.copytree(folder, moved)
  anchor = calm_jax.load_model(moved)
  calm_jax.compose(anchor, model, 1).save(tmp_path / "composed")
  (moved / "chat_template.jinja").write_text("{{ messages[0].content }}")
  composed = calm_jax.load_composed(tmp_path / "composed")
  assert composed.tokenizer.chat_template == chats.LLAMA_3
  want = chat.encode_prompt(model.tokenizer, TALKS[0])
  assert chat.encode_prompt(composed.tokenizer, TALKS[0]) == want
  assert composed.part("anchor").tokenizer.chat_template == chats.LLAMA_3
  composed.part("anchor").export_hf(tmp_path / "exported")
  exported = load_tokenizer(tmp_path / "exported")
  assert exported.chat_template == chats.LLAMA_3


def test_several_templates_are_exported_as_they_were(tmp_path):
  chats.write(tmp_path / "model", "smollm")
  size = load_tokenizer(tmp_path / "model").vocab_size
  config = helpers.model(0, **SHAPE | {"vocab_size": size})
  export.save_params(tmp_path / "model", *config)
  calm_jax.load_model(tmp_path / "model").export_hf(tmp_path / "copy")
  assert not (tmp_path / "copy" / "chat_template.jinja").exists()
  texts = [
    (tmp_path / name / "tokenizer_config.json").read_text()
    for name in ("model", "copy")
  ]
  assert texts[0] == texts[1]
