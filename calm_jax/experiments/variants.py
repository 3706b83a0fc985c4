"""What the kinds of configs/common.py are called in tables."""

from collections.abc import Mapping
from typing import Any

NAMES = {
  "composed": "composed",
  "vanilla": "vanilla m_A",
  "random": "random m_A",
  "encoder": "m_A as an encoder",
  "lora": "m_B with LoRA",
  "finetune": "m_B fine-tuned",
  "zeroed": "m_A zeroed",
  "shuffled": "m_A shuffled over the batch",
  "noise": "m_A replaced by noise",
  "unmasked": "unmasked: leaks the answer",
}


def label(results: Mapping[str, Any]) -> str:
  """What the last stage of a run made; "composed" if it does not say."""
  kind = results.get("kind", "composed")
  return NAMES.get(kind, kind)
