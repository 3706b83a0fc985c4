"""The adapter to lm-evaluation-harness; tests/parity holds it against `hf`."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import chats
import harness
import helpers
import jax
import numpy as np
import pytest
import real_tokenizers
import spelled
import transformers

import calm_jax
from calm_jax.core.errors import InputError
from calm_jax.generation import decode
from calm_jax.models.hf import export
from calm_jax.text import tokenizer

pytest.importorskip(
  "lm_eval", reason="lm-evaluation-harness is not installed (extra eval)"
)
from lm_eval.api.instance import Instance

from calm_jax.lm_eval import CalmJax

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 12  # tokens that the models read at most


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A model, and a composition of it with another; a token is a letter."""
  path = tmp_path_factory.mktemp("models")
  for name, seed, width in (("anchor", 1, 32), ("kv", 2, 24)):
    config, params = helpers.model(
      seed, vocab_size=14, width=width, max_length=LIMIT
    )
    export.save_params(path / name, config, params)
    tokenizer.train_sentencepiece(
      ["abcdefghij"], path / name / "tokenizer", vocab_size=14
    )
  anchor, other = (
    calm_jax.load_model(str(path / name)) for name in ("anchor", "kv")
  )
  composed = calm_jax.compose(anchor, {"kv": other})
  theta = helpers.random_params(composed.params["composition"], 7)
  params = composed.params | {"composition": theta}
  dataclasses.replace(composed, params=params).save(path / "composed")
  return path


@pytest.fixture(scope="module", params=["anchor", "composed"])
def adapter(folders, request):
  return CalmJax(str(folders / request.param), add_bos_token=True, batch_size=1)


def logits(adapter, ids) -> np.ndarray:
  """Of each token of ids; all rows are of one length, for one program."""
  row = [*ids, *[0] * (LIMIT - len(ids))]
  return np.asarray(adapter.model.logits(np.array([row])))[0, : len(ids)]


def logprobs(adapter, ids) -> np.ndarray:
  """Of each token of ids but the first, after those before it."""
  each_LV = np.asarray(jax.nn.log_softmax(logits(adapter, ids[:-1])))
  return each_LV[range(len(ids) - 1), ids[1:]]


def requests(kind, *args):
  return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


def test_log_likelihoods(adapter):
  bos, spell = adapter.prefix_token_id, adapter.model.tokenizer.encode
  pairs = [("abc", "de"), ("", "abc"), ("a", "bcdefghijabcdefgh"[:LIMIT])]
  wanted = [([bos, *spell("abcde")], 2), ([bos, *spell("abc")], 3)]
  # 14 tokens: one more than are read and predicted; the first is left out.
  wanted.append((spell("a" + pairs[2][1]), LIMIT))
  found = adapter.loglikelihood(requests("loglikelihood", *pairs))
  for (ids, count), (logprob, greedy) in zip(wanted, found, strict=True):
    assert len(ids) <= LIMIT + 1
    each = logprobs(adapter, ids)[-count:]
    assert logprob == pytest.approx(each.sum(), abs=1e-4)
    assert not greedy
  best = int(logits(adapter, wanted[0][0])[-1].argmax())
  [found] = adapter._loglikelihood_tokens([(None, wanted[0][0], [best])])
  assert found[1]


def test_a_text_that_spells_the_bos_gets_no_second_one(
  adapter, tmp_path, monkeypatch
):
  chat = real_tokenizers.toys(tmp_path)["chat"]
  monkeypatch.setattr(adapter, "_text", chat)
  ids = [chat.bos_id, *chat.encode("the cat")]
  for text in ("the cat", "<|begin|>the cat"):
    assert adapter.tok_encode(text) == ids
    assert adapter.tok_encode(text, add_special_tokens=True) == ids
  assert adapter.tok_encode("a", add_special_tokens=False) == chat.encode("a")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
  folder = chats.write(tmp_path_factory.mktemp("chat"), "gemma")
  size = tokenizer.load_tokenizer(folder).vocab_size
  shape = spelled.SHAPE | {"vocab_size": size, "max_length": 256}
  export.save_params(folder, *helpers.model(1, **shape))
  return CalmJax(str(folder), batch_size=1), folder


