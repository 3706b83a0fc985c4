"""The kinds of evaluation that a config can name (§4)."""

from collections.abc import Mapping
from typing import Any

from calm_jax.core import typed_fields
from calm_jax.core.errors import check_choice
from calm_jax.evals.base import Evaluation
from calm_jax.evals.code_execution import HumanEval, Mbpp
from calm_jax.evals.code_to_text import CodeToText
from calm_jax.evals.lexicon import Lexicon
from calm_jax.evals.maths import Maths
from calm_jax.evals.questions import Questions
from calm_jax.evals.silver import Silver
from calm_jax.evals.translation import Translation

KINDS = {
  "translation": Translation,
  "maths": Maths,
  "questions": Questions,
  "lexicon": Lexicon,
  "silver": Silver,
  "code_to_text": CodeToText,
  "mbpp": Mbpp,
  "humaneval": HumanEval,
}
# A config must allow these to run what the models write.
RUN_CODE = ("mbpp", "humaneval")


def make(settings: Mapping[str, Any]) -> Evaluation:
  """Reads the files of a config's evaluation, before any model is run.

  `settings` are "kind", one of KINDS, and the fields of its class. Raises
  InputError if one is wrong, or a file is not as it must be.
  """
  options = dict(settings)
  kind = options.pop("kind", None)
  check_choice("evaluation kind", kind, list(KINDS))
  return typed_fields.typed(KINDS[kind], options, f"evals.{kind}").evaluation()
