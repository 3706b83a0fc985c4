"""Examples to batches of numpy arrays; imports no models and no jax.

`sources` reads examples, `pipeline` makes batches of them: a random-access
sequence of global batches, of which number `i` depends on the arguments and on
`i` alone, so that a run resumes at any step, and every host takes its rows of
the same batch. `packing` says what a batch is.
"""
