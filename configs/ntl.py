"""Low-resource languages (§4.2, Tables 2 and 3): D_NTL, FLORES-200, GSM8K.

configs/ntl.py        an 8 B anchor and a 0.6 B m_A from the hub, for a v5e-8 or
                      one GPU of 80 GB
configs/ntl.py:tiny   the same recipe with two tiny models on two CPU cores, on
                      the material in the folder CALM_SHARED
configs/ntl.py:lora   and every other kind of calm_jax.experiments.variants;
                      also with a size: configs/ntl.py:tiny,lora

--config.data_dir is a folder with

  nllb_seed/<language>.txt      NLLB-Seed, line i of each is the same sentence
  flores200/                    FLORES-200: its folder, or its zip
  gsm8k/train.jsonl test.jsonl  GSM8K
  mgsm/mgsm_<language>.tsv      MGSM

--config.anchor, --config.augmenting and --config.task.languages replace the
models and the languages.
"""

import os

from ml_collections import ConfigDict

from calm_jax.data.examples import ExampleSource
from calm_jax.experiments import config_files, variants
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.training.stage import Stage

# Of NLLB-Seed; FLORES-200 has them all.
LANGUAGES = (
  "ace_Latn", "ban_Latn", "bho_Deva", "bjn_Latn", "bug_Latn", "crh_Latn",
  "dik_Latn", "fur_Latn", "fuv_Latn", "hne_Deva", "kas_Deva", "knc_Latn",
  "lij_Latn", "lim_Latn", "lmo_Latn", "ltg_Latn", "mag_Deva", "mri_Latn",
  "nus_Latn", "scn_Latn", "srd_Latn", "szl_Latn", "taq_Latn", "vec_Latn",
)  # fmt: skip
MGSM = ("bn", "de", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
# The lines of NLLB-Seed that are learnt from, and those that are held out.
LEARNT, HELD_OUT = ":6000", "6000:"


def get_config(variant: str = "full") -> ConfigDict:
  """The config of a variant: the fields of `Settings`, and data_dir."""
  config = ConfigDict({"data_dir": "data"})
  data = config.get_ref("data_dir")
  settings = Settings(
    experiment="text",
    task=TextTask(
      languages=LANGUAGES,
      sources=_sources(data),
      held_out={
        "{language}": _monolingual(data, HELD_OUT),
        "eng_Latn": ExampleSource(
          data + "/nllb_seed/eng_Latn.txt", rows=HELD_OUT
        ),
      },
      evals=_evals(data),
      prompt_tokens=2048,
    ),
    workdir="runs/ntl",
    dtype="bfloat16",
    # Apache 2.0, one tokenizer.
    anchor="Qwen/Qwen3-8B-Base",
    augmenting="Qwen/Qwen3-0.6B-Base",
    augmenting_name="ntl",
    recipe=("augmenting", "compose"),
    stages=_stages(),
  )
  config.update(config_files.to_config(settings))
  # Translations and solutions are long: held-out text is audited.
  config.audit.evals = ()
  variants.apply(VARIANTS, variant, config)
  return config


def _sources(data) -> dict[str, ExampleSource]:
  return {
    "{language}": _monolingual(data, LEARNT),
    "{language}-eng": ExampleSource(
      data + "/nllb_seed/{language}.txt",
      kind="parallel",
      target=data + "/nllb_seed/eng_Latn.txt",
      # As calm_jax/evals/prompts/translation.txt asks.
      prompt="{language_name}: {source}\nEnglish:",
      completion=" {target}",
      rows=LEARNT,
    ),
    "eng": ExampleSource(data + "/nllb_seed/eng_Latn.txt", rows=LEARNT),
    "gsm8k": ExampleSource(
      data + "/gsm8k/train.jsonl",
      prompt="Question: {question}\nAnswer:",
      completion=" {answer}",
    ),
  }


def _monolingual(data, rows: str) -> ExampleSource:
  return ExampleSource(data + "/nllb_seed/{language}.txt", rows=rows)


def _stages() -> dict[str, Stage]:
  learnt = {"{language}": Share(0.5), "{language}-eng": Share(0.5)}
  # D_C: 5% of D_NTL, and high-resource text.
  composed = {
    "{language}": Share(0.5, 0.05),
    "{language}-eng": Share(0.15, 0.05),
    "eng": Share(0.3),
    "gsm8k": Share(0.05),
  }
  return {
    "augmenting": Stage(
      model="augmenting/ntl",
      trainable=("augmenting/ntl/.*",),
      data=TextData(learnt, watch=("{language}",)),
      steps=4000,
      learning_rate=1e-4,
      length=512,
    ),
    "compose": Stage(
      data=TextData(composed), steps=2000, learning_rate=3e-4, length=512
    ),
  }


def _evals(data) -> dict[str, dict]:
  gsm8k = {
    "kind": "maths",
    "path": data + "/gsm8k/test.jsonl",
    "pool": data + "/gsm8k/train.jsonl",
    "shots": 8,
    "max_new_tokens": 256,
    "limit": 0,
  }
  mgsm = {
    f"mgsm-{code}": gsm8k
    | {
      "group": "MGSM",
      "language": code,
      "path": data + f"/mgsm/mgsm_{code}.tsv",
    }
    for code in MGSM
  }
  flores = {
    "kind": "translation",
    "group": "FLORES-200",
    "language": "{language}",
    "path": data + "/flores200",
    "shots": 5,
    "max_new_tokens": 192,
    "limit": 0,
  }
  return {
    "flores-{language}": flores,
    "gsm8k": gsm8k | {"group": "GSM8K"},
  } | mgsm


def _full(config: ConfigDict) -> None:
  del config


def _tiny(config: ConfigDict) -> None:
  shared = os.environ.get("CALM_SHARED", "shared")
  config.workdir = "runs/ntl_tiny"
  config.dtype = "float32"
  config.data_dir = f"{shared}/data"
  # The anchor is trained here, on English, and reads the tokens of m_A.
  config.anchor = ""
  config.augmenting = f"{shared}/models/stories260k"
  config.anchor_model.update(num_layers=6, num_kv_heads=2)
  # So small a composition does not find m_A's state of the same token by its
  # content alone.
  config.composition.positions = "rope"
  config.composition.connections = tuple((5, j) for j in range(1, 7))
  config.task.languages = ("lij_Latn", "vec_Latn", "fur_Latn")
  config.task.prompt_tokens = 256
  # In windows: most problems are longer than a row.
  config.task.sources.gsm8k.update(
    prompt="", completion="Question: {question}\nAnswer: {answer}"
  )
  _tiny_evals(config)
  config.recipe = ("augmenting", "anchor", "compose")
  mixture = {"eng": Share(0.7), "gsm8k": Share(0.3)}
  config.stages.anchor = config_files.to_config(
    Stage(
      model="anchor",
      trainable=("anchor/.*",),
      data=TextData(mixture, watch=("eng_Latn",)),
    )
  )
  for name, steps in (("augmenting", 160), ("anchor", 450), ("compose", 1000)):
    stage = config.stages[name]
    stage.data.too_long = "drop"
    stage.update(steps=steps, batch_size=8, length=256, learning_rate=2e-3)
    stage.update(eval_every=250, checkpoint_every=250)
  config.stages.compose.update(
    batch_size=10, length=192, learning_rate=8e-3, weight_decay=0.1
  )


def _tiny_evals(config: ConfigDict) -> None:
  """FLORES-200 of Ligurian; the others are not in the folder."""
  data, evals = config.get_ref("data_dir"), config.task.evals
  flores = evals["flores-{language}"]
  flores.update(max_new_tokens=64, limit=100)
  new = {"flores-lij_Latn": flores.copy_and_resolve_references()}
  new["flores-lij_Latn"].language = "lij_Latn"
  new["flores-lij_Latn"].path = data + "/flores200"
  for code in ("vec_Latn", "fur_Latn"):
    new[f"seed-{code}"] = ConfigDict(
      {
        "kind": "translation",
        "group": "NLLB-Seed",
        "language": code,
        "path": data + f"/nllb_seed/{code}.txt",
        "target": data + "/nllb_seed/eng_Latn.txt",
        "rows": HELD_OUT,
        "pool_rows": LEARNT,
        "shots": 5,
        "max_new_tokens": 96,
        "limit": 0,
      }
    )
  evals["gsm8k"].update(max_new_tokens=96, limit=50)
  config.task.evals = ConfigDict(new | {"gsm8k": evals["gsm8k"]})


VARIANTS = {"full": _full, "tiny": _tiny}
