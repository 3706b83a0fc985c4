"""Code (§4.3, Table 4): D_Code, HumanEval, MBPP, CodeXGLUE code-to-text.

configs/code.py        Qwen2.5-1.5B, and Qwen2.5-Coder-0.5B of the hub, which
                       has learnt code before; both Apache 2.0 and frozen
configs/code.py:tiny   two tiny models that are trained in the run, on two CPU
                       cores and the material in the folder CALM_SHARED
configs/code.py:lora   and every other kind of calm_jax.experiments.variants;
                       also with a size: configs/code.py:tiny,lora

Runs what the models write, in a sandbox: say --allow_code_execution, or leave
those evaluations out with --config.task.skip_evals="('mbpp','humaneval')".
:tiny runs none.

--config.data_dir is a folder with

  codexglue/code_to_text_<language>/{train,valid,test}.jsonl
  mbpp/mbpp.jsonl
  humaneval/HumanEval.jsonl

--config.anchor, --config.augmenting and --config.task.languages replace the
models and the languages. An m_A that is no specialist learns the code of the
folder first with --config.recipe="('augmenting','compose')". docs/plan.md has
the memory and time of a run. A hub id may end in @ and a commit, as here.
"""

import os

from ml_collections import ConfigDict

from calm_jax.data.examples import ExampleSource
from calm_jax.experiments import config_files, variants
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.experiments.vocabularies import Vocabulary
from calm_jax.training.stage import Stage

LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")
FOLDER = "/codexglue/code_to_text_{language}"


def get_config(variant: str = "full") -> ConfigDict:
  """The config of a variant: the fields of `Settings`, and data_dir."""
  config = ConfigDict({"data_dir": "data"})
  data = config.get_ref("data_dir")
  train, valid = data + FOLDER + "/train.jsonl", data + FOLDER + "/valid.jsonl"
  settings = Settings(
    experiment="text",
    task=TextTask(
      languages=LANGUAGES,
      sources={
        "{language}": ExampleSource(train, completion="{original_string}"),
        "{language}-described": ExampleSource(
          train, prompt="{docstring}\n", completion="{code}"
        ),
      },
      held_out={
        "{language}": ExampleSource(
          valid, completion="{original_string}", rows=":500"
        )
      },
      evals=_evals(data),
      prompt_tokens=2048,
    ),
    workdir="runs/code",
    dtype="bfloat16",
    # Apache 2.0, of one tokenizer and one vocabulary size; the 7 B model's
    # differs, and its tokens would be aligned by the text.
    anchor="Qwen/Qwen2.5-1.5B@8faed761d45a263340a0528343f099c05c9a4323",
    augmenting=(
      "Qwen/Qwen2.5-Coder-0.5B@8123ea2e9354afb7ffcc6c8641d1b2f5ecf18301"
    ),
    augmenting_name="code",
    stages={
      "augmenting": Stage(
        model="augmenting/code",
        trainable=("augmenting/code/.*",),
        data=_data(fraction=1.0),
        steps=4000,
        learning_rate=1e-4,
        length=1024,
      ),
      "compose": Stage(
        data=_data(fraction=0.07),
        steps=2000,
        batch_size=32,
        learning_rate=3e-4,
        length=1024,
      ),
    },
  )
  config.update(config_files.to_config(settings))
  # Programs and descriptions are long: held-out text is audited.
  config.audit.evals = ()
  variants.apply(VARIANTS, variant, config)
  return config


def _data(fraction: float) -> TextData:
  mixture = {
    "{language}": Share(0.7, fraction),
    "{language}-described": Share(0.3, fraction),
  }
  return TextData(mixture, too_long="cut")


def _evals(data) -> dict[str, dict]:
  programs = {"max_new_tokens": 384, "limit": 0}
  return {
    "humaneval": {
      "kind": "humaneval",
      "group": "HumanEval",
      "path": data + "/humaneval/HumanEval.jsonl",
    }
    | programs,
    "mbpp": {"kind": "mbpp", "group": "MBPP", "path": data + "/mbpp/mbpp.jsonl"}
    | programs,
    "codexglue-{language}": {
      "kind": "code_to_text",
      "group": "CodeXGLUE",
      "language": "{language}",
      "path": data + FOLDER + "/test.jsonl",
      "pool": data + FOLDER + "/valid.jsonl",
      "rows": "",
      "pool_rows": "",
      "shots": 3,
      "max_new_tokens": 96,
      "limit": 0,
    },
  }


def _full(config: ConfigDict) -> None:
  del config


def _tiny(config: ConfigDict) -> None:
  shared = os.environ.get("CALM_SHARED", "shared")
  config.workdir = "runs/code_tiny"
  config.dtype = "float32"
  config.data_dir = f"{shared}/data"
  # As in configs/ntl.py: both models are trained here.
  config.anchor = config.augmenting = ""
  config.augmenting_model.update(width=96, mlp_width=256)
  config.anchor_model.update(num_layers=3)
  config.composition.positions = "rope"
  config.composition.connections = ((4, 2), (4, 3))
  # D_Code are 874 problems of MBPP; models of this size solve none of the
  # others, which are held out: only bits per byte are measured.
  mbpp = config.get_ref("data_dir") + "/mbpp/mbpp.jsonl"
  gsm8k = config.get_ref("data_dir") + "/gsm8k"
  problem = "{question}\n{answer}"
  task = config.task
  task.languages, task.evals = (), ConfigDict()
  task.sources = config_files.to_config(
    {
      "python": ExampleSource(mbpp, rows="100:", completion="{code}"),
      "gsm8k": ExampleSource(gsm8k + "/train.jsonl", completion=problem),
    }
  )
  task.held_out = config_files.to_config(
    {
      "programs never seen": ExampleSource(
        mbpp, rows=":100", completion="{code}"
      ),
      "programs of D_Code": ExampleSource(
        mbpp, rows="100:300", completion="{code}"
      ),
      "mathematics": ExampleSource(
        gsm8k + "/test.jsonl", rows=":200", completion=problem
      ),
    }
  )
  symbols = ("\r", "\t")  # MBPP's programs have them
  task.tokenizers = config_files.to_config(
    {"anchor": Vocabulary(400, ("python", "gsm8k"), symbols)}
  )
  config.recipe = ("augmenting", "anchor", "compose")
  composed = {"python": Share(0.7, 0.05), "gsm8k": Share(0.3, 0.05)}
  programs = ("programs never seen",)
  data = {
    "augmenting": TextData({"python": Share(1.0)}, watch=programs),
    "anchor": TextData({"gsm8k": Share(1.0)}, watch=("mathematics",)),
    "compose": TextData(composed, watch=programs),
  }
  config.stages.anchor = config_files.to_config(
    Stage(model="anchor", trainable=("anchor/.*",))
  )
  steps = {"augmenting": 400, "anchor": 250, "compose": 150}
  for name, stage in config.stages.items():
    stage.data = config_files.to_config(data[name])
    stage.update(steps=steps[name], batch_size=16, length=128)
    stage.update(optimizer="muon", learning_rate=4e-3, warmup=20)
  config.stages.compose.update(learning_rate=1.2e-2, weight_decay=0.1)


VARIANTS = {"full": _full, "tiny": _tiny}
