"""The interface of an experiment: data for stages, and its evaluation."""

import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from calm_jax.evals import audit
from calm_jax.evals.audit import AuditSet
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.generation import audited_models
from calm_jax.language_model import LanguageModel
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training.stage import Stage

Models = dict[str, LanguageModel]  # by the name of their column or side


class Experiment(Protocol):
  """Data for the stages of a run, and its evaluation."""

  task_type: ClassVar[type]  # the dataclass of the settings' "task"
  data_type: ClassVar[type]  # the dataclass of each stage's "data"
  tokenizers: dict[str, Tokenizer]  # of the "anchor" and the "augmenting" model

  def __init__(self, task: Any, seed: int, workdir: Path, loaded: Models):
    """Reads or makes everything that data and evaluation need.

    Predictions go into `workdir`; `loaded` are the sides that are not trained.
    """

  def source(
    self, stage: Stage, model: LanguageModel, seed: int, share=(0, 1)
  ) -> Any:
    """Random access to the training batches of a stage.

    Args:
      model: the part that the stage trains, for its tokenizers.
      share: this process's rows of each batch: (index, number of shares).
    """

  def eval_batches(self, stage: Stage, model: LanguageModel) -> list:
    """Held-out batches of a stage, with the rows of all processes."""

  def evaluate(self, models: Models, data: Any, prefix: str = "") -> dict:
    """Measures models, the columns of results.json, with a stage's `data`.

    `prefix` begins the names of the files of predictions.
    """

  def audit_sets(
    self, model: LanguageModel, data: Any, options: AuditOptions
  ) -> dict[str, AuditSet]:
    """The examples that a composition is audited by, by name."""

  def attention_maps(self, model: LanguageModel, data: Any) -> dict:
    """Arrays for the picture of cross-attention; see `cross_attention`."""


def measure(
  experiment: Experiment,
  models: Models,
  data: Any,
  folder: Path,
  options: AuditOptions,
) -> dict:
  """Evaluates models, writes into a folder where "composed" attends, and audits
  it, if the options give examples."""
  results = experiment.evaluate(models, data)
  model = models.get("composed")
  if model is None or not model.is_composed:
    return results
  if options.examples:
    results["audit"] = _audit(experiment, model, data, options)
  # A row that is shuffled, or is not one text for all models, has no maps.
  controls = [augmenting.control for _, augmenting in model.spec.augmenting]
  is_one_text = len(controls) == 1 or not model.tokenizers
  if is_one_text and "shuffled" not in controls:
    maps = experiment.attention_maps(model, data)
    np.savez(folder / "attention.npz", **maps)
  return results


def _audit(
  experiment: Experiment, model: LanguageModel, data: Any, options: AuditOptions
) -> dict[str, Any]:
  """Audits a composition; returns results["audit"]."""
  began = time.perf_counter()
  columns = audited_models.columns(model, options.draws, seed=0)
  entries: dict[str, Any] = {"answers": {}, "likelihood": {}}
  for name, examples in experiment.audit_sets(model, data, options).items():
    print(f"auditing {name}", flush=True)
    made = audit.audit(examples, columns, options.batch_size)
    for kind, entry in made.items():
      entries[kind][name] = entry
  print(f"audited in {time.perf_counter() - began:.0f} s", flush=True)
  return entries | {"draws": options.draws}
