"""EVERY default of every experiment; the other files change a few."""

from ml_collections import ConfigDict

from calm_jax.errors import InputError


def model(**changes) -> ConfigDict:
  """A decoder trained from scratch; see calm_jax.models.config."""
  return ConfigDict(
    {
      "width": 128,
      "num_layers": 4,
      "num_heads": 4,
      "num_kv_heads": 4,
      "mlp_width": 352,
      "max_length": 512,
      "tie_embeddings": False,
    }
    | changes
  )


def stage(**changes) -> ConfigDict:
  """One run of the training loop; see calm_jax.trainer.Stage."""
  return ConfigDict(
    {
      "model": "composed",
      "trainable": ("composition/.*",),
      "data": ConfigDict(),
      "steps": 1000,
      "batch_size": 64,
      "length": 128,
      "augmenting_length": 0,
      "accumulate": 1,
      "learning_rate": 1e-3,
      "schedule": "cosine",
      "warmup": 50,
      "final": 0.05,
      "b1": 0.9,
      "b2": 0.98,
      "eps": 1e-8,
      "weight_decay": 0.01,
      "decay": "kernel|embedding",
      "clip": 1.0,
      "log_every": 20,
      "eval_every": 500,
      "checkpoint_every": 500,
      "keep_last": 2,
      "keep_best": 1,
    }
    | changes
  )


def get_config() -> ConfigDict:
  """What all experiments share."""
  config = ConfigDict()
  config.workdir = "runs/default"
  config.seed = 0
  # Of the computation; trainables and optimizer state are float32 always.
  config.dtype = "float32"
  # Layers compiled out per step of the scan; more is faster on a CPU for
  # small models, and compiles for longer.
  config.unroll = 1
  # Folders or hub ids; empty: trained from scratch in a stage.
  config.anchor = ""
  config.augmenting = ""
  config.augmenting_name = "augmenting"
  config.anchor_model = model()
  config.augmenting_model = model()
  config.composition = ConfigDict(
    {
      # Pairs (augmenting layer, anchor layer) counted from 1; empty: evenly
      # spaced, num_connections of them (0: a quarter of m_A's layers, §4).
      "connections": (),
      "num_connections": 0,
      "visibility": "causal",
      "norm": True,
      "output_init": "zeros",
    }
  )
  config.recipe = ("compose",)
  config.stages = ConfigDict({"compose": stage()})
  # Further compositions of the same frozen models, each from a fresh start.
  config.alternatives = ()
  return config


def apply(variants: dict, name: str, config: ConfigDict) -> None:
  """Makes a config the variant that was named after its file."""
  if name not in variants:
    raise InputError(f"variant {name!r} is none of {list(variants)}")
  variants[name](config)
