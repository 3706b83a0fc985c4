"""The evaluation command: of models that are there, without training."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import spelled

import calm_jax
from calm_jax import evaluate
from calm_jax.core.errors import InputError
from calm_jax.evaluate import EvaluateOptions
from configs import compose, kv

LINES = [{"text": "a bad cab did jab"}, {"text": "a big cab."}]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
  """A composition's folder; it changes what the anchor says."""
  folder = tmp_path_factory.mktemp("models")
  anchor, augmenting = (
    calm_jax.load_model(spelled.save(folder / name, seed))
    for seed, name in enumerate(("anchor", "augmenting"))
  )
  model = calm_jax.compose(anchor, augmenting, 1, output_init="normal")
  model.save(folder / "composed")
  return folder / "composed"


def config_of(tmp_path):
  config = compose.get_config()
  (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, LINES)))
  config.eval_data = config.anchor_eval_data = str(tmp_path / "text.jsonl")
  config.task.num_samples = 0
  return config


def nats_of(model, text):
  """Of each token, by NumPy on the model's logits."""
  text_ids = model.tokenizer.encode(text)
  ids = [model.tokenizer.bos_id, *text_ids, model.tokenizer.eos_id]
  logits_LV = np.asarray(model.logits([ids])[0, :-1], np.float64)
  total_L = np.log(np.exp(logits_LV).sum(-1))
  return total_L - logits_LV[np.arange(len(ids) - 1), ids[1:]]


def test_a_composition_beside_its_models(composed, tmp_path):
  alone = tmp_path / "alone"
  shutil.copytree(composed, alone)
  path = alone / "calm_config.json"
  path.write_text(path.read_text().replace(f'"{composed}"', '"/nowhere"'))
  options = EvaluateOptions(str(alone), str(tmp_path / "out"))
  with pytest.raises(InputError, match=r"--anchor=FOLDER and --augmenting"):
    evaluate.main(config_of(tmp_path), options)
  options = dataclasses.replace(
    options,
    anchor=str(composed.with_name("anchor")),
    augmenting=str(composed.with_name("augmenting")),
  )
  results = evaluate.main(config_of(tmp_path), options)
  found = results["perplexity"]["domain"]
  model = calm_jax.load_composed(composed)
  alone = {
    "augmenting": model.part("augmenting/augmenting"),
    "anchor": model.part("anchor"),
    "composed": model,
  }
  assert found.keys() == alone.keys()
  for column, one in alone.items():
    nats = np.concatenate([nats_of(one, line["text"]) for line in LINES])
    np.testing.assert_allclose(found[column], np.exp(nats.mean()), rtol=1e-5)
  assert len({*found.values()}) == 3
  assert results["parameters"]["composition"] == model.num_composition_params
  on_disk = json.loads((tmp_path / "out" / "results.json").read_text())
  assert on_disk["perplexity"] == results["perplexity"]
  assert on_disk["config"]["anchor"] == str(composed.with_name("anchor"))
  assert (tmp_path / "out" / "report.html").exists()
  assert (tmp_path / "out" / "attention.npz").exists()


def test_audit(composed, tmp_path):
  questions = [
    {"prompt": prompt, "completion": " a"} for prompt in ("did", "cab", "jab")
  ]
  config = config_of(tmp_path)
  path = tmp_path / "questions.jsonl"
  path.write_text("\n".join(map(json.dumps, questions)))
  config.task.evals = {
    "asked": {
      "kind": "questions", "group": "asked", "path": str(path),
      "max_new_tokens": 2,
    }
  }  # fmt: skip
  config.audit.update(examples=2, draws=1)
  options = EvaluateOptions(str(composed), str(tmp_path / "out"), audit=True)
  audit = evaluate.main(config, options)["audit"]
  assert audit["answers"].keys() == {"asked"}
  assert audit["answers"]["asked"]["examples"] == 2
  assert audit["answers"]["asked"]["chance"] == 100
  found = audit["likelihood"]["domain"]["scores"]
  model = calm_jax.load_composed(composed)
  texts = [line["text"] for line in LINES]
  for column, one in (("correct", model), ("anchor", model.part("anchor"))):
    # Without EOS, which spells nothing.
    nats = sum(nats_of(one, text)[:-1].sum() for text in texts)
    want = -nats / sum(map(len, texts))
    assert found[column]["value"] == pytest.approx(want, rel=1e-4)
  assert found["zeroed"]["value"] == pytest.approx(found["anchor"]["value"])
  assert "audit" in (tmp_path / "out" / "report.md").read_text().lower()
  options = dataclasses.replace(
    options, model=str(composed.with_name("anchor"))
  )
  with pytest.raises(InputError, match="--audit is for compositions"):
    evaluate.main(config, options)


