"""The model card of a saved composition."""

import pathlib
from typing import Any

import huggingface_hub

_CARD = """---
{header}
---

# A composition of frozen language models

Trained with [CALM](https://arxiv.org/abs/2401.02412) in calm_jax {version}: \
{num_params:,} parameters of projections and cross-attentions. The models that \
it joins are not in here; they are found by name, and refused if their files \
have changed.

| model | origin |
|---|---|
{rows}

{connections}

    import calm_jax

    composed = calm_jax.load_composed("THIS_FOLDER_OR_ID")
    composed.generate(["..."])
"""


def model_card(config: dict[str, Any]) -> str:
  """The model card, in Markdown for the hub, from calm_config.json."""
  models = config["models"]
  on_hub = [m["name"] for m in models.values() if m["revision"] is not None]
  header = huggingface_hub.ModelCardData(
    library_name="calm_jax",
    base_model=on_hub or None,
    base_model_relation="adapter" if on_hub else None,
    pipeline_tag="text-generation",
    tags=["calm_jax", "calm", "composition"],
  )
  rows = []
  for part, model in models.items():
    origin = f"`{pathlib.Path(model['name']).name}`"
    if model["revision"]:
      origin = f"`{model['name']}` at `{model['revision']}`"
    if model["quantise"]:
      origin += f" in {model['quantise']}"
    rows.append(f"| {part} | {origin} |")
  connections = [
    f"- `{a['name']}`: layers "
    + ", ".join(f"{i} → {j}" for i, j in a["connections"])
    + f" (augmenting → anchor), visibility {a['visibility']}"
    for a in config["augmenting"]
  ]
  return _CARD.format(
    header=header.to_yaml(),
    version=config["calm_jax_version"],
    num_params=config["num_params"],
    rows="\n".join(rows),
    connections="\n".join(connections),
  )
