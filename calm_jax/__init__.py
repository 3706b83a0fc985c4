"""Composition of frozen language models (CALM, arXiv 2401.02412) in JAX."""

from calm_jax.composing import compose
from calm_jax.errors import InputError
from calm_jax.joining import join_compositions
from calm_jax.language_model import LanguageModel
from calm_jax.opening import load_composed, load_model
from calm_jax.version import __version__

__all__ = [
  "InputError",
  "LanguageModel",
  "__version__",
  "compose",
  "join_compositions",
  "load_composed",
  "load_model",
]
