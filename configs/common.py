"""EVERY default of every experiment; the other files change a few."""

import dataclasses

from ml_collections import ConfigDict

from calm_jax.core.errors import InputError
from calm_jax.parallel.rules import SHARDING
from calm_jax.training.stage import Stage


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
  """One run of the training loop; see calm_jax.training.stage.Stage."""
  return ConfigDict(dataclasses.asdict(Stage(**changes)))


def text_task(**changes) -> ConfigDict:
  """See calm_jax.experiments.text.TextTask."""
  return ConfigDict(
    {
      "languages": (),
      "sources": ConfigDict(),
      "held_out": ConfigDict(),
      "evals": ConfigDict(),
      "skip_evals": (),
      "allow_code_execution": False,
      "num_samples": 0,
      "sample_tokens": 200,
      "prompt_tokens": 1024,
      # Rows of a batch, in generation too.
      "eval_batch_size": 32,
      "eval_length": 256,
    }
    | changes
  )


def source(path, **changes) -> ConfigDict:
  """Examples; see calm_jax.data.examples.ExampleSource."""
  return ConfigDict(
    {
      "path": path,
      "kind": "",
      "target": "",
      "split": "train",
      "columns": ("source", "target"),
      "prompt": "",
      "completion": "",
      "text_field": "text",
      "prompt_field": "prompt",
      "completion_field": "completion",
      "rows": "",
      "bad_lines": 0.0,
      "data_dir": "",
    }
    | changes
  )


def mixture(
  weights: dict[str, float], fraction: float = 1.0, **changes
) -> ConfigDict:
  """The data of a stage: rows of sources by weight, a part of each source.

  Args:
    weights: of sources; languages share that of an entry with {language}.
    fraction: of the examples of each source that are used.
    **changes: pack, too_long ("error", "cut" or "drop" an example with a
      prompt that is longer than a row) and watch (held-out sets whose loss is
      followed; all if it names none).
  """
  parts = {
    name: ConfigDict({"weight": weight, "fraction": fraction})
    for name, weight in weights.items()
  }
  return ConfigDict(
    {
      "mixture": ConfigDict(parts),
      "pack": True,
      "too_long": "error",
      "watch": (),
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
  # The kernel of attention: "xla", which any device has, "splash" on TPUs,
  # "cudnn" on GPUs, or "auto"; see calm_jax.models.attention.
  config.attention = "xla"
  # What the backward pass computes again, and the logits that exist at a time
  # on each device; see calm_jax.models.config.
  config.remat = "auto"
  config.loss_chunk = 2**24
  # Devices along each axis of the mesh; -1, on one axis, for what is left. All
  # 1: one device, without a mesh. See calm_jax.parallel.sharding.
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})
  config.sharding = SHARDING
  # Regexes of leaves that every device holds whole, whatever the rules above
  # say, such as "augmenting/.*".
  config.replicated = ()
  # Whether this is one of several processes; see calm_jax.parallel.processes.
  config.distributed = False
  # Faults, in seconds; see docs/faults.md. What a process has to save and end
  # after a signal, before it is ended; spot machines are gone after 30.
  config.grace = 25.0
  # What a step may take before it counts as hung, 0 for any; ten times that
  # where programs are compiled.
  config.watchdog = 1800.0
  # After which a process that is silent counts as gone.
  config.heartbeat = 100
  # Folders or hub ids; empty: trained from scratch in a stage.
  config.anchor = ""
  config.augmenting = ""
  config.augmenting_name = "augmenting"
  # "int8" or "int4": the bits of each model's matrices while it is frozen. One
  # that this run trains is quantised after that.
  config.quantise = ConfigDict({"anchor": "", "augmenting": ""})
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
      # "rope": the cross-attention knows how far back a token is.
      "positions": "none",
      "output_init": "zeros",
      # What is done to m_A's states on their way; see connections.Augmenting.
      "control": "none",
    }
  )
  config.recipe = ("compose",)
  config.stages = ConfigDict({"compose": stage()})
  # Further compositions of the same frozen models, each from a fresh start.
  config.alternatives = ()
  # What this is, for tables: "composed", or of the KINDS below.
  config.kind = "composed"
  # Where in workdir the last stage and the results go; the stages before it
  # are in workdir itself, for all kinds.
  config.output = ""
  # Added to the seed of the last stage: of its fresh parameters and its data.
  config.trial = 0
  # Of LoRA matrices on the anchor in the last stage; 0 for none, -1 for about
  # as many parameters as the composition has.
  config.lora_rank = 0
  # Whether m_A has random weights instead of its own.
  config.random_augmenting = False
  # Stages that train a vanilla m_A, in place of those on its domain.
  config.vanilla = ()
  # See calm_jax.ablations; the minutes are what a run takes on two CPU cores,
  # for the first estimate.
  config.ablations = ConfigDict(
    {"kinds": tuple(KINDS), "trials": 3, "minutes": 1.4}
  )
  return config


