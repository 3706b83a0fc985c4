"""Compose any two checkpoints, of any tokenizers, on your own text.

  python -m calm_jax.train --config=configs/compose.py \
    --config.anchor=PATH_OR_HUB_ID --config.augmenting=PATH_OR_HUB_ID \
    --config.data=train.jsonl --config.eval_data=test.jsonl

  configs/compose.py          both models are frozen; D_C is 5% of the text
  configs/compose.py:domain   m_A is first trained on all of the text
  configs/compose.py:lora     and every other of KINDS in configs/common.py, of
                              a variant too: configs/compose.py:domain,lora; a
                              vanilla m_A is the checkpoint as it was given
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "frozen") -> ConfigDict:
  """See above."""
  config = common.get_config()
  config.experiment = "text"
  config.workdir = "runs/compose"
  # Files of text; see calm_jax.data.examples.
  config.data = ""
  config.eval_data = ""
  # Of the anchor's own domain; empty: sampled from the anchor.
  config.anchor_eval_data = ""
  # What the fields of jsonl files are called.
  config.text_field = "text"
  config.prompt_field = "prompt"
  config.completion_field = "completion"
  fields = {
    name: config.get_ref(name)
    for name in ("text_field", "prompt_field", "completion_field")
  }
  held_out = {"domain": "eval_data", "anchor_domain": "anchor_eval_data"}
  config.task = common.text_task(
    sources=ConfigDict(
      {"data": common.source(config.get_ref("data"), **fields)}
    ),
    held_out=ConfigDict(
      {
        name: common.source(config.get_ref(option), **fields)
        for name, option in held_out.items()
      }
    ),
    num_samples=64,
  )
  config.stages = ConfigDict(
    {
      "augmenting": common.stage(
        model="augmenting/augmenting",
        trainable=("augmenting/augmenting/.*",),
        data=_data(1.0),
        batch_size=16,
        length=256,
      ),
      "compose": common.stage(
        data=_data(0.05), batch_size=16, length=256, steps=300
      ),
    }
  )
  common.apply(VARIANTS, variant, config)
  return config


def _data(fraction: float) -> ConfigDict:
  return common.mixture({"data": 1.0}, fraction, watch=("domain",))


def _frozen(config: ConfigDict) -> None:
  config.recipe = ("compose",)


def _domain(config: ConfigDict) -> None:
  config.recipe = ("augmenting", "compose")


VARIANTS = {"frozen": _frozen, "domain": _domain}