def test_chats_are_written_as_hf_writes_them(chatting):
  adapter, folder = chatting
  theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
  talk = [{"role": r, "content": "a cat"} for r in ("user", "assistant")]
  for add in (True, False):
    options = {"add_generation_prompt": add, "continue_final_message": not add}
    want = theirs.apply_chat_template(talk, tokenize=False, **options)
    assert adapter.apply_chat_template(talk, add) == want
  system = [{"role": "system", "content": "x"}]
  text = adapter.apply_chat_template([*system, talk[0]])
  assert "x\n\na cat" in text
  with pytest.raises(InputError, match="must alternate"):
    adapter.apply_chat_template(talk[:1] * 2)
  # What it refuses because of the system message is written without it.
  with pytest.warns(UserWarning, match="its system message is left out"):
    text = adapter.apply_chat_template([talk[0], *system, talk[1]])
  assert text == theirs.apply_chat_template(
    talk, tokenize=False, add_generation_prompt=True
  )
  assert adapter.chat_template(True) == chats.GEMMA
  assert adapter.chat_template(False) is None
  with pytest.raises(InputError, match="--apply_chat_template rag"):
    adapter.chat_template("rag")


def test_rolling_log_likelihoods_predict_each_token_once(adapter):
  bos = adapter.prefix_token_id
  text = "abcdefghijjihgfedcbaabcabcabcbca"
  ids = adapter.tok_encode(text)
  assert ids[0] == bos and len(ids) == 33
  total = logprobs(adapter, [bos, *ids[:LIMIT]]).sum()
  for start in range(LIMIT, len(ids), LIMIT):
    end = min(start + LIMIT, len(ids))
    window = ids[max(0, end - LIMIT - 1) : end]
    total += logprobs(adapter, window)[start - end :].sum()
  found = adapter.loglikelihood_rolling(
    requests("loglikelihood_rolling", (text,), ("ab",), ("",))
  )
  assert found[0] == pytest.approx(total, abs=1e-3)
  short = logprobs(adapter, [bos, bos, *ids[1:3]]).sum()
  assert found[1] == pytest.approx(short, abs=1e-4)
  assert found[2] == pytest.approx(
    logprobs(adapter, [bos, bos]).sum(), abs=1e-4
  )


def test_generation_stops_where_it_is_told_to(adapter):
  options = {"until": ["#"], "max_gen_toks": 6, "do_sample": False}
  contexts = ["abc", "", "hgfedcba" * 3]
  asked = [(context, options) for context in contexts]
  whole = adapter.generate_until(requests("generate_until", *asked))
  model, room = adapter.model, LIMIT - 6
  # A context that is too long loses its beginning; none is BOS alone.
  ids = [adapter.tok_encode(context)[-room:] for context in contexts]
  assert ids[1] == [model.tokenizer.bos_id] and len(ids[2]) == room
  new = decode.generate(model, ids, max_new_tokens=6, batch_size=1)
  assert whole == [model.tokenizer.decode(each) for each in new]
  context, text = max(
    zip(contexts, whole, strict=True), key=lambda c: len(c[1])
  )
  assert len(text) == 6
  for until in (text[2], [text[1:4], "#", ""]):
    stop = until if isinstance(until, str) else until[0]
    [cut] = adapter.generate_until(
      requests("generate_until", (context, options | {"until": until}))
    )
    assert cut == text[: text.index(stop)]
  [once] = adapter.generate_until(
    requests("generate_until", ("abc", options | {"max_gen_toks": 1}))
  )
  assert once == model.tokenizer.decode(new[0][:1])


