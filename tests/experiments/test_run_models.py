"""The shapes of the models that a run trains from scratch."""

import pytest

from calm_jax.experiments import config_files, run_models
from calm_jax.models.rope import Rope
from configs import kv


@pytest.mark.parametrize(
  ("side", "rope"),
  [("anchor", Rope(16, theta=100.0)), ("augmenting", Rope(24, theta=500.0))],
)
def test_positions_turn_as_the_settings_say(side, rope):
  config = kv.get_config()
  config.anchor_model.rope_theta = 100.0
  config.augmenting_model.rope_theta = 500.0
  settings = config_files.read_settings(config)
  assert run_models.scratch_config(settings, side, 30).rope == rope
