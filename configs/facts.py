"""Private knowledge in natural language: facts about people who do not exist.

A memory m_A of about a million parameters learns facts about 400 people, with a
tokenizer of its own. D_C are questions about a fifth of them. The composed
model is asked about the others, whom no other training text names.

configs/facts.py        trains the anchor too, on English; for two CPU cores
configs/facts.py:gemma  takes Gemma 3 270M, in the folder --config.anchor; for a
                        GPU
configs/facts.py:hub    takes Qwen3-0.6B-Base (Apache 2.0) from the hub
configs/facts.py:tiny   takes a minute, to see that everything runs
configs/facts.py:pieces gives m_A a tokenizer of smaller pieces than m_B's
configs/facts.py:same   gives m_A the tokens of m_B
configs/facts.py:second adds a memory of other people to the composition of
                        runs/facts (or --config.people=DIR); :third one to that
                        of runs/facts_second
configs/facts.py:lora   and every other kind of calm_jax.experiments.variants;
                        also with a size: configs/facts.py:gemma,lora

English text, which the anchor learns and must not lose, is NLLB-Seed and GSM8K
in the folder that CALM_SHARED names; without it WikiText-2 and GSM8K of the hub
(pip install -e '.[hf]').
"""

import os

from ml_collections import ConfigDict

from calm_jax.data.examples import ExampleSource
from calm_jax.data.facts import KINDS, Facts
from calm_jax.experiments import config_files, variants
from calm_jax.experiments.settings import (
  CompositionOptions,
  DecoderShape,
  Settings,
)
from calm_jax.experiments.text_task import Share, TextData, TextTask
from calm_jax.experiments.vocabularies import Vocabulary
from calm_jax.training.stage import Stage

# The files of tests, and what they are called in tables.
TESTS = {
  "held_out": "people never in D_C",
  "new_wordings": "wordings never seen",
  "two_hop": "their friends",
  "held_in": "people in D_C",
}


def get_config(variant: str = "small") -> ConfigDict:
  """The config of a variant, with the fields of `Settings`."""
  config = ConfigDict({"workdir": "runs/facts"})
  folder = config.get_ref("workdir") + "/facts"
  names = ("statements", "questions", "strangers", "composed")
  sources = {n: ExampleSource(folder + f"/{n}.jsonl") for n in names}
  english, held_out = _english(os.environ.get("CALM_SHARED", ""))
  people = ExampleSource(folder + "/held_out.*.jsonl")
  task = TextTask(
    sources=sources | english,
    held_out={"people never in D_C": people} | held_out,
    facts=Facts(folder),
    tokenizers={
      "anchor": Vocabulary(6000, ("english", "problems")),
      "augmenting": Vocabulary(2000, ("statements", "questions")),
    },
    evals=_evals(folder),
    pasted="composed",
    eval_batch_size=150,
    eval_length=128,
  )
  settings = Settings(
    experiment="text",
    task=task,
    workdir=config.workdir,
    # m_A holds a word of its answer in one state; m_B spells it in pieces, and
    # needs layers above a connection to choose the next one.
    composition=CompositionOptions(
      connections=((2, 2), (2, 3), (2, 4)), positions="rope"
    ),
    augmenting_name="people",
    augmenting_model=DecoderShape(
      num_layers=2, max_length=2048, rope_theta=100.0, tie_embeddings=True
    ),
    anchor_model=DecoderShape(
      num_heads=8, num_kv_heads=8, rope_theta=1000.0, tie_embeddings=True
    ),
    recipe=("augmenting", "anchor", "compose"),
    stages=_stages(),
  )
  config.update(config_files.to_config(settings))
  config.audit.evals = ("held_out-closed", "held_out-open")
  variants.apply(VARIANTS, variant, config)
  return config


def _english(shared: str) -> tuple[dict, dict]:
  """Sources of English to learn, and to measure."""
  english, rows, kind = "hf:Salesforce/wikitext:wikitext-2-raw-v1", "", "hf"
  train = test = "hf:openai/gsm8k:main"
  if shared:
    english, rows, kind = f"{shared}/data/nllb_seed/eng_Latn.txt", "6000:", ""
    train, test = (f"{shared}/data/gsm8k/{n}.jsonl" for n in ("train", "test"))
  learnt = {
    "english": ExampleSource(english, rows=":6000"),
    "problems": ExampleSource(train, completion="{question}\n{answer}"),
  }
  split = {"split": "test"} if kind else {}
  held_out = {
    "English": ExampleSource(english, rows=rows or ":200", **split),
    "GSM8K questions": ExampleSource(
      test, completion="{question}", rows=":200", **split
    ),
  }
  return learnt, held_out


def _stages() -> dict[str, Stage]:
  facts = {"statements": Share(0.2), "questions": Share(0.8)}
  english = {"english": Share(0.5), "problems": Share(0.5)}
  # D_C, and a little of the anchor's own domain, which it must not lose.
  composed = {"composed": Share(0.6)}
  composed |= {"english": Share(0.25), "problems": Share(0.15)}
  shared = {"optimizer": "muon", "learning_rate": 4e-3, "warmup": 20}
  return {
    "augmenting": Stage(
      model="augmenting/people",
      trainable=("augmenting/people/.*",),
      data=TextData(facts, watch=("people never in D_C",)),
      steps=1800,
      batch_size=32,
      length=64,
      weight_decay=0.01,
      **shared,
    ),
    "anchor": Stage(
      model="anchor",
      trainable=("anchor/.*",),
      data=TextData(english, watch=("English",)),
      steps=400,
      batch_size=24,
      length=128,
      **shared,
    ),
    "compose": Stage(
      data=TextData(composed, watch=("people never in D_C",)),
      steps=300,
      batch_size=40,
      length=96,
      **shared,
    ),
  }


