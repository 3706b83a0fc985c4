"""Composition of frozen language models (CALM, arXiv 2401.02412) in JAX."""

from calm_jax.errors import InputError
from calm_jax.language_model import LanguageModel, compose, load_model

__all__ = ["InputError", "LanguageModel", "compose", "load_model"]
