"""The settings of one run of the training loop, and their defaults."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of the training loop, and its defaults.

  Attributes:
    model: what is run: "composed", "anchor" or "augmenting/<name>".
    trainable: regexes over leaf names; all other leaves are frozen.
    data: the batches to learn from, in a type of the experiment.
    steps: updates.
    batch_size: rows of one update.
    length: tokens of a row.
    augmenting_length: tokens of a row of an augmenting model with another
      tokenizer; 0 for what the longest row of the data needs.
    accumulate: equal pieces that a batch is computed in, one after the other.
    learning_rate: the highest one.
    schedule: "cosine" or "constant", after the warm-up.
    warmup: steps in which the learning rate rises from 0.
    final: the last learning rate as a fraction of the highest, for "cosine".
    b1, b2: decay of Adam's first and second moment.
    eps: added to the root of Adam's second moment.
    weight_decay: decoupled decay, of the leaves that `decay` matches.
    decay: regex over the last part of a leaf's name.
    clip: largest global norm of the gradients.
    log_every, eval_every, checkpoint_every: steps between two lines of
      metrics, two measurements of the held-out loss, two checkpoints.
    keep_last: how many of the newest checkpoints are kept.
    keep_best: how many are kept besides, of the lowest held-out loss.
  """

  model: str = "composed"
  trainable: tuple[str, ...] = ("composition/.*",)
  data: Any = dataclasses.field(default_factory=dict)
  steps: int = 1000
  batch_size: int = 64
  length: int = 128
  augmenting_length: int = 0
  accumulate: int = 1
  learning_rate: float = 1e-3
  schedule: str = "cosine"
  warmup: int = 50
  final: float = 0.05
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 0.01
  decay: str = "kernel|embedding"
  clip: float = 1.0
  log_every: int = 20
  eval_every: int = 500
  checkpoint_every: int = 500
  keep_last: int = 2
  keep_best: int = 1
