"""What an experiment gives to the training command."""

from __future__ import annotations

from typing import Any, Protocol

from calm_jax.language_model import LanguageModel
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training.stage import Stage


class Experiment(Protocol):
  """Data for the stages of a run, and its evaluation."""

  tokenizer: Tokenizer

  def source(
    self,
    stage: Stage,
    model: LanguageModel,
    seed: int,
    share: tuple[int, int] = (0, 1),
  ):
    """Random access to the training batches of a stage.

    `model` is what the stage trains, for its tokenizers; `share` is what this
    process takes of each batch's rows: (index, of how many).
    """

  def eval_batches(self, stage: Stage, model: LanguageModel) -> list:
    """Held-out batches of a stage, all of their rows; may be empty."""

  def evaluate(
    self, models: dict[str, LanguageModel], data: dict, prefix: str = ""
  ) -> dict[str, Any]:
    """A part of results.json; the keys of models are its columns."""

  def look(self, model: LanguageModel, data: dict) -> dict[str, Any]:
    """Arrays for the picture of where the composed model looks."""
