"""Examples to batches of numpy arrays; imports no models and no jax.

A source is a random-access sequence of global batches: `source[i]` depends on
its arguments and on `i` alone, so that a run resumes at any step, and every
host takes its rows of the same batch. `calm_jax.data.packing` says what a
batch is.
"""