def test_contexts_are_cut_to_what_augmenting_models_read(folders, tmp_path):
  limit, letters = 8, "abcdefghijk"
  shape = {"vocab_size": 15, "max_length": limit}
  export.save_params(tmp_path / "other", *helpers.model(3, **shape))
  tokenizer.train_sentencepiece(
    [letters], tmp_path / "other" / "tokenizer", vocab_size=15
  )
  model = calm_jax.compose(
    *(calm_jax.load_model(f) for f in (folders / "anchor", tmp_path / "other"))
  )
  assert model.tokenizers
  model.save(tmp_path / "composed")
  adapter = CalmJax(str(tmp_path / "composed"), add_bos_token=True)
  context = "abcdefghij"
  [(logprob, _)] = adapter.loglikelihood(
    requests("loglikelihood", (context, "ab"))
  )
  # With its BOS m_A reads 7 letters of the context.
  ids = model.tokenizer.encode(context[-7:] + "ab")
  assert logprob == pytest.approx(logprobs(adapter, ids)[-2:].sum(), abs=1e-4)
  options = {"until": ["#"], "max_gen_toks": 3, "do_sample": False}
  [text] = adapter.generate_until(
    requests("generate_until", (context, options))
  )
  ids = model.tokenizer.encode(context[-4:])
  new = decode.generate(model, [ids], max_new_tokens=3)
  assert text == model.tokenizer.decode(new[0])


def test_sampling_is_a_matter_of_the_seed(folders):
  def drawn(seed):
    adapter = CalmJax(
      str(folders / "anchor"), add_bos_token=True, seed=seed, batch_size=1
    )
    options = {"temperature": 1.5, "do_sample": True, "max_gen_toks": 8}
    return adapter.generate_until(
      requests("generate_until", *[("abc", options)] * 4)
    )

  assert drawn(0) == drawn(0)
  assert drawn(0) != drawn(1)
  assert len(set(drawn(0))) > 1


def test_what_cannot_be_is_said(folders, adapter):
  folder = str(folders / "anchor")
  with pytest.raises(
    InputError, match="max_length=99 must be a whole number, 1 to 12"
  ):
    CalmJax(folder, add_bos_token=True, max_length=99)
  with pytest.raises(InputError, match="max_batch_size"):
    CalmJax(folder, max_batch_size=64)
  for options, message in (
    ({"num_beams": 3}, "cannot generate with num_beams"),
    ({"max_gen_toks": LIMIT}, "no room for a context"),
    (
      {"do_sample": True, "temperature": -1, "max_gen_toks": 1},
      "temperature=-1",
    ),
  ):
    with pytest.raises(InputError, match=message):
      adapter.generate_until(requests("generate_until", ("a", options)))
  with pytest.raises(InputError, match="continuation of 13 tokens"):
    adapter.loglikelihood(requests("loglikelihood", ("a", "abcdefghijabc")))


def test_lm_eval_finds_the_adapter_by_its_entry_point():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  name, _, target = setup["options.entry_points"]["lm_eval.models"].partition(
    "="
  )
  module, _, attribute = target.strip().partition(":")
  assert name.strip() == "calm_jax"
  assert getattr(importlib.import_module(module), attribute) is CalmJax


def test_the_command_line_on_a_saved_composition(folders, tmp_path):
  tasks = harness.write(
    tmp_path,
    {
      "tiny_choice": [
        {"context": "abc", "choices": ["de", "ij", "a"], "target": 0},
        {"context": "", "choices": ["abc", "cba"], "target": 1},
      ],
      "tiny_rolling": [{"text": "abcdefghijjihgfedcba"}],
      "tiny_generate": [{"context": "abc"}, {"context": "j"}],
    },
    {"until": ["#"], "max_gen_toks": 5},
  )
  folder = folders / "composed"
  run = subprocess.run(
    [sys.executable, "-m", "calm_jax.lm_eval", "--model", "calm_jax",
     "--model_args",
     f"pretrained={folder},add_bos_token=True,anchor={folders / 'anchor'},"
     f"augmenting={folders / 'kv'}",
     "--tasks", ",".join(harness.TASKS), "--include_path", tasks,
     "--batch_size", "4", "--output_path", tmp_path / "out.json",
     "--log_samples"],
    capture_output=True, text=True, cwd=ROOT,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-3000:]
  [file] = tmp_path.glob("samples_tiny_generate*.jsonl")
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  said = [line["resps"][0][0] for line in lines]
  composed = calm_jax.load_composed(folder)
  assert said == composed.generate(["abc", "j"], 5)
  [file] = tmp_path.glob("samples_tiny_choice*.jsonl")
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  found = [float(resp[0][0]) for resp in lines[0]["resps"]]
  # The harness puts a space before a choice.
  want = composed.score(["abc"] * 3, [" de", " ij", " a"])
  np.testing.assert_allclose(found, [s.logprob for s in want], atol=1e-4)