def apply(variants: dict, names: str, config: ConfigDict) -> None:
  """Makes a config the variant that was named after its file.

  Args:
    variants: of the file: functions that change a config; the first is the
      default.
    names: one of them, any of KINDS, or both: "small,lora".
    config: is changed.

  Raises:
    InputError: a name is unknown, or two are the file's own.
  """
  asked = names.split(",")
  for name in asked:
    if name not in variants and name not in KINDS:
      raise InputError(
        f"variant {name!r} is none of {[*variants, *KINDS]}, nor several of "
        "them with commas between"
      )
  own = [name for name in asked if name in variants] or [next(iter(variants))]
  if len(own) > 1:
    raise InputError(f"variants {own} exclude each other")
  variants[own[0]](config)
  become([name for name in asked if name not in variants], config)


def become(kinds: list[str], config: ConfigDict) -> None:
  """Makes a config one of KINDS, or several at once."""
  for kind in kinds:
    KINDS[kind](config)
  if kinds not in ([], ["composed"]):
    config.kind = config.output = "-".join(kinds)


def _last(config: ConfigDict) -> list[ConfigDict]:
  names = [*config.recipe[-1:], *config.alternatives]
  return [config.stages[name] for name in names]


def _in_place_of_its_own(config: ConfigDict, stages: tuple[str, ...]) -> None:
  """Trains m_A in other stages than those on its domain."""
  rest = [
    name
    for name in config.recipe
    if not config.stages[name].model.startswith("augmenting/")
  ]
  config.recipe = (*stages, *rest)


def _vanilla(config: ConfigDict) -> None:
  _in_place_of_its_own(config, config.vanilla)


def _random(config: ConfigDict) -> None:
  _in_place_of_its_own(config, ())
  config.random_augmenting = True


def _encoder(config: ConfigDict) -> None:
  config.composition.visibility = "encoder"


def _unmasked(config: ConfigDict) -> None:
  config.composition.visibility = "unmasked"


def _control(name: str):
  def change(config: ConfigDict) -> None:
    config.composition.control = name

  return change


def _lora(config: ConfigDict) -> None:
  _in_place_of_its_own(config, ())
  config.lora_rank = -1
  for stage in _last(config):
    # As a composition's kernels do.
    decay = f"{stage.decay}|lora_a|lora_b"
    stage.update(model="anchor", trainable=("anchor/.*/lora_.",), decay=decay)


def _finetune(config: ConfigDict) -> None:
  _in_place_of_its_own(config, ())
  for stage in _last(config):
    stage.update(model="anchor", trainable=("anchor/.*",))
  config.quantise.anchor = ""


# Of every experiment: the ablations and baselines of §4.4 and Table 5, and
# controls that the paper lacks.
KINDS = {
  "composed": lambda config: None,
  "vanilla": _vanilla,
  "random": _random,
  "encoder": _encoder,
  "lora": _lora,
  "finetune": _finetune,
  "zeroed": _control("zeroed"),
  "shuffled": _control("shuffled"),
  "noise": _control("noise"),
  "unmasked": _unmasked,
}
