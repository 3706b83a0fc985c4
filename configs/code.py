"""Code (§4.3, Table 4): D_Code, HumanEval, MBPP, CodeXGLUE code-to-text.

configs/code.py        a 1.5 B anchor and a 0.5 B code model of its family from
                       the hub, for a v5e-8 or one GPU of 80 GB
configs/code.py:tiny   the same recipe with two tiny models on two CPU cores, on
                       the material in the folder CALM_SHARED
configs/code.py:lora   and every other kind of calm_jax.experiments.variants;
                       also with a size: configs/code.py:tiny,lora

Runs what the models write, in a sandbox: say --allow_code_execution, or leave
those evaluations out with --config.task.skip_evals="('mbpp','humaneval')", of
:tiny "('mbpp',)".

--config.data_dir is a folder with

  codexglue/code_to_text_<language>/{train,valid,test}.jsonl
  mbpp/mbpp.jsonl
  humaneval/HumanEval.jsonl

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
    anchor="Qwen/Qwen2.5-1.5B",
    augmenting="Qwen/Qwen2.5-Coder-0.5B",
    augmenting_name="code",
    recipe=("augmenting", "compose"),
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
        data=_data(fraction=0.07), steps=2000, learning_rate=3e-4, length=1024
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
  data = config.get_ref("data_dir")
  # The anchor is trained here, on English, and reads the tokens of m_A.
  config.anchor = ""
  config.augmenting = f"{shared}/models/stories260k"
  config.anchor_model.num_layers = 6
  # As in configs/ntl.py: m_A's whole answer, to every layer of the anchor.
  config.composition.positions = "rope"
  config.composition.connections = tuple((5, layer) for layer in range(1, 7))
  # D_Code are MBPP's training problems, lines 601 to 974.
  mbpp, gsm8k = data + "/mbpp/mbpp.jsonl", data + "/gsm8k"
  config.task.sources = config_files.to_config(
    {
      "mbpp": ExampleSource(
        mbpp,
        rows="600:",
        prompt="{text}\n[BEGIN]\n",
        completion="{code}\n[DONE]",
      ),
      "python": ExampleSource(mbpp, rows="600:", completion="{code}"),
      "gsm8k": ExampleSource(
        gsm8k + "/train.jsonl", completion="{question}\n{answer}"
      ),
      "eng": ExampleSource(data + "/nllb_seed/eng_Latn.txt"),
    }
  )
  config.task.held_out = config_files.to_config(
    {
      "python": ExampleSource(mbpp, rows="510:600", completion="{code}"),
      "mathematics": ExampleSource(
        gsm8k + "/test.jsonl", rows=":200", completion="{question}\n{answer}"
      ),
    }
  )
  config.task.prompt_tokens = 320
  del config.task.evals.humaneval  # Not in the folder.
  config.task.languages = ("ruby",)
  config.task.evals.mbpp.max_new_tokens = 160
  # Of Ruby there is the test set alone: its first lines are the exemplars.
  described = config.task.evals["codexglue-{language}"]
  described.pool = data + FOLDER + "/test.jsonl"
  described.update(pool_rows=":61", rows="61:", max_new_tokens=64, limit=200)
  config.recipe = ("augmenting", "anchor", "compose")
  programs = {"mbpp": Share(0.5), "python": Share(0.5)}
  english = {"eng": Share(0.5), "gsm8k": Share(0.5)}
  data = {
    "augmenting": TextData(programs, watch=("python",)),
    "anchor": TextData(english, watch=("mathematics",)),
    # All of it: 7% would be 26 problems.
    "compose": TextData(programs),
  }
  config.stages.anchor = config_files.to_config(
    Stage(model="anchor", trainable=("anchor/.*",), steps=400)
  )
  for name, mixture in data.items():
    config.stages[name].data = config_files.to_config(mixture)
  config.stages.augmenting.update(steps=200)
  config.stages.compose.update(steps=130)
  for stage in config.stages.values():
    stage.data.too_long = "cut"
    stage.update(batch_size=8, length=256, learning_rate=2e-3)
    stage.update(eval_every=100, checkpoint_every=100)
  config.stages.compose.update(learning_rate=8e-3, weight_decay=0.1)


VARIANTS = {"full": _full, "tiny": _tiny}
