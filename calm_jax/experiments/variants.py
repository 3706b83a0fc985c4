"""Kinds of runs: the ablations and baselines of §4.4 and Table 5, and controls.

A kind changes a config before it becomes `Settings`. Every config file offers
all kinds after a colon: configs/kv.py:tiny,lora.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from calm_jax.core.errors import InputError

Config = Any  # a ConfigDict with the fields of `settings.Settings`
Change = Callable[[Config], None]  # in place


class Kind(NamedTuple):
  """A kind of run: the trained model's label in tables, and what it changes."""

  label: str
  change: Change


def _composition(**options: str) -> Change:
  """A change of fields of config.composition."""
  return lambda config: config.composition.update(options)


def _last_stages(config: Config) -> list[Config]:
  names = [*config.recipe[-1:], *config.alternatives]
  return [config.stages[name] for name in names]


def _train_augmenting_in(config: Config, stages: tuple[str, ...]) -> None:
  """Trains m_A in these stages instead of those on its domain."""

  def trains_anchor(name: str) -> bool:
    return not config.stages[name].model.startswith("augmenting/")

  config.recipe = (*stages, *filter(trains_anchor, config.recipe))


def _vanilla(config: Config) -> None:
  _train_augmenting_in(config, config.vanilla)


def _random(config: Config) -> None:
  _train_augmenting_in(config, ())
  config.random_augmenting = True


def _lora(config: Config) -> None:
  _train_augmenting_in(config, ())
  config.lora_rank = -1
  for stage in _last_stages(config):
    # LoRA's matrices decay as a composition's kernels do.
    decay = f"{stage.decay}|lora_a|lora_b"
    stage.update(model="anchor", trainable=("anchor/.*/lora_.",), decay=decay)


def _finetune(config: Config) -> None:
  _train_augmenting_in(config, ())
  for stage in _last_stages(config):
    stage.update(model="anchor", trainable=("anchor/.*",))
  config.quantise.anchor = ""


KINDS = {
  "composed": Kind("composed", _composition()),
  "vanilla": Kind("vanilla m_A", _vanilla),
  "random": Kind("random m_A", _random),
  "encoder": Kind("m_A as an encoder", _composition(visibility="encoder")),
  "lora": Kind("m_B with LoRA", _lora),
  "finetune": Kind("m_B fine-tuned", _finetune),
  "zeroed": Kind("m_A zeroed", _composition(control="zeroed")),
  "shuffled": Kind(
    "m_A shuffled over the batch", _composition(control="shuffled")
  ),
  "noise": Kind("m_A replaced by noise", _composition(control="noise")),
  "unmasked": Kind(
    "unmasked: leaks the answer", _composition(visibility="unmasked")
  ),
}


def apply_kinds(kinds: Sequence[str], config: Config) -> None:
  """Changes a config to one or several of KINDS at once."""
  for kind in kinds:
    KINDS[kind].change(config)
  if [*kinds] not in ([], ["composed"]):
    config.kind = config.output = "-".join(kinds)


def apply(variants: Mapping[str, Change], names: str, config: Config) -> None:
  """Changes a config to the variant that was named after its file.

  Args:
    variants: the file's own, of which the first is the default.
    names: one of them, any of KINDS, or both: "small,lora".

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
  apply_kinds([name for name in asked if name not in variants], config)
