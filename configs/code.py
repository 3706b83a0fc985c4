"""Code (§4.3, Table 4): D_Code, HumanEval, MBPP, CodeXGLUE code-to-text.

configs/code.py        a 1.5 B anchor and a 0.5 B code model of its family from
                       the hub, for a v5e-8 or one GPU of 80 GB
configs/code.py:tiny   the same recipe with two tiny models on two CPU cores, on
                       the material in the folder CALM_SHARED
configs/code.py:lora   and every other name of configs/common.py's KINDS; also
                       with a size: configs/code.py:tiny,lora

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

from configs import common

LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")
FOLDER = "/codexglue/code_to_text_{language}"


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  config = common.get_config()
  config.experiment = "text"
  config.workdir = "runs/code"
  config.dtype = "bfloat16"
  # Apache 2.0, of one tokenizer and one vocabulary size; the 7 B model's
  # differs, and its tokens would be aligned by the text.
  config.anchor = "Qwen/Qwen2.5-1.5B"
  config.augmenting = "Qwen/Qwen2.5-Coder-0.5B"
  config.augmenting_name = "code"
  config.data_dir = "data"
  data = config.get_ref("data_dir")
  config.task = common.text_task(
    languages=LANGUAGES,
    sources=ConfigDict(
      {
        "{language}": common.source(
          data + FOLDER + "/train.jsonl", completion="{original_string}"
        ),
        "{language}-described": common.source(
          data + FOLDER + "/train.jsonl",
          prompt="{docstring}\n",
          completion="{code}",
        ),
      }
    ),
    held_out=ConfigDict(
      {
        "{language}": common.source(
          data + FOLDER + "/valid.jsonl",
          completion="{original_string}",
          rows=":500",
        )
      }
    ),
    evals=_evals(data),
    prompt_tokens=2048,
  )
  weights = {"{language}": 0.7, "{language}-described": 0.3}
  config.recipe = ("augmenting", "compose")
  config.stages = ConfigDict(
    {
      "augmenting": common.stage(
        model="augmenting/code",
        trainable=("augmenting/code/.*",),
        data=common.mixture(weights, too_long="cut"),
        steps=4000,
        learning_rate=1e-4,
        length=1024,
      ),
      "compose": common.stage(
        data=common.mixture(weights, fraction=0.07, too_long="cut"),
        steps=2000,
        learning_rate=3e-4,
        length=1024,
      ),
    }
  )
  common.apply(VARIANTS, variant, config)
  return config


def _evals(data) -> ConfigDict:
  evals = {
    "humaneval": {
      "kind": "humaneval",
      "group": "HumanEval",
      "path": data + "/humaneval/HumanEval.jsonl",
      "max_new_tokens": 384,
      "limit": 0,
    },
    "mbpp": {
      "kind": "mbpp",
      "group": "MBPP",
      "path": data + "/mbpp/mbpp.jsonl",
      "max_new_tokens": 384,
      "limit": 0,
    },
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
  return ConfigDict({name: ConfigDict(e) for name, e in evals.items()})


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
  config.task.sources = ConfigDict(
    {
      "mbpp": common.source(
        mbpp,
        rows="600:",
        prompt="{text}\n[BEGIN]\n",
        completion="{code}\n[DONE]",
      ),
      "python": common.source(mbpp, rows="600:", completion="{code}"),
      "gsm8k": common.source(
        gsm8k + "/train.jsonl", completion="{question}\n{answer}"
      ),
      "eng": common.source(data + "/nllb_seed/eng_Latn.txt"),
    }
  )
  config.task.held_out = ConfigDict(
    {
      "python": common.source(mbpp, rows="510:600", completion="{code}"),
      "mathematics": common.source(
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
  both = {"mbpp": 0.5, "python": 0.5}
  config.stages.augmenting.data = common.mixture(both, watch=("python",))
  # All of it: 7% would be 26 problems.
  config.stages.compose.data = common.mixture(both)
  config.stages.anchor = common.stage(
    model="anchor",
    trainable=("anchor/.*",),
    data=common.mixture({"eng": 0.5, "gsm8k": 0.5}, watch=("mathematics",)),
    steps=400,
  )
  config.stages.augmenting.update(steps=200)
  config.stages.compose.update(steps=130)
  for stage in config.stages.values():
    stage.data.too_long = "cut"
    stage.update(batch_size=8, length=256, learning_rate=2e-3)
    stage.update(eval_every=100, checkpoint_every=100)
  config.stages.compose.update(learning_rate=8e-3, weight_decay=0.1)


VARIANTS = {"full": _full, "tiny": _tiny}
