"""Low-resource languages (§4.2, Tables 2 and 3): D_NTL, FLORES-200, GSM8K.

configs/ntl.py          Qwen3-0.6B-Base and three specialists of the hub, one a
                        language: the Goldfish of Ligurian, Friulian and
                        Venetian (GPT-2's family, 125 M parameters, tokenizers
                        of their own); all frozen
configs/ntl.py:trained  as in the paper: one m_A, Qwen3-0.6B-Base, learns 24
                        languages in the run, for the anchor Qwen3-8B-Base
configs/ntl.py:tiny     two tiny models that are trained in the run, on two CPU
                        cores and the material in the folder CALM_SHARED
configs/ntl.py:lora     and every other kind of calm_jax.experiments.variants;
                        also with a size: configs/ntl.py:tiny,lora

All these models are Apache 2.0; docs/plan.md has the memory and time of a run.
--config.data_dir is a folder with

  nllb_seed/<language>.txt      NLLB-Seed, line i of each is the same sentence
  flores200/dev/ devtest/       FLORES-200, unpacked
  gsm8k/train.jsonl test.jsonl  GSM8K
  mgsm/mgsm_<language>.tsv      MGSM

The Goldfish have learnt NLLB-Seed: only FLORES-200 is held out. Their main
branches have pickled weights alone, which are never opened: the revision here
is the pull request by which a bot of the hub offers them as safetensors. Where
there is none, convert them by transformers and give the folder:

  AutoModelForCausalLM.from_pretrained(ID).save_pretrained(FOLDER)
  AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER)

--config.anchor, --config.augmenting (a dict of several by name) and
--config.task.languages replace the models and the languages. A hub id may end
in @ and a commit, branch or tag; without, its main branch is read.
"""

import os

from ml_collections import ConfigDict

from calm_jax.data.examples import ExampleSource
from calm_jax.experiments import config_files, variants
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.experiments.vocabularies import Vocabulary
from calm_jax.training.stage import Stage

