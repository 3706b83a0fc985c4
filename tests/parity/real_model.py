"""Compares a real checkpoint, on real text, with transformers and with itself.

  python tests/parity/real_model.py MODEL FILE... [--lm_eval]

MODEL is a folder; a FILE has one text a line, or JSON lines {"prompt"}. Prints
for each file how far the logits are from transformers' (float32), how many of
its greedy texts are ours, and what int8 and int4 keep of the float32 model: the
share of next tokens that agree, and the KL divergence in nats. Then checks that
`export_hf` keeps every bit, and with --lm_eval that lm-evaluation-harness
scores the texts as it scores them by its own `hf` model. Exits with 1 if
anything but the quantised models is off. Needs torch, and memory for four
models.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import tempfile

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

import calm_jax
from calm_jax import LanguageModel
from calm_jax.core import files
from calm_jax.data.examples import read_prompts
from calm_jax.generation import decode
from calm_jax.models.hf.weight_files import weight_files

LIMIT = 1e-3  # of a difference of logits from transformers'
# Of lm-eval's scores, in nats: with 262,144 tokens torch's log_softmax in
# float32 is off by 2e-5 a token, ours by less than 1e-6.
SCORES_LIMIT = 5e-3
QUANTISED = ("int8", "int4")
ROWS = 8  # at once: logits take rows x tokens x vocabulary x 4 bytes
GREEDY, PROMPT, NEW = 1, 12, 20  # greedy texts of a file, and their tokens
LETTERS = 80  # of a line, for lm-eval
COLUMNS = [f"{kind}{what}" for kind in QUANTISED for what in ("", " KL")]


def texts_of(path: pathlib.Path, count: int) -> list[str]:
  """The first `count` texts of a file."""
  if path.suffix == ".jsonl":
    return read_prompts(path)[:count]
  lines = files.read_text(path).split("\n")
  return [line for line in lines if line.strip()][:count]


@jax.jit
def compare(full_BLV, other_BLV, counted_BL):
  """Next tokens that agree, and KL divergences, summed over each row."""
  agree_BL = full_BLV.argmax(-1) == other_BLV.argmax(-1)
  full_BLV, other_BLV = map(jax.nn.log_softmax, (full_BLV, other_BLV))
  kl_BL = (jnp.exp(full_BLV) * (full_BLV - other_BLV)).sum(-1)
  return [jnp.where(counted_BL, x, 0).sum(-1) for x in (agree_BL, kl_BL)]


def read_theirs(folder: str):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()


@torch.no_grad()
def their_logits(theirs, tokens_BL: np.ndarray) -> np.ndarray:
  return theirs(torch.from_numpy(np.int64(tokens_BL))).logits.numpy()


def measure(models: dict[str, LanguageModel], theirs, rows: list[list[int]]):
  """Measures all rows of one file, batch by batch.

  Returns:
    (the largest difference from transformers, the number of next tokens,
    {kind: [how many agree with float32, the sum of the KL divergences]}).
  """
  error, tokens = 0.0, 0
  kept = {kind: np.zeros(2) for kind in QUANTISED}
  rows = sorted(rows, key=len)
  for at in range(0, len(rows), ROWS):
    chosen = rows[at : at + ROWS]
    # A causal model's logits do not depend on what stands to their right.
    length = -(-len(chosen[-1]) // 8) * 8
    lengths_B1 = np.array([[len(row)] for row in chosen])
    tokens_BL = np.array([row + [0] * (length - len(row)) for row in chosen])
    real_BL = np.arange(length) < lengths_B1
    # The first place has the same token in all rows.
    counted_BL = real_BL & (np.arange(length) > 0)
    full_BLV = models[""].logits(tokens_BL)
    off_BL = np.abs(full_BLV - their_logits(theirs, tokens_BL)).max(-1)
    error = max(error, float(off_BL[real_BL].max()))
    tokens += int(counted_BL.sum())
    for kind in QUANTISED:
      found = compare(full_BLV, models[kind].logits(tokens_BL), counted_BL)
      kept[kind] += np.sum(found, 1)
  return error, tokens, kept


def same_greedy_text(model: LanguageModel, theirs, ids: list[int]) -> bool:
  """Whether both continue the beginning of a text alike."""
  ids = ids[:PROMPT]
  [ours] = decode.generate(model, [ids], max_new_tokens=NEW)
  given = torch.tensor([ids])
  mask = torch.ones_like(given)
  made = theirs.generate(
    given, attention_mask=mask, do_sample=False, max_new_tokens=NEW
  )
  spell = model.tokenizer.decode
  return spell(ours) == spell(made[0, len(ids) :].tolist())


def tensors_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
  tensors = {}
  for path in weight_files(folder):
    with safe_open(path, "pt") as file:
      tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  return tensors


def survives_export(model: LanguageModel, folder: str, ids: list[int]) -> bool:
  """Whether `export_hf` keeps the tensors, and transformers its logits."""
  before = tensors_of(pathlib.Path(folder))
  logits = their_logits(read_theirs(folder), np.array([ids]))
  with tempfile.TemporaryDirectory() as name:
    model.export_hf(name)
    after = tensors_of(pathlib.Path(name))
    again = their_logits(read_theirs(name), np.array([ids]))
    return (
      before.keys() == after.keys()
      and all(torch.equal(before[n].float(), after[n]) for n in before)
      and np.array_equal(logits, again)
    )


def harness_scores(folder: str, texts: list[str]) -> list[np.ndarray]:
  """Log-likelihoods of lm-evaluation-harness, by us and by its `hf` model."""
  import harness

  from calm_jax.lm_eval import CalmJax

  rows = [{"text": text} for text in texts]
  with tempfile.TemporaryDirectory() as name:
    tasks = harness.write(pathlib.Path(name), {"tiny_rolling": rows}, {})
    asked = tasks, ["tiny_rolling"]
    sides = [
      harness.evaluate(*asked, CalmJax(folder, batch_size=ROWS)),
      harness.evaluate_hf(*asked, folder, rows=ROWS),
    ]
  return [np.squeeze(side["tiny_rolling"]) for side in sides]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("model")
  parser.add_argument("files", nargs="+", type=pathlib.Path)
  parser.add_argument("--lines", type=int, default=30, help="of each file")
  parser.add_argument("--tokens", type=int, default=64, help="of a line read")
  parser.add_argument("--lm_eval", action="store_true")
  options = parser.parse_args()
  models = {
    kind: calm_jax.load_model(options.model, quantise=kind)
    for kind in ("", *QUANTISED)
  }
  model, theirs = models[""], read_theirs(options.model)
  tokenizer = model.text()
  spelled = transformers.AutoTokenizer.from_pretrained(options.model)
  table = Table("text", "tokens", "logits off", "greedy", *COLUMNS)
  texts = {path: texts_of(path, options.lines) for path in options.files}
  bad = []
  for path, lines in texts.items():
    rows = [tokenizer.encode(line) for line in lines]
    if rows != [spelled.encode(x, add_special_tokens=False) for x in lines]:
      bad.append(f"{path}: the tokens are others")
    rows = [tokenizer.with_bos(row)[: options.tokens] for row in rows]
    error, tokens, kept = measure(models, theirs, rows)
    same = [same_greedy_text(model, theirs, row) for row in rows[:GREEDY]]
    cells = [f"{tokens:,}", f"{error:.1e}", f"{sum(same)} of {len(same)}"]
    for agree, kl in kept.values():
      cells += [f"{agree / tokens:.1%}", f"{kl / tokens:.4f}"]
    table.add_row(path.stem, *cells)
    print(path.stem, *cells, file=sys.stderr, flush=True)  # it takes minutes
    if error > LIMIT or not all(same):
      bad.append(f"{path}: logits or greedy texts are off")
  console = Console()
  console.print(table)
  if not survives_export(model, options.model, rows[0]):
    bad.append("export_hf changes the model")
  if options.lm_eval:
    lines = [x[:LETTERS] for x in itertools.chain(*texts.values())]
    ours, hf = harness_scores(options.model, lines)
    off = np.abs(ours - hf).max()
    console.print(
      f"lm-eval: {len(hf)} scores, off by {off:.1e} nats at most; mean: "
      f"{ours.mean():.4f}, and {hf.mean():.4f} by hf"
    )
    if off > SCORES_LIMIT:
      bad.append("lm-eval's scores are off")
  if bad:
    sys.exit("\n".join(bad))


if __name__ == "__main__":
  main()
