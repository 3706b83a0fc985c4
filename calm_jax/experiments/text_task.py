"""The settings of the text experiment: its task, and a stage's data."""

import dataclasses
from typing import Any

from calm_jax.core.typed_fields import Count, Fraction
from calm_jax.data.examples import ExampleSource
from calm_jax.data.facts import Facts
from calm_jax.experiments.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class TextTask:
  """The text that is learnt (`sources`) and measured (`held_out`), by name.

  Entries with {language} in their names stand for one of each language. A
  held-out set of an empty path is left out.
  """

  languages: tuple[str, ...] = ()  # codes, such as lij_Latn
  sources: dict[str, ExampleSource] = dataclasses.field(default_factory=dict)
  held_out: dict[str, ExampleSource] = dataclasses.field(default_factory=dict)
  # By name, see `evals.tasks.make`.
  evals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  # People whose files are written before all else.
  facts: Facts = dataclasses.field(default_factory=Facts)
  # Of models that are trained from scratch, by side; without an entry such a
  # model reads the other one's tokens.
  tokenizers: dict[str, Vocabulary] = dataclasses.field(default_factory=dict)
  # Baselines that are evaluated too, see `baselines`: the source of exemplars
  # for the text that m_A pastes into m_B's prompt, "" for none; and both
  # models' averaged probabilities.
  pasted: str = ""
  ensemble: bool = False
  skip_evals: tuple[str, ...] = ()  # names or patterns, such as mgsm_*
  allow_code_execution: bool = False  # of programs that models write, sandboxed
  # Texts to sample from an anchor that is loaded, for held-out text of its own
  # domain if there is no "anchor_domain"; 0 for none.
  num_samples: int = 0
  sample_tokens: Count = 200  # of a sample at most
  prompt_tokens: Count = 1024  # of an evaluation's prompt at most, the anchor's
  eval_batch_size: Count = 32  # rows, in generation too
  eval_length: Count = 256  # tokens of a row


@dataclasses.dataclass(frozen=True)
class Share:
  """The weight of a source in a mixture, and the fraction of it that is used.

  Languages share the weight of an entry with {language}.
  """

  weight: float
  fraction: Fraction = 1.0


@dataclasses.dataclass(frozen=True)
class TextData:
  """The data of a stage; the mixture is by the names of the task's sources."""

  mixture: dict[str, Share] = dataclasses.field(default_factory=dict)
  pack: bool = True  # whether a row holds several examples
  too_long: str = "error"  # or "cut" or "drop": a prompt longer than a row
  watch: tuple[
    str, ...
  ] = ()  # held-out sets whose loss is followed; () for all
