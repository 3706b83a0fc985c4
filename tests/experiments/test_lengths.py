"""Texts that are longer than what a model was made for, wherever they enter."""

from __future__ import annotations

import dataclasses

import helpers
import numpy as np
import pytest
import spelled
import tiny

import calm_jax
from calm_jax.composition.connections import Composition
from calm_jax.core.errors import InputError
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import ExampleSource, TextExample
from calm_jax.experiments import recipe
from calm_jax.experiments.text import TextExperiment
from calm_jax.experiments.text_task import TextTask
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.training.stage import Stage

LIMIT = 12
TEXT = "a bad cab did jab a big cab. "


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """By name: of 64 tokens, of 12, of 12 of other tokens."""
  folder = tmp_path_factory.mktemp("models")
  other = spelled.ALPHABET + "xyz"
  return {
    name: calm_jax.load_model(spelled.save(folder / name, seed, **changes))
    for seed, (name, changes) in enumerate({
      "long": {},
      "short": {"max_length": LIMIT},
      "other": {"max_length": LIMIT, "text": other},
    }.items())
  }  # fmt: skip


def learned(model):
  """The model with a table of learned positions instead of rotary ones."""
  config = model.spec.anchor
  config, params = helpers.model(
    9, vocab_size=config.vocab_size, max_length=LIMIT, rope=None,
    learned_positions=True,
  )  # fmt: skip
  return LanguageModel(Composition(config), {"anchor": params}, model.tokenizer)


@pytest.mark.parametrize("kind", ["rotary", "learned", "m_A", "other tokens"])
def test_rows_longer_than_a_model_are_refused(models, kind):
  stage, option, model = Stage(length=40), "length", models["short"]
  if kind == "learned":
    model = learned(models["short"])
  elif kind == "m_A":
    model = calm_jax.compose(models["long"], models["short"])
  elif kind == "other tokens":
    model = calm_jax.compose(models["long"], models["other"])
    recipe.check_lengths("compose", stage, model)
    option, stage = "augmenting_length", Stage(length=40, augmenting_length=40)
  said = rf"stages\.compose\.{option}=40 is more than the 12 tokens"
  with pytest.raises(InputError, match=said):
    recipe.check_lengths("compose", stage, model)
  fits = dataclasses.replace(stage, **{option: LIMIT})
  recipe.check_lengths("compose", fits, model)


def rows(models, examples, **options):
  anchor, other = models["long"].tokenizer, models["other"].tokenizer
  options = RowOptions(
    tokenizer=anchor, batch_size=2, length=40, seed=None,
    augmenting={"kv": ChunkEncoder(other)}, augmenting_limits={"kv": LIMIT},
    **options,
  )  # fmt: skip
  return pipeline.text_source({"": (examples, 1.0)}, options)


def test_plain_text_goes_on_where_the_augmenting_model_ends(models):
  source = rows(models, [TextExample("", TEXT * 3, "x")])
  batches = list(source)
  learnt = np.concatenate([b.targets[b.weights > 0] for b in batches])
  tokenizer = models["long"].tokenizer
  assert learnt.tolist() == [*tokenizer.encode(TEXT * 3), tokenizer.eos_id]
  most = max(b.augmenting["kv"].positions.max() for b in batches)
  assert LIMIT // 2 < most < LIMIT


def test_prompts_too_long_for_the_augmenting_model(models):
  examples = [
    TextExample("ab cd ef ", TEXT, "line 1"),
    TextExample("a", "b", ""),
  ]
  with pytest.raises(InputError, match=r"line 1: .* more than 12 tokens"):
    rows(models, examples)
  cut = rows(models, examples, too_long="cut").truncation[""]
  assert cut.cut[0] == 1
  dropped = rows(models, examples, too_long="drop").truncation[""]
  assert dropped.dropped[0] == 1


def test_held_out_text_is_measured_in_windows_that_all_models_read(
  models, tmp_path, capsys
):
  path = tmp_path / "text.txt"
  path.write_text(TEXT * 2)
  task = TextTask(held_out={"x": ExampleSource(str(path))}, eval_batch_size=2)
  columns = {"anchor": models["long"], "augmenting": models["short"]}
  composed = calm_jax.compose(*columns.values())
  experiment = TextExperiment(task, 0, tmp_path, columns)
  results = experiment.evaluate(columns | {"composed": composed}, None)
  assert "windows of 12, not of eval_length=256" in capsys.readouterr().out
  bits = results["bits_per_byte"]["x"]
  assert bits["composed"] == bits["anchor"] and np.isfinite(bits["augmenting"])
  maps = experiment.attention_maps(composed, None)
  assert len(maps["tokens"]) == LIMIT
  other = calm_jax.compose(models["long"], models["other"])
  assert (
    len(experiment.attention_maps(other, None)["augmenting_tokens"]) <= LIMIT
  )


def test_scoring_and_generation_hold_all_limits(models):
  for other, said in {
    "short": "length limit of 12", "other": "length limit is 12: shorten"
  }.items():  # fmt: skip
    model = calm_jax.compose(models["long"], models[other])
    with pytest.raises(InputError, match=said):
      model.score(["a"], [TEXT])
    with pytest.raises(InputError, match=said):
      model.generate(TEXT, 2)
    ids = model.tokenizer.encode_prompt(TEXT)
    count = batching.num_readable(model, ids, len(ids))
    batching.token_batch(model, [ids[:count]], count)
    with pytest.raises(InputError, match="length limit"):
      batching.token_batch(model, [ids[: count + 4]], count + 4)


@pytest.mark.parametrize("bad", ["tokens", "positions"])
@pytest.mark.parametrize("where", ["source", "held out"])
def test_a_source_of_ids_that_the_model_does_not_have(bad, where, tmp_path):
  class Source(tiny.Source):
    def __getitem__(self, index):
      batch = super().__getitem__(index)
      limit = tiny.SHAPE["vocab_size" if bad == "tokens" else "max_length"]
      if index == 1:
        getattr(batch.anchor, bad)[0, 1] = limit
      return batch

  run = tiny.Run(tmp_path)
  if where == "source":
    run.source, said = Source(), "step 2, rows 1.0 to .*"
  else:
    run.eval_batches, said = (Source()[1],), ""
  limit = {"tokens": 17, "positions": 64}[bad]
  with pytest.raises(
    InputError, match=rf"{said}run from 0 to {limit}; the anc"
  ):
    run()
