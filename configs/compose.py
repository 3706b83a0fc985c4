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
  # Files of text; see calm_jax.data.sources.
  config.data = ""
  config.eval_data = ""
  # Of the anchor's own domain; empty: sampled from the anchor.
  config.anchor_eval_data = ""
  config.task = ConfigDict(
    {
      "data": config.get_ref("data"),
      "eval_data": config.get_ref("eval_data"),
      "anchor_eval_data": config.get_ref("anchor_eval_data"),
      "num_samples": 64,
      "sample_tokens": 200,
      "text_field": "text",
      "prompt_field": "prompt",
      "completion_field": "completion",
      "eval_batch_size": 16,
      "eval_length": 256,
    }
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
  return ConfigDict({"fraction": fraction, "pack": True})


def _frozen(config: ConfigDict) -> None:
  config.recipe = ("compose",)


def _domain(config: ConfigDict) -> None:
  config.recipe = ("augmenting", "compose")


VARIANTS = {"frozen": _frozen, "domain": _domain}