# The specialists, by language.
GOLDFISH = {
  "lij_Latn": "goldfish-models/lij_latn_full@refs/pr/1",
  "fur_Latn": "goldfish-models/fur_latn_full@refs/pr/1",
  "vec_Latn": "goldfish-models/vec_latn_full@refs/pr/1",
}
QWEN3 = "Qwen/Qwen3-0.6B-Base@da87bfb608c14b7cf20ba1ce41287e8de496c0cd"
# Of NLLB-Seed; FLORES-200 has them all.
ALL_LANGUAGES = (
  "ace_Latn", "ban_Latn", "bho_Deva", "bjn_Latn", "bug_Latn", "crh_Latn",
  "dik_Latn", "fur_Latn", "fuv_Latn", "hne_Deva", "kas_Deva", "knc_Latn",
  "lij_Latn", "lim_Latn", "lmo_Latn", "ltg_Latn", "mag_Deva", "mri_Latn",
  "nus_Latn", "scn_Latn", "srd_Latn", "szl_Latn", "taq_Latn", "vec_Latn",
)  # fmt: skip
MGSM = ("bn", "de", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
# The lines of NLLB-Seed that are learnt from, and those that are held out.
LEARNT, HELD_OUT = ":6000", "6000:"
# :tiny's lines of GATITOS, and the share of them that D_C has.
WORDS, WORDS_OF_D_C = ":1000", 0.2


def get_config(variant: str = "full") -> ConfigDict:
  """The config of a variant: the fields of `Settings`, and data_dir."""
  config = ConfigDict({"data_dir": "data"})
  data = config.get_ref("data_dir")
  settings = Settings(
    experiment="text",
    task=TextTask(
      languages=tuple(GOLDFISH),
      sources=_sources(data),
      held_out={
        name: ExampleSource(
          data + f"/flores200/devtest/{name}.devtest", kind="text"
        )
        for name in ("{language}", "eng_Latn")
      },
      evals=_evals(data),
      prompt_tokens=2048,
    ),
    workdir="runs/ntl",
    dtype="bfloat16",
    anchor=QWEN3,
    augmenting={code[:3]: path for code, path in GOLDFISH.items()},
    stages={"compose": _compose(steps=500, batch_size=32)},
  )
  config.update(config_files.to_config(settings))
  # Translations and solutions are long: held-out text is audited.
  config.audit.evals = ()
  variants.apply(VARIANTS, variant, config)
  return config


def _sources(data) -> dict[str, ExampleSource]:
  return {
    "{language}": _nllb_seed(data, "{language}", LEARNT),
    "{language}-eng": ExampleSource(
      data + "/nllb_seed/{language}.txt",
      kind="parallel",
      target=data + "/nllb_seed/eng_Latn.txt",
      # As calm_jax/evals/prompts/translation.txt asks.
      prompt="{language_name}: {source}\nEnglish:",
      completion=" {target}",
      rows=LEARNT,
    ),
    "eng": _nllb_seed(data, "eng_Latn", LEARNT),
    "gsm8k": ExampleSource(
      data + "/gsm8k/train.jsonl",
      prompt="Question: {question}\nAnswer:",
      completion=" {answer}",
    ),
  }


def _nllb_seed(data, name: str, rows: str) -> ExampleSource:
  return ExampleSource(data + f"/nllb_seed/{name}.txt", rows=rows)


def _compose(**changes) -> Stage:
  """The stage on D_C: 5% of D_NTL, and high-resource text."""
  mixture = {
    "{language}": Share(0.5, 0.05),
    "{language}-eng": Share(0.15, 0.05),
    "eng": Share(0.3),
    "gsm8k": Share(0.05),
  }
  return Stage(
    data=TextData(mixture), learning_rate=3e-4, length=512, **changes
  )


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


def _one_augmenting(config: ConfigDict, path: str) -> None:
  """Takes one m_A, and holds out NLLB-Seed, whose rest it learns."""
  config.augmenting, config.augmenting_name = path, "ntl"
  data = config.get_ref("data_dir")
  config.task.held_out = config_files.to_config(
    {
      name: _nllb_seed(data, name, HELD_OUT)
      for name in ("{language}", "eng_Latn")
    }
  )


def _trained(config: ConfigDict) -> None:
  _one_augmenting(config, QWEN3)
  config.task.languages = ALL_LANGUAGES
  config.anchor = "Qwen/Qwen3-8B-Base"
  config.recipe = ("augmenting", "compose")
  learnt = {"{language}": Share(0.5), "{language}-eng": Share(0.5)}
  config.stages = config_files.to_config(
    {
      "augmenting": Stage(
        model="augmenting/ntl",
        trainable=("augmenting/ntl/.*",),
        data=TextData(learnt, watch=("{language}",)),
        steps=4000,
        learning_rate=1e-4,
        length=512,
      ),
      "compose": _compose(steps=2000),
    }
  )


def _tiny(config: ConfigDict) -> None:
  shared = os.environ.get("CALM_SHARED", "shared")
  config.workdir = "runs/ntl_tiny"
  config.dtype = "float32"
  config.data_dir = f"{shared}/data"
  # Both models are trained here and read the same tokens, which are few: m_B's
  # head, of 128 dimensions, has to express what m_A's, of 96, says of them.
  _one_augmenting(config, "")
  config.anchor = ""
  config.augmenting_model.update(width=96, mlp_width=256)
  config.anchor_model.update(num_layers=3)
  config.composition.positions = "rope"
  config.composition.connections = ((4, 2), (4, 3))
  _tiny_task(config)
  config.recipe = ("augmenting", "anchor", "compose")
  config.stages = config_files.to_config(_tiny_stages())


def _tiny_task(config: ConfigDict) -> None:
  """Ligurian text, and words that D_C never has."""
  task, lexicon = (
    config.task,
    config.get_ref("data_dir") + "/gatitos/lij_en.tsv",
  )
  task.languages = ("lij_Latn",)
  task.tokenizers = config_files.to_config(
    {"anchor": Vocabulary(400, ("lij_Latn", "eng"))}
  )
  task.sources.words = config_files.to_config(
    ExampleSource(
      lexicon,
      columns=("source", "target"),
      prompt="{source} =",
      completion=" {target}\n",
      rows=WORDS,
    )
  )
  # In windows: most problems are longer than a row.
  task.sources.gsm8k.update(
    prompt="", completion="Question: {question}\nAnswer: {answer}"
  )
  words = {
    "kind": "lexicon",
    "group": "GATITOS",
    "language": "lij_Latn",
    "path": lexicon,
    "rows": WORDS,
    "prompt": "{source} =",
    "shown": WORDS_OF_D_C,
    "seed": config.get_ref("seed"),
    "max_new_tokens": 16,
    "limit": 300,
  }
  task.evals = ConfigDict({"words": words})
  config.audit.evals = ("words",)
  task.eval_batch_size = 100


def _tiny_stages() -> dict[str, Stage]:
  learnt = {"{language}": Share(0.5), "words": Share(0.5)}
  english = {"eng": Share(0.7), "gsm8k": Share(0.3)}
  composed = {
    "{language}": Share(0.35, 0.05),
    "words": Share(0.4, WORDS_OF_D_C),
    "eng": Share(0.15, 0.05),
    "gsm8k": Share(0.1, 0.05),
  }
  shared = {"batch_size": 16, "length": 128, "optimizer": "muon", "warmup": 20}
  return {
    "augmenting": Stage(
      model="augmenting/ntl",
      trainable=("augmenting/ntl/.*",),
      data=TextData(learnt, watch=("{language}",)),
      steps=600,
      learning_rate=4e-3,
      **shared,
    ),
    "anchor": Stage(
      model="anchor",
      trainable=("anchor/.*",),
      data=TextData(english, watch=("eng_Latn",)),
      steps=250,
      learning_rate=4e-3,
      **shared,
    ),
    "compose": Stage(
      data=TextData(composed),
      steps=300,
      learning_rate=1.2e-2,
      weight_decay=0.1,
      **shared,
    ),
  }


VARIANTS = {"full": _full, "trained": _trained, "tiny": _tiny}
