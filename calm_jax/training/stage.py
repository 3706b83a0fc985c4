"""The settings of one run of the training loop, and their defaults."""

import dataclasses
from typing import Any

from calm_jax.core.typed_fields import Count, Fraction


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of the training loop, and its defaults."""

  model: str = "composed"  # or "anchor" or "augmenting/<name>"
  # Regexes over leaf names; all other leaves are frozen.
  trainable: tuple[str, ...] = ("composition/.*",)
  # The batches to learn from, in a type of the experiment.
  data: Any = dataclasses.field(default_factory=dict)
  steps: Count = 1000  # updates
  batch_size: Count = 64  # rows of one update
  length: Count = 128  # tokens of a row
  # Tokens of a row of an augmenting model with another tokenizer; 0 for what
  # the longest row of the data needs.
  augmenting_length: int = 0
  accumulate: Count = 1  # equal pieces that a batch is computed in, one by one
  optimizer: str = "adamw"  # or "muon", see `optimizer.make_optimizer`
  learning_rate: float = 1e-3  # the highest one
  schedule: str = "cosine"  # or "constant", after the warm-up
  warmup: int = 50  # steps in which the learning rate rises from 0
  final: Fraction = 0.05  # the last learning rate over the highest; of "cosine"
  b1: Fraction = 0.9  # decay of Adam's first moment
  b2: Fraction = 0.98  # decay of Adam's second moment
  eps: float = 1e-8  # added to the root of Adam's second moment
  weight_decay: float = 0.01  # decoupled, of the leaves that `decay` matches
  decay: str = "kernel|embedding"  # regex over the last part of a leaf's name
  clip: float = 1.0  # largest global norm of the gradients
  log_every: Count = 20  # steps between two lines of metrics
  eval_every: Count = 500  # steps between two measurements of the held-out loss
  checkpoint_every: Count = 500  # steps between two checkpoints
  keep_last: Count = 2  # how many of the newest checkpoints are kept
  keep_best: int = 1  # how many besides, of those with the lowest held-out loss
