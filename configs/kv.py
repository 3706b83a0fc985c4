"""The key-value experiment of the paper (§4.1, Table 1).

configs/kv.py         for two CPU cores, about 15 minutes
configs/kv.py:paper   the paper's size, for an accelerator
configs/kv.py:tiny    a minute, to see that everything runs
configs/kv.py:lora    and every other name of configs/common.py's KINDS; also
                      with a size: configs/kv.py:paper,lora
"""

from ml_collections import ConfigDict

from configs import common

# Arithmetic on what is written last, whatever came before.
AFTER_PREFIXES = {"num_math": 0.3, "num_math_steps": 0.2, "num_math_given": 0.5}


def get_config(variant: str = "small") -> ConfigDict:
  """See above."""
  config = common.get_config()
  config.experiment = "key_values"
  config.workdir = "runs/kv"
  config.augmenting_name = "kv"
  config.task = ConfigDict()
  config.task.num_keys = 999
  config.task.held_in_fraction = 0.2
  config.task.min_terms = 2
  config.task.max_terms = 2
  config.task.operators = "+-"
  config.task.keys = "pieces"
  config.task.digits = "single"
  config.task.num_examples = 1000
  config.recipe = ("augmenting", "anchor", "anchor_prefix", "compose")
  config.alternatives = ("compose_direct",)
  config.stages = ConfigDict()
  config.stages.augmenting = common.stage(
    model="augmenting/kv",
    trainable=("augmenting/kv/.*",),
    # Single keys, the dictionary itself, are among the expressions. m_A knows
    # of nothing but substitution, and does it under any prompt.
    data=_data({"kv_subs": 1.0}, min_terms=1, any_prompt=True),
    steps=600,
    length=16,
    weight_decay=0.1,
  )
  # m_B learns to calculate, then to calculate with what is written last,
  # whatever came before.
  config.stages.anchor = common.stage(
    model="anchor",
    trainable=("anchor/.*",),
    data=_data({"num_math": 0.5, "num_math_steps": 0.5}),
    steps=1800,
    schedule="constant",
    length=24,
  )
  config.stages.anchor_prefix = common.stage(
    model="anchor",
    trainable=("anchor/.*",),
    data=_data(AFTER_PREFIXES),
    steps=2000,
    length=24,
  )
  # A vanilla m_A has learnt what m_B has in its last stage, of keys nothing but
  # that they are words.
  config.stages.augmenting_vanilla = common.stage(
    model="augmenting/kv",
    trainable=("augmenting/kv/.*",),
    data=_data(AFTER_PREFIXES),
    steps=600,
    length=24,
    weight_decay=0.1,
  )
  config.vanilla = ("augmenting_vanilla",)
  config.stages.compose = _compose("kv_math_steps")
  config.stages.compose_direct = _compose("kv_math")
  common.apply(VARIANTS, variant, config)
  return config


def _data(tasks: dict[str, float], **changes) -> ConfigDict:
  return ConfigDict({"tasks": ConfigDict(tasks), "pack": False} | changes)


def _compose(kv_math: str) -> ConfigDict:
  """D_C: arithmetic over held-in keys, and what keeps the other tasks."""
  return common.stage(
    data=_data(
      {kv_math: 0.6, "kv_subs": 0.15, "num_math": 0.25}, keys="held_in"
    ),
    steps=900,
    length=20,
    weight_decay=0.1,
  )


def _small(config: ConfigDict) -> None:
  config.alternatives = ()
  config.unroll = 4
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
