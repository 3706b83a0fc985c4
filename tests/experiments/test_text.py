"""Perplexity of a small random model, against NumPy on its logits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import spelled
import tiny

import calm_jax
from calm_jax.errors import InputError
from calm_jax.experiments.text import LOOK_TOKENS, Text, TextTask

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


def make(tmp_path, model, **changes):
  settings = {
    "data": write(tmp_path / "train.jsonl", LINES * 10),
    "eval_data": write(tmp_path / "test.jsonl", LINES),
    "anchor_eval_data": "", "num_samples": 0, "sample_tokens": 5,
    "text_field": "text", "prompt_field": "prompt",
    "completion_field": "completion", "eval_batch_size": 4,
    "eval_length": LENGTH, "seed": 0,
  } | changes  # fmt: skip
  return Text(
    TextTask(**settings), tmp_path, {"anchor": model, "augmenting": model}
  )


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
  result = make(tmp_path, model).evaluate({"anchor": model}, {})
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


def test_the_anchors_domain_is_sampled_from_it(tmp_path, model):
  experiment = make(tmp_path, model, num_samples=4)
  result = experiment.evaluate({"anchor": model}, {})
  assert result["perplexity"].keys() == {"domain", "anchor_domain"}
  texts = [e.completion for e in experiment.eval_sets["anchor_domain"]]
  assert len(set(texts)) > 1
  again = make(tmp_path, model, num_samples=4)
  again.evaluate({"anchor": model}, {}, prefix="other/")
  assert [e.completion for e in again.eval_sets["anchor_domain"]] == texts


def test_a_file_for_the_anchors_domain(tmp_path, model):
  path = write(tmp_path / "own.jsonl", [{"text": "abc"}])
  experiment = make(tmp_path, model, anchor_eval_data=path, num_samples=4)
  [example] = experiment.eval_sets["anchor_domain"]
  assert example.completion == "abc"


def test_the_fraction_of_the_data(tmp_path, model):
  lines = [{"text": f"{a}{b}"} for a in "abcdefghij" for b in "abcdefghij"]
  experiment = make(tmp_path, model, data=write(tmp_path / "d.jsonl", lines))
  stage = tiny.stage(
    data={"fraction": 0.1, "pack": False}, batch_size=10, length=LENGTH
  )
  source = experiment.source(stage, model, seed=0)
  assert source.num_rows == 10
  batch = experiment.eval_batches(stage, model)
  assert sum(b["weights"].sum() for b in batch) == sum(
    by_hand(model, r)[1] for r in LINES
  )


@pytest.mark.parametrize(
  ("record", "length"),
  [(LINES[0], 4), (LINES[1], 1), ({"text": 60 * "a"}, 1)],
)
def test_where_the_model_looks(record, length, tmp_path, model):
  experiment = make(
    tmp_path, model, eval_data=write(tmp_path / "one.jsonl", [record])
  )
  composed = calm_jax.compose(model, model, 1, visibility="encoder")
  look = experiment.look(composed, {})
  text = record.get("text") or record["prompt"] + record["completion"]
  tokens = min(1 + len(text), LOOK_TOKENS)
  assert look["weights"].shape == (1, 2, tokens, tokens)
  assert look["prompt_length"] == length
  assert not look["weights"][..., length:].any()


@pytest.mark.parametrize("option", ["data", "eval_data"])
def test_no_text(option, tmp_path, model):
  with pytest.raises(InputError, match=rf"--config\.{option}="):
    make(tmp_path, model, **{option: ""})


def test_no_models(tmp_path):
  with pytest.raises(InputError, match=r"--config\.anchor="):
    Text(None, tmp_path, {})


def test_models_with_different_tokenizers(tmp_path, model):
  folder = spelled.save(tmp_path / "other", 2, text=spelled.ALPHABET + "XY")
  other = calm_jax.load_model(str(folder))
  path = write(tmp_path / "x.jsonl", [*LINES, {"text": "a XY cab is X"}])
  experiment = make(tmp_path, model, eval_data=path)
  composed = calm_jax.compose(model, other, 1)
  models = {"augmenting": other, "anchor": model, "composed": composed}
  result = experiment.evaluate(models, {})
  # Perplexities per token of different tokens do not compare.
  assert result.keys() == {"bits_per_byte"}
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
  stage = tiny.stage(
    data={"fraction": 1.0, "pack": False}, length=40, augmenting_length=48
  )
  composed = calm_jax.compose(model, other, 1)
  batch = experiment.source(stage, composed, seed=0)[0]
  assert batch["augmenting/augmenting/tokens"].shape == (8, 48)
  alone = experiment.source(stage, other, seed=0)[0]
  assert not any(key.startswith("augmenting") for key in alone)
  [evaluated] = experiment.eval_batches(stage, composed)
  assert evaluated["augmenting/augmenting/visible"].shape == (8, 40)
