"""Tokenizers that a run trains for its models."""

from __future__ import annotations

from calm_jax.data.examples import TextExample
from calm_jax.experiments import vocabularies
from calm_jax.experiments.vocabularies import Vocabulary

PROGRAM = "def f(a):\r\n\treturn a\r\n"
EXAMPLES = [TextExample("", PROGRAM * 3, "x"), TextExample("a ", "few", "y")]


def test_tabs_of_programs_are_tokens_where_they_are_named(tmp_path):
  def decoded(**changes) -> str:
    wanted = {"anchor": Vocabulary(40, ("python",), **changes)}
    texts = {"python": EXAMPLES}
    made = vocabularies.make(wanted, {}, texts, tmp_path)
    assert made["anchor"] is made["augmenting"]
    return made["anchor"].decode(made["anchor"].encode(PROGRAM))

  assert decoded(symbols=("\r", "\t")) == PROGRAM
  assert decoded() != PROGRAM
