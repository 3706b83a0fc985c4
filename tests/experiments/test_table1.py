"""Table 1, with models that answer from a book."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from calm_jax.data import key_value_text
from calm_jax.experiments.config_files import read_settings
from calm_jax.experiments.key_values import (
  KeyValueData,
  KeyValueExperiment,
  KeyValueTask,
)
from configs import kv as kv_config

TASK = KeyValueTask(num_keys=60, held_in_fraction=0.4, num_examples=12)
STEPS = KeyValueData({"kv_math_steps": 0.6, "kv_subs": 0.2, "num_math": 0.2})
DIRECT = KeyValueData({"kv_math": 1.0})


@pytest.fixture
def experiment(tmp_path):
  return KeyValueExperiment(TASK, 0, tmp_path, {})


class Book:
  """A model that knows the answers to some kinds of prompts."""

  def __init__(self, kv, knows=("subs", "math", "show"), add=""):
    self.values = dict(zip(kv.keys, kv.values.tolist(), strict=True))
    self.knows, self.add, self.asked = knows, add, []

  def generate(self, prompts, max_new_tokens, **_):
    self.asked += prompts
    answers = [self.one(p) for p in prompts]
    if not self.add:
      assert all(len(a) + 1 <= max_new_tokens for a in answers)
    return [answer[:max_new_tokens] for answer in answers]

  def one(self, prompt):
    name, text = prompt.removesuffix("=").split(":")
    if name not in self.knows:
      return "?"
    sign = "+" if "+" in text else "-"
    a, b = text.split(sign)
    a, b = (self.values.get(x) or int(x) for x in (a, b))
    steps, result = f"{a}{sign}{b}", str(a + b if sign == "+" else a - b)
    answers = {"subs": steps, "math": result, "show": f"{steps}={result}"}
    return answers[name] + self.add


@pytest.mark.parametrize(
  ("data", "answer"), [(STEPS, "steps"), (DIRECT, "direct")]
)
def test_a_perfect_model_scores_100(experiment, data, answer, tmp_path):
  models = {
    "augmenting": Book(experiment.kv, ("subs",)),
    "anchor": Book(experiment.kv, ()),
    "composed": Book(experiment.kv),
  }
  results = experiment.evaluate(models, data)
  steps = {"num_math_steps": {"anchor": 0.0, "composed": 100.0}}
  steps = steps if answer == "steps" else {}
  assert results["table1"] == {
    "kv_subs": {"augmenting": 100.0, "anchor": 0.0, "composed": 100.0},
    "kv_math": {
      "augmenting": 0.0, "anchor": 0.0, "composed": 100.0,
      "composed_held_in": 100.0, "composed_mixed": 100.0,
      "composed_held_out": 100.0,
    },
    "num_math": {"augmenting": 0.0, "anchor": 0.0, "composed": 100.0},
  } | steps  # fmt: skip
  everything = {"num_terms": {"2": 100.0}, "num_products": {"0": 100.0}}
  assert results["table1_parts"]["kv_math"]["composed"] == everything
  assert results["answer"] == answer
  assert results["examples"] == 12
  files = {p.name for p in (tmp_path / "predictions").iterdir()}
  sets = ["kv_subs", "num_math", "kv_math_held_out"]
  assert files == {
    *(f"{s}.{m}.jsonl" for s in sets for m in models),
    "kv_math_mixed.composed.jsonl", "kv_math_held_in.composed.jsonl",
    *(f"num_math_steps.{m}.jsonl" for row in steps.values() for m in row),
  }  # fmt: skip
  path = tmp_path / "predictions" / "kv_math_held_out.composed.jsonl"
  rows = [json.loads(line) for line in path.open()]
  assert len(rows) == 12
  assert all(r["correct"] and r["num_terms"] == 2 for r in rows)
  # KV-MATH is asked in the format that was trained.
  asked = {("=" in r["completion"], r["prompt"][:5]) for r in rows}
  assert asked == {(True, "show:") if answer == "steps" else (False, "math:")}


def test_accuracy_by_terms_and_products(tmp_path):
  task = dataclasses.replace(TASK, max_terms=4, operators="+*", max_products=1)
  experiment = KeyValueExperiment(task, 0, tmp_path, {})
  kv = experiment.kv
  known = dict(zip(kv.keys, kv.values.tolist(), strict=True))

  class Sums:
    """A model that knows sums of values and no products."""

    def generate(self, prompts, max_new_tokens, **_):
      texts = [prompt.removesuffix("=").split(":")[1] for prompt in prompts]
      assert max_new_tokens > 20
      return ["?" if "*" in text else str(eval(text, known)) for text in texts]

  results = experiment.evaluate({"anchor": Sums()}, STEPS)
  parts = results["table1_parts"]["num_math"]["anchor"]
  assert parts["num_products"] == {"0": 100.0, "1": 0.0}
  path = tmp_path / "predictions/num_math.anchor.jsonl"
  rows = [json.loads(line) for line in path.open()]
  for terms, accuracy in parts["num_terms"].items():
    of_these = [r for r in rows if r["num_terms"] == int(terms)]
    right = sum("*" not in row["prompt"] for row in of_these)
    assert accuracy == round(100 * right / len(of_these), 2)
  assert len(parts["num_terms"]) == 3


def test_an_answer_with_something_after_it_is_wrong(experiment):
  model = Book(experiment.kv, add="0")
  table = experiment.evaluate({"composed": model}, STEPS)["table1"]
  assert {x for row in table.values() for x in row.values()} == {0.0}


def test_the_splits_differ_in_their_keys_only_where_they_say_so(experiment):
  held_in = {
    k for k, h in zip(experiment.kv.keys, experiment.kv.held_in, strict=True)
    if h
  }  # fmt: skip
  shares = {}
  for split in ("held_in", "mixed", "held_out"):
    drawn = key_value_text.make_examples(
      experiment.kv, experiment._expressions(split), "kv_math"
    )
    texts = [e.prompt[len("math:") : -1].replace("-", "+") for e in drawn]
    assert len({e.prompt for e in drawn}) == 12
    shares[split] = {
      sum(key in held_in for key in text.split("+")) for text in texts
    }
  assert shares == {"held_in": {2}, "mixed": {1}, "held_out": {0}}


def test_a_prefix_keeps_other_runs_apart(experiment, tmp_path):
  model = Book(experiment.kv)
  experiment.evaluate({"composed": model}, STEPS, prefix="other/")
  files = list((tmp_path / "predictions").iterdir())
  assert [f.name for f in files] == ["other"]
  assert len(list(files[0].iterdir())) == 6


def sources(experiment):
  """The training batches of every stage of the configuration."""
  settings = read_settings(kv_config.get_config("tiny"))
  for name in [*settings.recipe, *settings.alternatives]:
    stage = dataclasses.replace(settings.stages[name], batch_size=64, length=24)
    yield name, experiment.source(stage, None, seed=0), stage


def texts(experiment, batch):
  tokenizer = experiment.tokenizers["anchor"]
  special = (tokenizer.bos_id, tokenizer.eos_id)
  for row, segments in zip(
    batch.anchor.tokens, batch.anchor.segments, strict=True
  ):
    ids = [i for i in row[segments > 0].tolist() if i not in special]
    yield tokenizer.decode(ids)


def is_names(name, text):
  """Whether the first expression of a text has nothing to do with the rest."""
  return name == "anchor_prefix" and any(c.isalpha() for c in text[5:])


def asked_in(name, text):
  """The prompts that ask for what a text of a stage answers."""
  first, *rest = text.split("=")
  asked = set() if is_names(name, text) else {f"{first}="}
  return asked | {f"math:{numbers}=" for numbers in rest[:-1]}


def test_names_tell_nothing_of_the_keys_values(experiment):
  [source] = [
    s for name, s, _ in sources(experiment) if name == "anchor_prefix"
  ]
  values = dict(
    zip(experiment.kv.keys, map(str, experiment.kv.values), strict=True)
  )
  told = []
  for text in itertools.chain(
    *(texts(experiment, source[i]) for i in range(9))
  ):
    if is_names("anchor_prefix", text):
      names, numbers, _ = text[len("show:") :].replace("-", "+").split("=")
      pairs = zip(names.split("+"), numbers.split("+"), strict=True)
      told += [values[key] == number for key, number in pairs]
  # One in 60 is right by chance.
  assert len(told) > 300 and sum(told) / len(told) < 0.06


def test_what_is_evaluated_is_never_trained_on(experiment):
  # Of 60 keys there are so few expressions that 100 batches hold most of them.
  asked = Book(experiment.kv)
  experiment.evaluate(
    {"augmenting": asked, "anchor": asked, "composed": asked}, STEPS
  )
  asked = set(asked.asked)
  assert len(asked) > 50
  for name, source, stage in sources(experiment):
    trained = {
      prompt
      for i in range(100)
      for text in texts(experiment, source[i])
      for prompt in asked_in(name, text)
    }
    assert len(trained) > 500, name
    assert not trained & asked, name
    for batch in experiment.eval_batches(stage, None):
      held_out = {
        p for t in texts(experiment, batch) for p in asked_in(name, t)
      }
      assert not trained & held_out, name


def test_composition_trains_on_held_in_keys_only(experiment):
  pieces = experiment.tokenizers["anchor"].pieces
  ids = {
    held_in: {
      pieces.index(key)
      for key, h in zip(experiment.kv.keys, experiment.kv.held_in, strict=True)
      if h == held_in
    }
    for held_in in (True, False)
  }
  for name, source, _ in sources(experiment):
    seen = set(
      itertools.chain(*(source[i].anchor.tokens.ravel() for i in range(20)))
    )
    seen = {int(i) for i in seen}
    if name.startswith("compose"):
      assert ids[True] <= seen and not ids[False] & seen, name
    elif name in ("augmenting", "anchor_prefix"):
      assert ids[True] | ids[False] <= seen
    else:
      assert not (ids[True] | ids[False]) & seen


def test_where_the_model_looks(experiment):
  class Looking:
    def attention(self, prompt, completion):
      self.prompt, self.completion = prompt, completion
      return {"weights": np.zeros(1)}

  model = Looking()
  maps = experiment.attention_maps(model, STEPS)
  assert model.prompt.startswith("show:") and model.prompt.endswith("=")
  assert model.completion == Book(experiment.kv).one(model.prompt)
  assert "weights" in maps
