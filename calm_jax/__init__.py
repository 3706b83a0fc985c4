"""Composition of frozen language models (CALM, arXiv 2401.02412) in JAX."""

from calm_jax.composition.model import compose, join_compositions
from calm_jax.core.errors import InputError
from calm_jax.core.version import __version__
from calm_jax.language_model import LanguageModel, load_composed, load_model

__all__ = [
  "InputError",
  "LanguageModel",
  "__version__",
  "compose",
  "join_compositions",
  "load_composed",
  "load_model",
]
