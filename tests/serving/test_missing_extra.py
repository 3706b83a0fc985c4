"""The server where its packages are not installed."""

from __future__ import annotations

import sys

import pytest

from calm_jax import serve
from calm_jax.core.errors import InputError


def test_the_extra_that_is_missing_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "uvicorn", None)
  monkeypatch.setattr(sys, "argv", ["serve", "--model=nowhere"])
  with pytest.raises(
    InputError, match=r"uvicorn is not .* pip install 'calm_jax\[serve\]'"
  ):
    serve.main()
