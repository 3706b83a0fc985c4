"""The key-value experiment of the paper (§4.1, Table 1).

configs/kv.py         for a CPU, about 10 minutes on one core
configs/kv.py:paper   the paper's size, for one GPU
configs/kv.py:tiny    a minute, to see that everything runs
configs/kv.py:lora    and every other kind of calm_jax.experiments.variants;
                      also with a size: configs/kv.py:paper,lora
"""

from ml_collections import ConfigDict

from calm_jax.experiments import config_files, variants
from calm_jax.experiments.key_values import KeyValueTask
from calm_jax.experiments.settings import CompositionOptions, Settings
from calm_jax.training.stage import Stage

# Arithmetic on what is written last, whatever came before.
AFTER_PREFIXES = {"num_math": 0.3, "num_math_steps": 0.2, "num_math_given": 0.5}


def get_config(variant: str = "small") -> ConfigDict:
  """The config of a variant, with the fields of `Settings`."""
  settings = Settings(
    experiment="key_values",
    task=KeyValueTask(),
    workdir="runs/kv",
    # The composition writes what m_A's newest state says, which it finds sooner
    # and for more keys by its position than by what it holds.
    composition=CompositionOptions(positions="rope"),
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
  tasks = {kv_math: 0.5, "kv_subs": 0.3, "num_math": 0.2}
  return Stage(
    data=_data(tasks, keys="held_in"), steps=900, length=20, weight_decay=0.1
  )


def _small(config: ConfigDict) -> None:
  config.alternatives = ()
  config.composition.num_connections = 2
  # No row is longer than 64 tokens.
  config.anchor_model.update(
    num_layers=3, num_heads=8, num_kv_heads=8, mlp_width=512, rope_theta=100.0
  )
  config.augmenting_model.update(width=96, mlp_width=256)
  stages = config.stages
  for stage in stages.values():
    stage.update(batch_size=128, optimizer="muon", learning_rate=4e-3)
    stage.warmup = 20
  # Rows of several examples, since short ones leave much of a row empty.
  for name in ("augmenting", "augmenting_vanilla"):
    stages[name].data.pack = True
    stages[name].update(steps=300, batch_size=48, length=48, weight_decay=0.01)
  # m_B first meets numbers of one, two and three digits nearly as often, or it
  # learns to find digits by their distance from the "=", and adds wrongly
  # wherever the second number is shorter. Then long ones, which are harder.
  stages.anchor.data.tasks = {"num_math": 1.0}
  stages.anchor.data.update(levelling=7, pack=True)
  stages.anchor.update(steps=500, batch_size=48, length=48)
  tasks = {"num_math": 0.4, "num_math_steps": 0.2, "num_math_given": 0.4}
  stages.anchor_prefix.data.update(tasks=tasks, levelling=2, pack=True)
  stages.anchor_prefix.update(steps=600, batch_size=48, length=64)
  for name in ("compose", "compose_direct"):
    stages[name].data.pack = True
    stages[name].update(steps=400, batch_size=40, length=64)
  # Without NUM-MATH in steps the composition unlearns it.
  tasks = {"kv_math_steps": 0.45, "kv_subs": 0.25}
  tasks |= {"num_math": 0.15, "num_math_steps": 0.15}
  stages.compose.data.tasks = tasks


def _both(config: ConfigDict) -> None:
  _small(config)
  config.alternatives = ("compose_direct",)


def _ablations(config: ConfigDict) -> None:
  """For `python -m calm_jax.ablations`: 30 runs of the last stage."""
  _small(config)
  config.workdir = "runs/ablations"
  config.audit.examples = 0  # An audit takes as long as a third of a run.
  config.task.num_examples = 512


def _tiny(config: ConfigDict) -> None:
  config.workdir = "runs/kv_tiny"
  config.task.update(num_keys=200, num_examples=16)
  config.audit.update(examples=16, draws=1)
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(width=32, num_layers=2, mlp_width=64)
  for stage in config.stages.values():
    stage.update(steps=20, batch_size=8, length=24, warmup=5)
    stage.update(log_every=5, eval_every=10, checkpoint_every=10)


def _paper(config: ConfigDict) -> None:
  """Sized for ten minutes of one GPU; docs/key_values.md has the sum."""
  config.workdir = "runs/kv_paper"
  config.alternatives = ()
  config.dtype = "bfloat16"
  config.task.update(
    num_keys=25_000, min_terms=3, max_terms=6, operators="+-*", max_products=1
  )
  config.anchor_model.update(
    width=384, num_layers=8, num_heads=6, num_kv_heads=6, mlp_width=1024
  )
  config.augmenting_model.update(
    width=128, num_layers=4, num_heads=2, num_kv_heads=2, mlp_width=352
  )
  config.composition.num_connections = 4
  stages = config.stages
  for stage in stages.values():
    stage.data.pack = True
    stage.update(batch_size=128, length=256, warmup=100, learning_rate=1e-3)
    stage.update(eval_every=1000, checkpoint_every=1000)
  for name in ("augmenting", "augmenting_vanilla"):
    stages[name].update(steps=1200, batch_size=256, learning_rate=2e-3)
  # Two terms, a single operation, are the easiest to learn.
  for name in ("anchor", "anchor_prefix", "augmenting_vanilla"):
    stages[name].data.min_terms = 2
  # Most of what is learnt is one operation at a time: results that are given
  # at once are hardly predictable, and blur the loss.
  stages.anchor.data.tasks = {"num_math": 0.2, "num_math_steps": 0.8}
  stages.anchor.steps = 5000
  stages.anchor_prefix.steps = 3000
  for name in ("compose", "compose_direct"):
    stages[name].update(steps=2000, learning_rate=2e-3)


VARIANTS = {
  "small": _small,
  "both": _both,
  "tiny": _tiny,
  "paper": _paper,
  "ablations": _ablations,
}
