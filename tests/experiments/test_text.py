"""Perplexity of a small random model, against NumPy on its logits."""

from __future__ import annotations

import dataclasses
import json
import math

import chats
import helpers
import numpy as np
import pytest
import real_tokenizers
import spelled
import tiny

import calm_jax
from calm_jax.composition.connections import Composition
from calm_jax.core.errors import InputError
from calm_jax.data.examples import ExampleSource
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.experiments.text import PICTURE_TOKENS, TextExperiment
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.language_model import LanguageModel
from calm_jax.models.hf import export
from calm_jax.text import chat
from calm_jax.text.tokenizer import load_tokenizer
from calm_jax.training import step

LENGTH = 8
LINES = [
  {"prompt": "abc", "completion": "de."},
  {"text": "a bad cab did jab a big cab"},  # goes on in three more windows
  {"text": "j"},
  {"prompt": "", "completion": "hidebad"},
  # With BOS and EOS exactly one window.
  {"text": "abcdef"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = spelled.save(tmp_path_factory.mktemp("models") / "anchor", 1)
  return calm_jax.load_model(str(folder))


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return str(path)


def make(tmp_path, model, data="", eval_data="", anchor_data="", **changes):
  own = {"data": data, "eval_data": eval_data}
  for name, lines in (("data", LINES * 10), ("eval_data", LINES)):
    own[name] = own[name] or write(tmp_path / f"{name}.jsonl", lines)
  settings = {
    "sources": {"data": ExampleSource(own["data"])},
    "held_out": {
      "domain": ExampleSource(own["eval_data"]),
      "anchor_domain": ExampleSource(anchor_data),
    },
    "sample_tokens": 5, "prompt_tokens": 30, "eval_batch_size": 4,
    "eval_length": LENGTH,
  } | changes  # fmt: skip
  loaded = {"anchor": model, "augmenting": model}
  return TextExperiment(TextTask(**settings), 0, tmp_path, loaded)


def mixture(*, fraction=1.0, **weights):
  parts = {
    name.replace("_", "-"): Share(weight, fraction)
    for name, weight in weights.items()
  }
  return TextData(parts, pack=False, watch=("domain",))


def by_hand(model, record) -> tuple[float, int]:
  """(nats, tokens) of one record, window by window."""
  tokenizer = model.tokenizer
  prompt = record.get("prompt", "")
  text = record.get("text") or record["completion"]
  ids = [tokenizer.bos_id, *tokenizer.encode(prompt + text), tokenizer.eos_id]
  given = 1 + len(prompt)
  nats, tokens = 0.0, 0
  for start in range(0, len(ids) - 1, LENGTH - 1):
    window = ids[start : start + LENGTH]
    padded = np.array([window + [0] * (LENGTH - len(window))])
    logits = np.asarray(model.logits(padded)[0], np.float64)
    for t in range(1, len(window)):
      if start + t >= given:
        row = logits[t - 1]
        nats += np.log(np.exp(row - row.max()).sum()) + row.max()
        nats -= row[window[t]]
        tokens += 1
  return nats, tokens


def test_perplexity_equals_numpy(tmp_path, model):
  result = make(tmp_path, model).evaluate({"anchor": model}, None)
  parts = [by_hand(model, record) for record in LINES]
  nats, tokens = map(sum, zip(*parts, strict=True))
  size = sum(len(r.get("text") or r["completion"]) for r in LINES)
  assert tokens == size + len(LINES)  # every character and EOS, once each
  assert result["perplexity"]["domain"]["anchor"] == pytest.approx(
    math.exp(nats / tokens), rel=1e-5
  )
  assert result["bits_per_byte"]["domain"]["anchor"] == pytest.approx(
    nats / math.log(2) / size, rel=1e-5
  )
  rows = [
    json.loads(line)
    for line in (tmp_path / "scores" / "domain.anchor.jsonl").open()
  ]
  for row, (nats, tokens) in zip(rows, parts, strict=True):
    assert row["tokens"] == tokens
    assert row["nats"] == pytest.approx(nats, rel=1e-5)


def test_the_logits_of_a_row_at_a_time_are_held(tmp_path, model, monkeypatch):
  chunks, row_losses = [], step.row_losses

  def spy(params, spec, batch):
    chunks.append(spec.anchor.compute.loss_chunk)
    return row_losses(params, spec, batch)

  monkeypatch.setattr(step, "row_losses", spy)
  make(tmp_path, model, eval_batch_size=64).evaluate({"anchor": model}, None)
  assert chunks and {*chunks} == {LENGTH}


def test_the_anchors_domain_is_sampled_from_it(tmp_path, model):
  experiment = make(tmp_path, model, num_samples=4)

  def held():
    return any(value is model for value in vars(experiment).values())

  assert held()
  result = experiment.evaluate({"anchor": model}, None)
  assert not held()  # A run that trains it has another one.
  assert result["perplexity"].keys() == {"domain", "anchor_domain"}
  texts = [e.completion for e in experiment.held_out["anchor_domain"]]
  assert len(set(texts)) > 1
  again = make(tmp_path, model, num_samples=4)
  again.evaluate({"anchor": model}, None, prefix="other/")
  assert [e.completion for e in again.held_out["anchor_domain"]] == texts


def test_a_file_for_the_anchors_domain(tmp_path, model):
  path = write(tmp_path / "own.jsonl", [{"text": "abc"}])
  experiment = make(tmp_path, model, anchor_data=path, num_samples=4)
  [example] = experiment.held_out["anchor_domain"]
  assert example.completion == "abc"


def test_the_fraction_of_the_data(tmp_path, model):
  lines = [{"text": f"{a}{b}"} for a in "abcdefghij" for b in "abcdefghij"]
  experiment = make(tmp_path, model, data=write(tmp_path / "d.jsonl", lines))
  stage = tiny.stage(
    data=mixture(data=1.0, fraction=0.1), batch_size=10, length=LENGTH
  )
  source = experiment.source(stage, model, seed=0)
  assert source.num_rows == 10
  batch = experiment.eval_batches(stage, model)
  assert sum(b.weights.sum() for b in batch) == sum(
    by_hand(model, r)[1] for r in LINES
  )


@pytest.mark.parametrize(
  ("record", "length"), [(LINES[0], 4), (LINES[1], 1), ({"text": 60 * "a"}, 1)]
)
def test_where_the_model_looks(record, length, tmp_path, model):
  experiment = make(
    tmp_path, model, eval_data=write(tmp_path / "one.jsonl", [record])
  )
  composed = calm_jax.compose(model, model, 1, visibility="encoder")
  maps = experiment.attention_maps(composed, None)
  text = record.get("text") or record["prompt"] + record["completion"]
  tokens = min(1 + len(text), PICTURE_TOKENS)
  assert maps["weights"].shape == (1, 2, tokens, tokens)
  assert maps["prompt_length"] == length
  assert not maps["weights"][..., length:].any()


def test_no_text(tmp_path, model):
  with pytest.raises(InputError, match=r"--config\.eval_data="):
    make(tmp_path, model, held_out={"domain": ExampleSource("")})
  experiment = make(tmp_path, model, sources={"data": ExampleSource("")})
  stage = tiny.stage(data=mixture(data=1.0), length=LENGTH)
  with pytest.raises(InputError, match=r"--config\.data="):
    experiment.source(stage, model, seed=0)
  stage = tiny.stage(data=mixture(other=1.0), length=LENGTH)
  with pytest.raises(InputError, match=r"source='other' is none of \['data'\]"):
    experiment.source(stage, model, seed=0)


def test_a_mixture_of_languages(tmp_path, model):
  for name, letter in (("x", "a"), ("y", "b")):
    write(tmp_path / f"{name}.jsonl", [{"text": letter * 3}] * 8)
  experiment = make(
    tmp_path,
    model,
    languages=("x", "y"),
    sources={
      "{language}": ExampleSource(str(tmp_path / "{language}.jsonl")),
      "other": ExampleSource(
        write(tmp_path / "z.jsonl", [{"text": "ccc"}] * 8)
      ),
    },
  )
  data = mixture(other=0.5)
  data.mixture["{language}"] = Share(0.5, 0.5)
  stage = tiny.stage(data=data, batch_size=40, length=LENGTH)
  source = experiment.source(stage, model, seed=0)
  texts = [
    model.tokenizer.decode(row)
    for i in range(5)
    for row in source[i].anchor.tokens
  ]
  counts = {letter: sum(letter in t for t in texts) for letter in "abc"}
  # Languages share the weight of their entry.
  assert counts == {"a": 50, "b": 50, "c": 100}


def test_evaluations_of_the_config(tmp_path, model):
  lines = {"lij": "abc\ncab\nbad\n", "eng": "def\nfed\nhid\n"}
  for name, text in lines.items():
    (tmp_path / name).write_text(text)
  settings = {
    "kind": "translation", "group": "Seed", "language": "lij_Latn",
    "path": str(tmp_path / "lij"), "target": str(tmp_path / "eng"),
    "rows": "1:", "pool_rows": ":1", "shots": 1, "max_new_tokens": 5,
  }  # fmt: skip
  experiment = make(tmp_path, model, evals={"seed": settings})
  composed = calm_jax.compose(model, model, 1)
  models = {"anchor": model, "composed": composed}
  results = experiment.evaluate(models, None)
  entry = results["evals"]["seed"]
  # 29 characters and BOS do not hold an exemplar and the question.
  assert (entry["examples"], entry["shots"], entry["prompts_cut"]) == (2, 0, 0)
  assert entry["against_anchor"]["composed"]["delta"] == 0
  assert results["groups"]["Seed"]["better"] == {"composed": (0, 1)}
  for column in models:
    rows = (tmp_path / "predictions" / f"seed.{column}.jsonl").open()
    prompts = [json.loads(row)["prompt"] for row in rows]
    assert prompts == ["Ligurian: cab\nEnglish:", "Ligurian: bad\nEnglish:"]
  skipped = make(tmp_path, model, evals={"seed": settings}, skip_evals=("se*",))
  assert "evals" not in skipped.evaluate(models, None)
  with pytest.raises(InputError, match=r"\['x\*'\] are none of \['seed'\]"):
    make(tmp_path, model, evals={"seed": settings}, skip_evals=("x*",))
  code = {"kind": "mbpp", "group": "M", "path": "x", "max_new_tokens": 9}
  with pytest.raises(InputError, match="--allow_code_execution"):
    make(tmp_path, model, evals={"mbpp": code})


def test_which_prompts_fit(tmp_path, model):
  experiment = make(tmp_path, model, prompt_tokens=5)
  models = {"anchor": model}
  assert experiment._fits(models, 50, "abcd")  # and BOS
  assert not experiment._fits(models, 50, "abcde")
  # The model reads 64 tokens, with those of the answer.
  assert experiment._fits(models, 59, "abcd")
  assert not experiment._fits(models, 60, "abcd")


def test_a_prompt_fits_if_m_a_can_read_it_in_its_own_tokens(tmp_path, model):
  tokenizer = real_tokenizers.cls_sep(tmp_path / "cls_sep")
  config, params = helpers.model(
    2, vocab_size=tokenizer.vocab_size, max_length=16
  )
  small = LanguageModel(Composition(config), {"anchor": params}, tokenizer)
  models = {"composed": calm_jax.compose(model, small, 1)}
  experiment = make(tmp_path, model)
  room = 16 - 5  # without [CLS], "▁a", "b", "c" and "d"
  assert experiment._fits(models, room, "abcd")
  assert not experiment._fits(models, room + 1, "abcd")


def test_an_anchor_that_is_trained_here_reads_the_tokens_of_m_a(
  tmp_path, model
):
  task = make(tmp_path, model)._task
  loaded = {"augmenting": model}
  experiment = TextExperiment(task, 0, tmp_path, loaded)
  assert experiment.tokenizers["anchor"] is model.tokenizer
  with pytest.raises(InputError, match="cannot be sampled"):
    sampling = dataclasses.replace(task, num_samples=2)
    TextExperiment(sampling, 0, tmp_path, loaded)


def test_no_models(tmp_path):
  with pytest.raises(InputError, match=r"--config\.anchor="):
    TextExperiment(TextTask(), 0, tmp_path, {})


def test_models_with_different_tokenizers(tmp_path, model):
  folder = spelled.save(tmp_path / "other", 2, text=spelled.ALPHABET + "XY")
  other = calm_jax.load_model(str(folder))
  path = write(tmp_path / "x.jsonl", [*LINES, {"text": "a XY cab is X"}])
  experiment = make(tmp_path, model, eval_data=path)
  composed = calm_jax.compose(model, other, 1)
  models = {"augmenting": other, "anchor": model, "composed": composed}
  result = experiment.evaluate(models, None)
  # Perplexities per token of different tokens do not compare.
  assert result["perplexity"]["domain"].keys() == {"anchor", "composed"}
  bits = result["bits_per_byte"]["domain"]
  assert bits["composed"] == pytest.approx(bits["anchor"], rel=1e-6)
  unknown = {}
  for column in models:
    rows = (tmp_path / "scores" / f"domain.{column}.jsonl").open()
    unknown[column] = [json.loads(row)["unknown_bytes"] for row in rows]
  # "X", "Y" and "s" are in no piece of the anchor's, "s" in none of the other.
  assert unknown["augmenting"] == [0] * len(LINES) + [1]
  assert unknown["anchor"] == unknown["composed"] == [0] * len(LINES) + [4]
  parts = [by_hand(other, record) for record in LINES]
  rows = (tmp_path / "scores" / "domain.augmenting.jsonl").open()
  for row, (nats, tokens) in zip(map(json.loads, rows), parts, strict=False):
    assert row["tokens"] == tokens
    assert row["nats"] == pytest.approx(nats, rel=1e-5)


def test_stages_read_what_their_model_does(tmp_path, model):
  folder = spelled.save(tmp_path / "other", 2, text=spelled.ALPHABET + "XY")
  other = calm_jax.load_model(str(folder))
  experiment = make(tmp_path, model)
  stage = tiny.stage(data=mixture(data=1.0), length=40, augmenting_length=48)
  composed = calm_jax.compose(model, other, 1)
  batch = experiment.source(stage, composed, seed=0)[0]
  assert batch.augmenting["augmenting"].tokens.shape == (8, 48)
  alone = experiment.source(stage, other, seed=0)[0]
  assert not alone.augmenting and not alone.visible
  [evaluated] = experiment.eval_batches(stage, composed)
  assert evaluated.visible["augmenting"].shape == (8, 40)


def test_conversations_are_learnt_and_measured(tmp_path, capsys):
  folder = chats.write(tmp_path / "instruct", "llama_3")
  size = load_tokenizer(folder).vocab_size
  shape = spelled.SHAPE | {"vocab_size": size, "max_length": 256}
  export.save_params(folder, *helpers.model(3, **shape))
  instruct = calm_jax.load_model(folder)
  base = calm_jax.load_model(spelled.save(tmp_path / "base", 4, max_length=256))
  roles = ["user", "assistant"] * 2
  talk = [{"role": r, "content": f"a {r}"} for r in roles]
  path = write(tmp_path / "talk.jsonl", [{"messages": talk}] * 2)
  experiment = make(
    tmp_path, instruct, data=path, eval_data=path, eval_length=200
  )
  stage = tiny.stage(data=mixture(data=1.0), batch_size=1, length=200)
  batch = experiment.source(stage, instruct, seed=0)[0]
  encoder = calm_jax.compose(instruct, instruct, 1, visibility="encoder")
  apart = experiment.source(stage, encoder, seed=0)
  assert apart.num_rows == 2 * experiment.source(stage, instruct, 0).num_rows
  assert apart[0].prompt_ends[0, 0] in (
    len(chat.encode_prompt(instruct.tokenizer, talk[:n])) for n in (1, 3)
  )
  result = experiment.evaluate({"anchor": instruct, "augmenting": base}, None)
  said = capsys.readouterr().out
  assert "augmenting has no chat template for domain" in said
  [(ids, learnt)] = chat.conversations(instruct.tokenizer, talk)
  assert sum(learnt) == batch.weights.sum()
  logits = np.asarray(instruct.logits(np.array([ids]))[0], np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -sum(
    logits[t - 1, ids[t]] for t, is_learnt in enumerate(learnt) if is_learnt
  )
  assert result["bits_per_byte"]["domain"] == {
    "anchor": pytest.approx(nats / math.log(2) / len("a assistant" * 2), 1e-5)
  }
  path = write(
    tmp_path / "two.jsonl", [{"messages": t} for t in (talk, talk[2:])]
  )
  experiment = make(tmp_path, instruct, eval_data=path, eval_length=200)
  sets = experiment.audit_sets(encoder, None, AuditOptions(examples=2))
  assert sets["domain"].completions == ["a assistant"] * 2
