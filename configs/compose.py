"""Compose any two checkpoints, of any tokenizers, on your own text.

  python -m calm_jax.train --config=configs/compose.py \
    --config.anchor=PATH_OR_HUB_ID --config.augmenting=PATH_OR_HUB_ID \
    --config.data=train.jsonl --config.eval_data=test.jsonl

  configs/compose.py          both models are frozen; D_C is 5% of the text
  configs/compose.py:domain   m_A is first trained on all of the text
  configs/compose.py:lora     and every other kind of
                              calm_jax.experiments.variants, of a variant too:
                              configs/compose.py:domain,lora; a vanilla m_A is
                              the checkpoint as it was given

--config.augmenting="{'law': PATH_OR_HUB_ID, 'code': PATH_OR_HUB_ID}" composes
the anchor with several models, and --config.add_to=COMPOSITION adds models to
one that is trained; see docs/compose.md.
"""

from ml_collections import ConfigDict

from calm_jax.data.examples import ExampleSource
from calm_jax.experiments import config_files, variants
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.training.stage import Stage


def get_config(variant: str = "frozen") -> ConfigDict:
  """The config of a variant: the fields of `Settings`, and files of text."""
  config = ConfigDict(
    {
      # Files of text; see calm_jax.data.examples.
      "data": "",
      "eval_data": "",
      # Of the anchor's own domain; empty: sampled from the anchor.
      "anchor_eval_data": "",
      # What the fields of jsonl files are called.
      "text_field": ExampleSource.text_field,
      "prompt_field": ExampleSource.prompt_field,
      "completion_field": ExampleSource.completion_field,
      "messages_field": ExampleSource.messages_field,
    }
  )

  def source(path: str) -> ExampleSource:
    kinds = ("text", "prompt", "completion", "messages")
    names = [f"{kind}_field" for kind in kinds]
    fields = {name: config.get_ref(name) for name in names}
    return ExampleSource(config.get_ref(path), **fields)

  task = TextTask(
    sources={"data": source("data")},
    held_out={
      "domain": source("eval_data"),
      "anchor_domain": source("anchor_eval_data"),
    },
    num_samples=64,
  )
  stages = {
    "augmenting": Stage(
      model="augmenting/augmenting",
      trainable=("augmenting/augmenting/.*",),
      data=_data(1.0),
      batch_size=16,
      length=256,
    ),
    "compose": Stage(data=_data(0.05), batch_size=16, length=256, steps=300),
  }
  settings = Settings("text", task, workdir="runs/compose", stages=stages)
  config.update(config_files.to_config(settings))
  variants.apply(VARIANTS, variant, config)
  return config


def _data(fraction: float) -> TextData:
  return TextData({"data": Share(1.0, fraction)}, watch=("domain",))


def _frozen(config: ConfigDict) -> None:
  config.recipe = ("compose",)


def _domain(config: ConfigDict) -> None:
  config.recipe = ("augmenting", "compose")


VARIANTS = {"frozen": _frozen, "domain": _domain}