def test_back_translated_problems(composed, tmp_path):
  """Table 7's measures, from the command's config to results.json."""
  lines = {
    "original": "a bad cab did jab\t3\n",
    "returned": "a bad cab did hide\t3\n",
  }
  paths = {name: str(tmp_path / f"{name}.tsv") for name in lines}
  for name, text in lines.items():
    (tmp_path / f"{name}.tsv").write_text(text)
  config = config_of(tmp_path)
  config.task.evals = {
    "silver": {
      "kind": "silver", "group": "GSM8K back-translated", "language": "lij",
      "path": paths["original"], "returned": paths["returned"],
      "pool": paths["original"], "shots": 0, "max_new_tokens": 4,
    }
  }  # fmt: skip
  options = EvaluateOptions(str(composed), str(tmp_path / "out"))
  entry = evaluate.main(config, options)["evals"]["silver"]
  assert entry["measures"].keys() == {"augmenting", "anchor", "composed"}
  assert entry["measures"]["anchor"]["delta"] == 0
  assert 0 < entry["measures"]["anchor"]["overlap"] < 100
  predictions = tmp_path / "out" / "predictions" / "silver.anchor.jsonl"
  rows = [json.loads(line) for line in predictions.read_text().splitlines()]
  assert [row["text"] for row in rows] == ["original", "returned"]


def test_two_that_read_other_tokens(composed, tmp_path):
  single = calm_jax.load_model(composed.with_name("anchor"))
  others = {
    name: calm_jax.load_model(
      spelled.save(tmp_path / name, seed, text=spelled.ALPHABET + "xyz")
    )
    for seed, name in enumerate(("one", "two"))
  }
  calm_jax.compose(single, others, 1).save(tmp_path / "both")
  options = EvaluateOptions(str(tmp_path / "both"), str(tmp_path / "out"))
  results = evaluate.main(config_of(tmp_path), options)
  found = results["bits_per_byte"]["domain"]
  alone = {"augmenting/one", "augmenting/two", "anchor"}
  assert found.keys() == {*alone, "composed"}
  # Until it is trained it is the anchor.
  assert found["composed"] == pytest.approx(found["anchor"])


def test_one_model_is_the_anchor(composed, tmp_path):
  single = str(composed.with_name("anchor"))
  options = EvaluateOptions(single, str(tmp_path / "out"))
  results = evaluate.main(config_of(tmp_path), options)
  assert results["perplexity"]["domain"].keys() == {"anchor"}
  assert results["parameters"].keys() == {"anchor"}
  report = (tmp_path / "out" / "report.md").read_text()
  assert "In ours m_B is anchor (" in report and "m_A is" not in report


def test_quantised_as_the_command_line_says(composed, tmp_path):
  config = config_of(tmp_path)
  for kind in ("int8", "none"):
    options = EvaluateOptions(str(composed), str(tmp_path / kind), kind)
    results = evaluate.main(config, options)
    assert results["quantise"] == kind.replace("none", "")
  config.quantise.anchor = "int8"
  for out in ("", __file__, f"{__file__}/below"):
    with pytest.raises(InputError, match="--out="):
      evaluate.main(config_of(tmp_path), EvaluateOptions("nowhere", out))
  with pytest.raises(InputError, match="give --quantise"):
    evaluate.main(config, options)


def test_results_of_a_run_are_kept(composed, tmp_path):
  (tmp_path / "results.json").write_text('{"table1": {}}')
  options = EvaluateOptions(str(composed), str(tmp_path))
  with pytest.raises(InputError, match="holds the results of a run"):
    evaluate.main(config_of(tmp_path), options)


def test_other_tokens_than_the_experiments(composed, tmp_path):
  options = EvaluateOptions(str(composed), str(tmp_path / "out"))
  with pytest.raises(InputError, match="reads other tokens"):
    evaluate.main(kv.get_config("tiny"), options)