def _evals(folder) -> dict[str, dict]:
  evals = {}
  for test, group in TESTS.items():
    for kind in KINDS:
      if (test, kind) == ("two_hop", "friend"):
        continue
      is_name = kind == "friend"
      evals[f"{test}-{kind}"] = {
        "kind": "questions",
        "group": "names of friends" if is_name else group,
        "subset": group if is_name else kind,
        "path": folder + f"/{test}.{kind}.jsonl",
        "max_new_tokens": 12,
      }
  return evals


def _small(config: ConfigDict) -> None:
  del config


def _loaded(config: ConfigDict, layers: tuple[int, ...]) -> None:
  """A pretrained anchor, with a connection to each of these layers."""
  config.recipe = ("augmenting", "compose")
  del config.task.tokenizers.anchor
  config.composition.connections = tuple((2, layer) for layer in layers)
  # The states of these layers are in the hundreds, and W^O starts at zero.
  config.composition.output_scale = "state"
  # A pretrained anchor reads long texts, and m_A, whose tokens are small, reads
  # them along: what neither has met in training is lost.
  config.stages.compose.update(
    steps=300,
    batch_size=8,
    length=512,
    augmenting_length=2048,
    learning_rate=2e-3,
  )
  for name, count, separator in (("english", 16, " "), ("problems", 3, "\n\n")):
    config.task.sources[name].update(join=count, separator=separator)
    config.stages.compose.data.mixture[name].weight = 0.3
  config.task.facts.tested = 60
  if shared := os.environ.get("CALM_SHARED", ""):
    # What a pretrained anchor can do, and must not lose.
    config.task.evals.translation = {
      "kind": "translation",
      "group": "translation into English, three exemplars",
      "language": "nno_Latn",
      "path": f"{shared}/data/flores200",
      "shots": 3,
      "limit": 64,
      "max_new_tokens": 48,
    }
  # A row has few tokens with a loss, and the head costs as much as the layers.
  config.loss_chunk = 64


def _gemma(config: ConfigDict) -> None:
  config.workdir = "runs/facts_gemma"
  config.anchor = "gemma3-270m"
  _loaded(config, (12, 15, 18))


def _hub(config: ConfigDict) -> None:
  config.workdir = "runs/facts_hub"
  commit = "da87bfb608c14b7cf20ba1ce41287e8de496c0cd"
  config.anchor = f"Qwen/Qwen3-0.6B-Base@{commit}"
  config.dtype = "bfloat16"
  _loaded(config, (13, 18, 23, 28))


def _tiny(config: ConfigDict) -> None:
  config.workdir = "runs/facts_tiny"
  config.task.facts.update(people=20, tested=12)
  config.audit.update(examples=8, draws=1)
  for side, pieces in (("anchor", 1000), ("augmenting", 400)):
    config[f"{side}_model"].update(width=32, mlp_width=64)
    config.task.tokenizers[side].pieces = pieces
  for stage in config.stages.values():
    stage.update(steps=20, batch_size=8, warmup=5)
    stage.update(log_every=5, eval_every=10, checkpoint_every=10)


def _pieces(config: ConfigDict) -> None:
  """m_A spells its answers in smaller pieces than m_B."""
  _small(config)
  config.workdir = "runs/facts_pieces"
  config.task.tokenizers.augmenting.pieces = 200


def _same(config: ConfigDict) -> None:
  """m_A reads the tokens of m_B."""
  _small(config)
  config.workdir = "runs/facts_same"
  del config.task.tokenizers.augmenting
  config.task.ensemble = True


def _second(config: ConfigDict) -> None:
  _small(config)
  config.workdir = "runs/facts_second"
  _add_memory(config, "others", 1, {"people": "runs/facts"})


def _third(config: ConfigDict) -> None:
  _small(config)
  config.workdir = "runs/facts_third"
  earlier = {"people": "runs/facts", "others": "runs/facts_second"}
  _add_memory(config, "strangers", 2, earlier)


def _add_memory(
  config: ConfigDict, name: str, number: int, earlier: dict[str, str]
) -> None:
  """Adds a memory of other people to the composition of an earlier run.

  `earlier` are the folders of its memories' runs, the last one's with that
  composition; --config.<memory> gives another. Their people are asked about.
  """
  config.augmenting_name, config.task.facts.memory = name, number
  config.recipe = ("augmenting", "compose")
  del config.task.tokenizers.anchor
  config.stages.augmenting.update(
    model=f"augmenting/{name}", trainable=(f"augmenting/{name}/.*",)
  )
  # A memory that says what it does not know can leave that to the others.
  mixture = config.stages.augmenting.data.mixture
  mixture.strangers = config_files.to_config(Share(0.15))
  # New connections are to add nothing where an earlier memory answers.
  sources, evals = config.task.sources, config.task.evals
  for memory, workdir in earlier.items():
    config[memory] = workdir
    folder = config.get_ref(memory)
    config.add_to = folder + "/composition"
    known = ExampleSource(folder + "/facts/composed.jsonl")
    sources[memory] = config_files.to_config(known)
    share = Share(0.4 / len(earlier))
    config.stages.compose.data.mixture[memory] = config_files.to_config(share)
    for kind in KINDS:
      asked = evals[f"held_out-{kind}"].copy_and_resolve_references()
      asked.path = folder + f"/facts/held_out.{kind}.jsonl"
      asked.group, asked.subset = f"an earlier memory, {memory}", kind
      evals[f"{memory}-{kind}"] = asked


VARIANTS = {
  "small": _small,
  "gemma": _gemma,
  "hub": _hub,
  "tiny": _tiny,
  "pieces": _pieces,
  "same": _same,
  "second": _second,
  "third": _third,
}
