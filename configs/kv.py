"""The key-value experiment of the paper (§4.1, Table 1).

configs/kv.py         for two CPU cores, about 15 minutes
configs/kv.py:paper   the paper's size, for an accelerator
configs/kv.py:tiny    a minute, to see that everything runs
configs/kv.py:lora    and every other kind of calm_jax.experiments.variants;
                      also with a size: configs/kv.py:paper,lora
"""

from ml_collections import ConfigDict

from calm_jax.experiments import config_files, variants
from calm_jax.experiments.key_values import KeyValueTask
from calm_jax.experiments.settings import Settings
from calm_jax.training.stage import Stage

# Arithmetic on what is written last, whatever came before.
AFTER_PREFIXES = {"num_math": 0.3, "num_math_steps": 0.2, "num_math_given": 0.5}


def get_config(variant: str = "small") -> ConfigDict:
  """The config of a variant, with the fields of `Settings`."""
  settings = Settings(
    experiment="key_values",
    task=KeyValueTask(),
    workdir="runs/kv",
    augmenting_name="kv",
    recipe=("augmenting", "anchor", "anchor_prefix", "compose"),
    alternatives=("compose_direct",),
    stages=_stages(),
    vanilla=("augmenting_vanilla",),
  )
  config = config_files.to_config(settings)
  variants.apply(VARIANTS, variant, config)
  return config


def _stages() -> dict[str, Stage]:
  augmenting = {
    "model": "augmenting/kv",
    "trainable": ("augmenting/kv/.*",),
    "steps": 600,
    "weight_decay": 0.1,
  }
  anchor = {"model": "anchor", "trainable": ("anchor/.*",), "length": 24}
  return {
    # Single keys, the dictionary itself, are among the expressions. m_A knows
    # of nothing but substitution, and does it under any prompt.
    "augmenting": Stage(
      data=_data({"kv_subs": 1.0}, min_terms=1, any_prompt=True),
      length=16,
      **augmenting,
    ),
    # m_B learns to calculate, then to calculate with what is written last,
    # whatever came before.
    "anchor": Stage(
      data=_data({"num_math": 0.5, "num_math_steps": 0.5}),
      steps=1800,
      schedule="constant",
      **anchor,
    ),
    "anchor_prefix": Stage(data=_data(AFTER_PREFIXES), steps=2000, **anchor),
    # A vanilla m_A has learnt what m_B has in its last stage, of keys nothing
    # but that they are words.
    "augmenting_vanilla": Stage(
      data=_data(AFTER_PREFIXES), length=24, **augmenting
    ),
    "compose": _compose("kv_math_steps"),
    "compose_direct": _compose("kv_math"),
  }


def _data(tasks: dict[str, float], **changes) -> dict:
  """The fields of `KeyValueData` that a stage can change."""
  return {"tasks": tasks, "pack": False} | changes


def _compose(kv_math: str) -> Stage:
  """A stage on D_C: arithmetic over held-in keys, and the other tasks."""
  tasks = {kv_math: 0.6, "kv_subs": 0.15, "num_math": 0.25}
  return Stage(
    data=_data(tasks, keys="held_in"), steps=900, length=20, weight_decay=0.1
  )


def _small(config: ConfigDict) -> None:
  config.alternatives = ()
  config.composition.num_connections = 4
  config.augmenting_model.update(width=96, mlp_width=256)
  for stage in config.stages.values():
    stage.update(batch_size=128, learning_rate=2e-3)


def _both(config: ConfigDict) -> None:
  _small(config)
  config.alternatives = ("compose_direct",)


def _ablations(config: ConfigDict) -> None:
  """For `python -m calm_jax.ablations`: 30 runs of the last stage."""
  _small(config)
  config.workdir = "runs/ablations"
  config.task.num_examples = 512
  config.stages.compose.update(steps=500)


def _tiny(config: ConfigDict) -> None:
  config.workdir = "runs/kv_tiny"
  config.task.update(num_keys=200, num_examples=16)
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(width=32, num_layers=2, mlp_width=64)
  for stage in config.stages.values():
    stage.update(steps=20, batch_size=8, length=24, warmup=5)
    stage.update(log_every=5, eval_every=10, checkpoint_every=10)


def _paper(config: ConfigDict) -> None:
  config.workdir = "runs/kv_paper"
  config.dtype = "bfloat16"
  config.task.update(num_keys=25_000, min_terms=3, max_terms=6, operators="+-*")
  config.anchor_model.update(
    width=768, num_layers=12, num_heads=12, num_kv_heads=12, mlp_width=2048
  )
  config.augmenting_model.update(
    width=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_width=1408
  )
  for stage in config.stages.values():
    stage.data.pack = True
    stage.update(batch_size=256, length=256, warmup=1000, learning_rate=5e-4)
  config.stages.augmenting.steps = 50_000
  config.stages.augmenting_vanilla.steps = 50_000
  config.stages.anchor.steps = 150_000
  config.stages.anchor_prefix.steps = 50_000
  config.stages.compose.steps = 20_000
  config.stages.compose_direct.steps = 20_000


VARIANTS = {
  "small": _small,
  "both": _both,
  "tiny": _tiny,
  "paper": _paper,
  "ablations": _ablations,
}
