"""Plans a run on machines that are not there: see `calm_jax.plan`."""
