"""Tests of calm_jax.data.templates."""

import pytest

from calm_jax.core.errors import InputError
from calm_jax.data.templates import own_fields, templates


def test_templates():
  texts = templates("{{{source}}} ->", " {n:03d} {pair[de]}", ())
  record = {"source": "a{b}", "n": 7, "pair": {"de": "x"}, "more": None}
  assert texts(record) == ("{a{b}} ->", " 007 x", ())
  assert templates("", "{text}", ("text",))({"text": "a"}) == ("", "a", ())
  # A field may be empty where the whole is not.
  assert templates("{q}\n{input}", "{a}", ())(
    {"q": "Sort", "input": "", "a": "b"}
  ) == ("Sort\n", "b", ())


@pytest.mark.parametrize(
  "prompt, completion, message",
  [
    ("{a", "{a}", r"'\{a' cannot be read: .*written twice"),
    ("", "{a} {}", "without the name of a field"),
    ("", "{0}", "without the name of a field"),
    ("{c}", "{a}", r"'\{c\}' asks for 'c', but there are 'a', 'b'"),
    ("", "{a} {c[d]}", "asks for 'c'"),
  ],
)
def test_bad_templates(prompt, completion, message):
  with pytest.raises(InputError, match=message):
    templates(prompt, completion, ("a", "b"))


@pytest.mark.parametrize(
  "record, message",
  [
    ({"b": "x"}, r"the template '\{a\}: \{b\[de\]\}' asks for 'a', but it has"),
    ({}, "it has no fields"),
    ({"a": None, "b": {"de": "x"}}, "'a' is a NoneType.*text or a number"),
    ({"a": "x", "b": {"de": ["x"]}}, r"'b\[de\]' is a list"),
    ({"a": "x", "b": {"fr": "x"}}, "asks for 'de'"),
    ({"a": "x", "b": "x"}, "cannot be filled"),
  ],
)
def test_records_that_do_not_fit(record, message):
  with pytest.raises(ValueError, match=message):
    templates("", "{a}: {b[de]}", ())(record)


def test_empty_texts():
  with pytest.raises(ValueError, match="no text to learn"):
    templates("{a}", "{b}", ())({"a": "x", "b": ""})
  # It would be taken for plain text.
  with pytest.raises(ValueError, match="its prompt is empty"):
    templates("{a}", "{b}", ())({"a": "", "b": "x"})


def test_own_fields():
  texts = own_fields("q", "a", "talk", "body")
  assert texts({"q": "x", "a": "y", "body": "z"}) == ("x", "y", ())
  assert texts({"q": "x", "body": "z"}) == ("", "z", ())
  with pytest.raises(ValueError, match="expected 'body', or 'q' and 'a'"):
    texts({"q": "x"})
