"""Composition of frozen language models (CALM, arXiv 2401.02412) in JAX."""
