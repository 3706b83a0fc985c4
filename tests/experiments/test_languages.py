"""Entries that stand for one of each language."""

from __future__ import annotations

import pytest

from calm_jax.core.errors import InputError
from calm_jax.experiments.languages import expand


def test_an_entry_of_each_language():
  entries = {
    "{language}-eng": {
      "path": "{language}.txt", "prompt": "{language_name}: {source}",
      "weight": 2, "more": {"code": "{language}"},
    },
    "eng": {"path": "{language}"},
  }  # fmt: skip
  assert expand(entries, ("lij_Latn", "vec_Latn")) == {
    "lij_Latn-eng": {
      "path": "lij_Latn.txt", "prompt": "Ligurian: {source}", "weight": 2,
      "more": {"code": "lij_Latn"},
    },
    "vec_Latn-eng": {
      "path": "vec_Latn.txt", "prompt": "Venetian: {source}", "weight": 2,
      "more": {"code": "vec_Latn"},
    },
    "eng": {"path": "{language}"},
  }  # fmt: skip


def test_names_of_other_things_are_not_asked_for():
  assert expand({"{language}": {"path": "{language}"}}, ("ruby",)) == {
    "ruby": {"path": "ruby"}
  }
  with pytest.raises(InputError, match="no language 'ruby'"):
    expand({"{language}": "{language_name}"}, ("ruby",))


def test_what_cannot_be_expanded():
  with pytest.raises(InputError, match="there are none"):
    expand({"{language}": {}}, ())
  with pytest.raises(InputError, match=r"\['eng'\] are named twice"):
    expand({"{language}": {}, "eng": {}}, ("eng",))
