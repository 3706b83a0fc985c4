"""What a run will need of machines that are not there: see calm_jax.plan."""
