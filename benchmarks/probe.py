"""Says what a linear classifier reads of an answer in a model's states.

  python -m benchmarks.probe MODEL QUESTIONS [TESTS ...]

MODEL is a model's folder, or that of a run with one m_A; QUESTIONS and TESTS
are jsonl with "prompt", "completion" and perhaps "attribute". For each
attribute and layer a ridge classifier reads the state at the prompt's last
token, and says the answer; of a number, each of its digits. It is fitted to
QUESTIONS, or to their first half if there are no TESTS. The table has its
accuracy on the rest in percent, beside that of the most frequent answer. What
D_C can teach of a memory before any training:

  python -m benchmarks.probe runs/facts runs/facts/facts/composed.jsonl \\
    runs/facts/facts/held_out.closed.jsonl runs/facts/facts/held_out.open.jsonl
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from calm_jax.composition import augmenting
from calm_jax.core import files, hub
from calm_jax.core.batch import Sequence
from calm_jax.core.errors import InputError, check_text
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel, load_model
from calm_jax.models.config import ModelConfig

ROWS = 64
RIDGE = 0.03  # for features of unit variance


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
  """Prints the table; returns its rows: the share of the most frequent answer,
  then the accuracy of each layer's state."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("model")
  parser.add_argument("questions")
  parser.add_argument("tests", nargs="*")
  flags = parser.parse_args(argv)
  questions = _read(flags.questions)
  tests = [question for path in flags.tests for question in _read(path)]
  if not tests:
    half = len(questions) // 2
    questions, tests = questions[:half], questions[half:]
  model, rows = load_model(_folder(Path(flags.model))), {}
  x_SNE, x_SME = (
    states(model, [q["prompt"] for q in asked]) for asked in (questions, tests)
  )
  fitted, tested = _answers(questions), _answers(tests)
  for name in sorted(fitted.keys() & tested.keys()):
    (at, answers), (test_at, wanted) = fitted[name], tested[name]
    values, counts = np.unique(answers, return_counts=True)
    pairs = zip(x_SNE, x_SME, strict=True)
    said = [classify(x[at], answers, y[test_at]) for x, y in pairs]
    said = [values[counts.argmax()], *said]
    rows[name] = [100 * float(np.mean(s == wanted)) for s in said]
  _print(rows)
  return rows


def states(model: LanguageModel, prompts: list[str]) -> np.ndarray:
  """The states [S, N, E] at the last token of N prompts, after each layer."""
  ids = [model.text().encode_prompt(prompt) for prompt in prompts]
  length, made = batching.round_up(max(map(len, ids))), []
  for at in range(0, len(ids), ROWS):
    rows = batching.pad(ids[at : at + ROWS], ROWS, length)
    made.append(_states(model.params["anchor"], model.spec.anchor, rows))
  return np.concatenate(made, axis=1)[:, : len(ids)]


def classify(x_NE, answers_N, x_ME) -> np.ndarray:
  """The answers [M] to other states, by a ridge classifier of N states."""
  mean_E, std_E = x_NE.mean(0), x_NE.std(0) + 1e-6
  x_NE, x_ME = (x_NE - mean_E) / std_E, (x_ME - mean_E) / std_E
  values, (N, E) = np.unique(answers_N), x_NE.shape
  y_NC = (answers_N[:, None] == values).astype(np.float64)
  mean_C, ridge_EE = y_NC.mean(0), RIDGE * N * np.eye(E)
  w_EC = np.linalg.solve(x_NE.T @ x_NE + ridge_EE, x_NE.T @ (y_NC - mean_C))
  return values[(x_ME @ w_EC + mean_C).argmax(-1)]


@functools.partial(jax.jit, static_argnames="config")
def _states(params: dict, config: ModelConfig, rows: Sequence) -> jax.Array:
  """The states of the last slot after each layer, float32 [S, B, E]."""
  made, layers = [], range(1, config.num_layers + 1)

  def keep(_, x_BLE):
    made.append(x_BLE[:, -1].astype("float32"))
    return x_BLE

  augmenting.run(params, config, rows, None, None, None, layers, keep)
  return jax.numpy.stack(made)


def _folder(path: Path) -> Path:
  """A model's folder, or the m_A's that a run has saved."""
  found = sorted(path.glob("models/augmenting/*")) or [path]
  if len(found) > 1 or not (found[0] / hub.CONFIG).exists():
    raise InputError(f"{path} holds no model, and no run with one m_A")
  return found[0]


def _read(path: str) -> list[dict]:
  fields = {"prompt": check_text, "completion": check_text}
  return [record for _, record in files.read_json_lines(Path(path), fields)]


def _answers(questions: list[dict]) -> dict[str, tuple[list[int], np.ndarray]]:
  """By attribute, or digit of one, the questions' numbers and the answers."""
  made = defaultdict(list)
  for number, question in enumerate(questions):
    name = question.get("attribute", "answer")
    answer = question["completion"].strip()
    parts = {name: answer}
    if answer.isdigit():
      parts = {f"{name}, digit {i + 1}": d for i, d in enumerate(answer)}
    for part, said in parts.items():
      made[part].append((number, said))
  return {
    name: ([n for n, _ in pairs], np.array([said for _, said in pairs]))
    for name, pairs in made.items()
  }


def _print(rows: dict[str, list[float]]) -> None:
  layers = len(next(iter(rows.values()))) - 1
  columns = [
    "answer",
    "most frequent",
    *(f"layer {i + 1}" for i in range(layers)),
  ]
  table = Table(*columns)
  for name, values in rows.items():
    table.add_row(name, *(f"{value:.1f}" for value in values))
  Console().print(table)


if __name__ == "__main__":
  main()
