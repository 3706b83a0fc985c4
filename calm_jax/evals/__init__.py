"""Evaluators: callables and examples in, metrics and rows out."""
