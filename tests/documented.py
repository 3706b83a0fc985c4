"""The commands that README.md, CONTRIBUTING.md and docs/ show.

COMMANDS has an entry for each: either flags, with which a test runs it as it is
written, at tiny size; or the reason why not, which ends with a full stop.
"""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]

_COMMAND = re.compile(
  r"(?:[A-Z_]+=\S+ )*"
  r"(?:(?:python|pip|git|gcloud|sbatch) |make [a-z.]|launch/\S+ -)"
)


def code_lines(page: pathlib.Path) -> list[str]:
  """Lines of code, joined where they end in a backslash."""
  text = page.read_text().replace("\\\n", " ")
  return re.findall(r"^(?: {4}|> )(.*)$", text, re.MULTILINE)


def blocks(page: pathlib.Path) -> list[str]:
  """Blocks of Python, in the order of the page."""
  return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


def shown() -> set[str]:
  """All commands, in lines of code and in sentences, written alike."""
  found = set()
  for page in PAGES:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    quoted = re.findall(r"`([^`]+)`", prose)
    for line in [*code_lines(page), *quoted]:
      command = " ".join(line.split(" #")[0].split())
      command = command.replace(".venv/bin/python", "python")
      if _COMMAND.match(command):
        found.add(command)
  return found


_TINY_MODELS = " ".join(
  f"--config.{side}_model.{field}={size}"
  for side in ("anchor", "augmenting")
  for field, size in {
    "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "mlp_width": 8,
  }.items()
)  # fmt: skip
_TWO_STEPS = " ".join(
  f"--config.stages.{stage}.{field}={value}"
  for stage in ("augmenting", "anchor", "anchor_prefix", "compose")
  for field, value in {
    "steps": 2, "warmup": 1, "eval_every": 2, "checkpoint_every": 2,
  }.items()
)  # fmt: skip
_KV = (
  f"{_TINY_MODELS} {_TWO_STEPS} --config.task.num_keys=200"
  " --config.task.num_examples=8 --config.composition.num_connections=1"
  " --config.audit.examples=0 --config.trackers=jsonl"
)
_TEXT = (
  "--config.workdir=out/{name} --config.dtype=float32 --config.trackers=jsonl"
  " --config.audit.examples=0 "
) + " ".join(
  f"--config.stages.compose.{field}={value}"
  for field, value in {
    "steps": 2,
    "warmup": 1,
    "batch_size": 2,
    "length": 16,
  }.items()
)
_GENERATE = (
  "--pair=tiny --dtype=float32 --rows=2 --prompt=20 --new=48 --repeats=1"
  " --copy_megabytes=1 --no-torch"
)
_STEP = "--pair=tiny --rows=2 --length=16 --repeats=1 --matmul=64"
_SMOL = (
  "--config=configs/compose.py:domain"
  " --config.anchor=HuggingFaceTB/SmolLM2-360M"
  " --config.augmenting=HuggingFaceTB/SmolLM2-135M"
)
_ALLOW = "--allow_code_execution"

_LONG_ROWS = (
  "--config.dtype=bfloat16"
  " --config.stages.compose.length=4096 --config.stages.compose.batch_size=16"
)
_INSTALLS = "Installs packages."
_NOVA = "Nova is the example of a family that is not there."
_PARITY = "Writes files of this repository, with torch."
_BENCHMARKS_DATA = (
  "Needs the benchmarks' files and models of the hub;"
  " tests/experiments/test_text.py trains by such a config at its smallest."
)
_PLANS = (
  "Compiles models of full size for a TPU, for minutes;"
  " tests/planning/test_plan.py plans tiny ones."
)
_OF_FULL_SIZE = "Measures the small pair of 61 M parameters; it has no other."
_LAUNCHES = "Makes machines; tests/test_launch.py runs it against stand-ins."

# Blocks of Python by how they begin, that no test runs as they are written.
NOT_RUN: dict[str, str] = {
  '"nova": ': _NOVA,
  'FAMILIES = {..., "nova"': _NOVA,
  "model = transformers.AutoModelForCausalLM.from_pretrained(": (
    "Needs torch; tests/parity/test_composition_in_torch.py does it."
  ),
  "whole = transformers.AutoModelForImageTextToText": (
    "Needs torch and a model that reads pictures."
  ),
  'more = composed.add("code", calm_jax.load_model("org/code", revision=': (
    "Downloads; tests/composition/test_parts.py adds, drops and joins."
  ),
  "from openai import OpenAI": "Asks a server; tests/serving does it.",
}

