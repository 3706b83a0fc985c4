"""Writes docs/families.md: families, options, measured errors.

  python tests/parity/table.py

Needs torch; takes a few minutes.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import reference
import transformers
from golden import options

from calm_jax.models.hf import families

NAMES = {
  "llama": "Llama 1 to 3.x", "mistral": "Mistral",
  "ministral": "Ministral", "ministral3": "Ministral 3 (text)",
  "qwen2": "Qwen2, Qwen2.5",
  "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma 2",
  "gemma3_text": "Gemma 3 (text)", "gpt2": "GPT-2",
  "gpt_neox": "GPT-NeoX (Pythia)", "phi3": "Phi-3", "olmo2": "OLMo 2",
  "olmo3": "OLMo 3",
  "smollm3": "SmolLM3", "starcoder2": "StarCoder2", "granite": "Granite",
  "exaone4": "EXAONE 4", "seed_oss": "Seed-OSS",
  "glm": "GLM-4 (2024)", "glm4": "GLM-4 (0414)",
  "helium": "Helium", "ernie4_5": "ERNIE 4.5 (dense)", "arcee": "Arcee AFM",
  "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE",
}  # fmt: skip
HEAD = """# Model families

For those who want to know whether a checkpoint can be read.
`calm_jax.load_model` goes by the `model_type` of its config.json. Another
`model_type`, or an option that transformers reads and calm_jax does not
compute, raises an error that names it: quantised weights, attention that is not
causal, an option with different values in two places. Keys that transformers'
code of the family does not read, such as those of tools, change nothing: they
are passed over, and one warning names them. Null is as if the key were not
there.

Keys of generation (`temperature`, `bad_words_ids`, `suppress_tokens`, ...) are
passed over too: give them to `generate` where it has them.

To read a config.json without some of its keys, say so: `load_model(FOLDER,
ignore=["quantization_config"])` where a merge left that key beside plain
weights, and `--ignore=KEY,KEY` for `generate`, `evaluate` and `info`,
`--config.ignore=KEY,KEY` for a run, `ignore=KEY+KEY` for lm-eval. A composition
remembers it.

A model of text and images, such as Gemma 3 from 4B on, is refused. If its text
model is of a family below, transformers writes that by itself:

```python
whole = transformers.AutoModelForImageTextToText.from_pretrained(FOLDER)
text = transformers.AutoModelForCausalLM.from_config(whole.config.text_config)
text.model, text.lm_head = whole.model.language_model, whole.lm_head
text.save_pretrained(NEW)
transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)
```

`python tests/parity/real_model.py MODEL FILE...` compares a real checkpoint
with transformers, on lines of text: tokens, logits, greedy texts, an exported
copy, lm-eval's scores. Gemma 3 270M, on 203 lines in six languages and Python:
logits are off by 4.3e-04 at most, lm-eval's scores of a line by 1.1e-03 nats,
which is torch's rounding; all else is equal. Read from its GGUF file in Q4_K_M,
it gives the greedy texts that transformers gives from the same file.

`python tests/parity/table.py` wrote this, with transformers {version}. For
the base of each family, and for every option on top of it, transformers writes
a tiny random checkpoint, and calm_jax reads it. The error is the largest
absolute difference of any logit (float32; logits go up to about 10) over two
sequences: alone, padded left and right, and packed into one row. It must be at
most 1e-4. `tests/golden/options.py` says what the options are.

| family | `model_type` | options | largest error |
|---|---|---|---|
"""
MISSING = """
## Families that are refused by name

| `model_type` | why it is not computed |
|---|---|
"""


def main() -> None:
  worst: dict[str, float] = dict.fromkeys(options.FAMILIES, 0.0)
  for family, case in options.CASES:
    with tempfile.TemporaryDirectory() as folder:
      config = options.config_json(family, case)
      written = reference.write(pathlib.Path(folder), config)
      errors = reference.errors(written, reference.read(written))
    print(f"{family:12} {case:24} {max(errors.values()):.1e}", flush=True)
    worst[family] = max(worst[family], *errors.values())
  rows = [
    f"| {NAMES[family]} | `{family}` | {', '.join(cases)} | "
    f"{worst[family]:.1e} |\n"
    for family, (_, cases) in options.FAMILIES.items()
  ]
  head = HEAD.format(version=transformers.__version__)
  missing = [f"| `{f}` | {why} |\n" for f, why in families.MISSING.items()]
  path = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
  path.write_text(head + "".join([*rows, MISSING, *missing]))


if __name__ == "__main__":
  main()
