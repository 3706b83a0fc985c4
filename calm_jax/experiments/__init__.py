"""Experiments: data for the stages, and what is measured at the end."""