COMMANDS: dict[str, str] = {
  # Commands of the package.
  "python -m calm_jax.generate --model=runs/kv/composition"
  ' --prompt="show:noje+bev="': "--max_new_tokens=2",
  "python -m calm_jax.generate --model=runs/mine/composition"
  ' --prompt="Once upon a time"': "--max_new_tokens=2",
  'python -m calm_jax.generate --model=DIR_OR_ID --prompt="Once upon"': (
    "--max_new_tokens=2"
  ),
  "python -m calm_jax.generate --model=DIR_OR_ID --prompts=file.jsonl": (
    "--max_new_tokens=2"
  ),
  "python -m calm_jax.generate --model=DIR_OR_ID": "--max_new_tokens=2",
  "python -m calm_jax.generate --model=DIR_OR_ID --chat": (
    "Needs an instruct model; tests/generation/test_messages.py talks to one."
  ),
  "python -m calm_jax.generate --model=DIR_OR_ID --quantise=int8"
  ' --prompt="..."': "--max_new_tokens=2",
  'python -m calm_jax.generate --model=my-composition --prompt="Once upon"'
  " --anchor=DIR_OR_ID --augmenting=PATH_OR_ID": "--max_new_tokens=2",
  "python -m calm_jax.info --anchor=DIR_OR_ID --augmenting=DIR_OR_ID": (
    "--connections=1"
  ),
  "python -m calm_jax.info my-composition": "",
  "python -m calm_jax.info --example=bert": "",
  "python -m calm_jax.report runs/kv runs/ablations --out=report": "",
  f"python -m calm_jax.train {_SMOL} --config.data=train.jsonl"
  " --config.eval_data=test.jsonl --config.workdir=runs/mine": (
    _TEXT.format(name="domain")
    + " --config.stages.augmenting.steps=2 --config.stages.augmenting.warmup=1"
    " --config.stages.augmenting.length=16"
    " --config.stages.augmenting.batch_size=2"
    " --config.composition.num_connections=1"
  ),
  "python -m calm_jax.train --config=configs/compose.py"
  " --config.anchor=PATH_OR_ID --config.augmenting=PATH_OR_ID"
  " --config.data=train.jsonl --config.eval_data=test.jsonl": (
    _TEXT.format(name="compose") + " --config.composition.num_connections=1"
  ),
  "python -m calm_jax.train --config=configs/compose.py"
  " --config.anchor=PATH_OR_ID"
  " --config.augmenting=\"{'law': 'PATH_OR_ID', 'code': 'PATH_OR_ID'}\""
  " --config.compositions=\"{'law': {'num_connections': 4}}\""
  " --config.data=train.jsonl --config.eval_data=test.jsonl": (
    "tests/experiments/test_several.py trains such a composition."
  ),
  "python -m calm_jax.train --config=configs/compose.py"
  " --config.add_to=runs/compose/composition"
  " --config.augmenting=\"{'code': 'PATH_OR_ID'}\""
  " --config.data=code.jsonl --config.eval_data=code_test.jsonl"
  " --config.workdir=runs/both": (
    "tests/experiments/test_several.py adds to a saved composition."
  ),
  "python -m calm_jax.train --config=configs/kv.py": (
    f"{_KV} --config.workdir=out/kv"
  ),
  "python -m calm_jax.train --config=configs/kv.py --config.seed=1": (
    "The same with another seed."
  ),
  "python -m calm_jax.train --config=configs/kv.py:paper": (
    "takes minutes on a GPU; tests/test_configs.py trains smaller models."
  ),
  "python -m calm_jax.ablations --config=configs/kv.py:ablations": (
    "Trains for minutes; tests/test_ablations.py does so at its smallest."
  ),
  "python -m calm_jax.train --config=configs/facts.py:gemma"
  " --config.anchor=DIR": (
    "Trains with a model of 270 M parameters;"
    " tests/experiments/test_private_facts.py runs the smallest variant."
  ),
  "python -m calm_jax.train": "Named without arguments.",
  "python -m calm_jax.train --config=... --config.quantise.anchor=int8"
  " --config.quantise.augmenting=int8": (
    "Two flags of any config; tests/test_configs.py sets them."
  ),
  "python -m calm_jax.train --config=configs/ntl.py --config.data_dir=DIR": (
    _BENCHMARKS_DATA
  ),
  "python -m calm_jax.train --config=configs/code.py --config.data_dir=DIR"
  f" {_ALLOW}": _BENCHMARKS_DATA,
  "python -m calm_jax.evaluate --config=configs/kv.py"
  " --model=runs/kv/composition --audit --out=DIR": (
    "Needs the composition of a whole run; tests/test_evaluate.py audits one."
  ),
  "python -m calm_jax.evaluate --config=configs/ntl.py --config.data_dir=DIR"
  " --model=DIR_OR_ID --out=DIR": (
    "Needs the benchmarks' files; tests/test_evaluate.py evaluates without."
  ),
  "CALM_SHARED=DIR python -m calm_jax.train --config=configs/ntl.py:tiny": (
    _BENCHMARKS_DATA
  ),
  "CALM_SHARED=DIR python -m calm_jax.train"
  " --config=configs/ntl.py:tiny,lora": _BENCHMARKS_DATA,
  "CALM_SHARED=DIR python -m calm_jax.train"
  " --config=configs/ntl.py:tiny,finetune"
  " --config.stages.compose.learning_rate=4e-3": _BENCHMARKS_DATA,
  "CALM_SHARED=DIR python -m calm_jax.train --config=configs/code.py:tiny": (
    _BENCHMARKS_DATA
  ),
  "python -m calm_jax.lm_eval --model calm_jax --model_args"
  " pretrained=DIR_OR_ID --tasks arc_easy": (
    "Downloads a task; tests/test_lm_eval.py runs one of its own."
  ),
  # On many devices.
  "python -m calm_jax.train --config=configs/code.py --config.mesh.fsdp=-1": (
    _BENCHMARKS_DATA
  ),
  "python -m calm_jax.train --config=configs/code.py --config.mesh.fsdp=4"
  " --config.mesh.tensor=2": _BENCHMARKS_DATA,
  "JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0"
  " python -m calm_jax.train --config=configs/kv.py --config.distributed"
  " --config.mesh.fsdp=-1": (
    "Waits for a second machine; tests/parallel/test_mesh.py starts both."
  ),
  "launch/tpu_pod.sh --project=P --zone=us-east5-a --name=calm"
  " --accelerator-type=v6e-256 --workdir=gs://my-bucket/kv --spot --delete --"
  " --config=configs/kv.py:paper": _LAUNCHES,
  # A full size for a TPU, of which none is needed, but its compiler.
  "python -m calm_jax.plan --config=configs/kv.py:paper --choices": (
    "--config.task.num_keys=300"
  ),
  "python -m calm_jax.plan --config=configs/compose.py --topology=gpu:1xH100"
  " --config.anchor=configs/shapes/qwen3-8b.json"
  " --config.augmenting=configs/shapes/qwen3-0.6b.json"
  " --config.dtype=bfloat16 --config.stages.compose.length=1024"
  " --config.stages.compose.batch_size=8 --nolargest_batch --decode_rows=0": (
    _PLANS
  ),
  "python -m calm_jax.plan --config=configs/code.py --topology=v5e:4x4": _PLANS,
  "python -m calm_jax.plan --config=configs/ntl.py --topology=v5e:2x4"
  " --config.anchor=configs/shapes/qwen3-0.6b.json"
  " --config.augmenting=\"{'lij': 'configs/shapes/goldfish-full.json',"
  " 'fur': 'configs/shapes/goldfish-full.json',"
  " 'vec': 'configs/shapes/goldfish-full.json'}\" --nolargest_batch": _PLANS,
  "python -m calm_jax.plan --config=configs/code.py --topology=gpu:1xH100"
  " --config.anchor=configs/shapes/qwen2.5-1.5b.json"
  " --config.augmenting=configs/shapes/qwen2.5-coder-0.5b.json"
  " --nolargest_batch": _PLANS,
  "python -m calm_jax.plan --config=configs/compose.py --topology=v5e:4x4"
  " --search --config.anchor=configs/shapes/gemma2-27b.json"
  f" --config.augmenting=configs/shapes/gemma2-2b.json {_LONG_ROWS}": _PLANS,
  "python -m calm_jax.plan --config=configs/compose.py --topology=v5p:2x2x2"
  " --search --config.anchor=configs/shapes/llama3-70b.json"
  f" --config.augmenting=configs/shapes/llama3-8b.json {_LONG_ROWS}": _PLANS,
  "python -m calm_jax.export --model=my-composition --folder=my-export": (
    "tests/composition/test_transformers_folder.py runs the command."
  ),
  # Benchmarks.
  "python -m benchmarks.probe": (
    "Needs a run's folder; tests/test_benchmarks.py probes a made model."
  ),
  "python -m benchmarks.gpu --minutes=7 --json=gpu.json": (
    "--only=speeds --pair=tiny"
  ),
  "python -m benchmarks.generate": _GENERATE,
  "python -m benchmarks.generate --bandwidth": _GENERATE,
  "python -m benchmarks.generate --pair=gemma --dtype=bfloat16 --rows=1,8"
  " --new=208": _GENERATE,
  "python -m benchmarks.generate --growth": _OF_FULL_SIZE,
  "python -m benchmarks.serve --model=DIR_OR_ID": (
    "Takes minutes; tests/serving has its tests."
  ),
  "python -m benchmarks.train_step": _STEP,
  "python -m benchmarks.train_step --weighted=0.2": _STEP,
  "python -m benchmarks.train_step --remat=full --unroll=1"
  " --loss_chunk=512": _STEP,
  "python -m benchmarks.train_step --pair=gemma --dtype=bfloat16 --length=2048"
  " --rows=4 --attention=auto --torch": (
    "Its loop in PyTorch needs torch; the command above is the same without."
  ),
  "python -m benchmarks.train_step --growth": _OF_FULL_SIZE,
  "python -m benchmarks.train_step --devices": (
    "Compiles for minutes; tests/test_benchmarks.py compares two devices."
  ),
  "python -m benchmarks.loading": "--gigabytes=0.01 --shards=2 --repeats=1",
  "python -m benchmarks.compile_time": (
    "Compiles 48 layers, for minutes, whatever their width."
  ),
  "python -m benchmarks.decode_program": (
    "Needs the GPU's compiler; tests/test_benchmarks.py counts a layer with it."
  ),
  "python -m benchmarks.data --kv": "--repeats=1",
  "python -m benchmarks.startup": _OF_FULL_SIZE,
  "python -m benchmarks.faults": (
    "Takes an hour; tests/training/test_faults.py makes each fault once."
  ),
  "python -m benchmarks.NAME": "Stands for the others.",
  # Tools.
  "gcloud compute tpus tpu-vm ssh NAME --worker=all --command=…": (
    "Google's, named by docs/launch.md."
  ),
  "pip install -e '.[eval]'": _INSTALLS,
  "pip install -e '.[gguf]'": _INSTALLS,
  "pip install -e '.[quant]'": _INSTALLS,
  "pip install -e '.[wandb]'": _INSTALLS,
  "pip install -e '.[serve]'": _INSTALLS,
  "python -m calm_jax.serve --model=runs/mine/composition --name=mine": (
    "Serves until it is ended; tests/serving has its tests."
  ),
  "pip install xprof": _INSTALLS,
  "python -m pip install -e '.[gpu]'": _INSTALLS,
  "python -m pip install -e '.[hf]'": _INSTALLS,
  "python -m pip install -e '.[tpu]'": _INSTALLS,
  "python -m pytest tests/parity/test_every_family.py -k nova": _NOVA,
  "python tests/parity/real_model.py MODEL FILE...": (
    "Needs torch; tests/parity/test_real_model.py runs it."
  ),
  "python tests/parity/table.py": _PARITY,
  "python tests/parity/write_golden.py": _PARITY,
} | {
  f"make {target}": "Installs into .venv; test_docs.py knows the target."
  for target in (
    ".venv/installed", "ablations", "docs", "facts", "format", "kv", "lint",
    "lm-eval", "parity", "test", "test-all",
    "test-oldest",
  )
}  # fmt: skip
