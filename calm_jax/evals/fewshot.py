"""Few-shot prompts: templates that a person can read, and their exemplars."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.data.sources import row_slice
from calm_jax.evals.base import Generate

PROMPTS = Path(__file__).parent / "prompts"
SEPARATOR = "\n\n"  # between exemplars


@dataclasses.dataclass(frozen=True)
class Template:
  """How an item is written; the file's last field is the answer.

  Attributes:
    question: the text before the answer, with {fields}.
    answer: the field that the model is asked for.
    stop: where an answer ends: the line that begins the next question. A model
      need not write further.
    origin: the file.
  """

  question: str
  answer: str
  stop: str
  origin: str

  def ask(self, item: Mapping) -> str:
    """An item up to its answer; InputError if a field is missing."""
    # Most tokenizers put the space before a word into the word's token.
    return self._fill(self.question.rstrip(" "), item)

  def show(self, item: Mapping) -> str:
    """A whole exemplar; InputError if a field is missing."""
    return self._fill(f"{self.question}{{{self.answer}}}", item)

  def cut(self, output: str) -> str:
    """The answer in what a model wrote."""
    return output.split(self.stop, 1)[0].strip()

  def _fill(self, text: str, item: Mapping) -> str:
    try:
      return text.format_map(item)
    except KeyError as error:
      raise InputError(
        f"{self.origin} asks for the field {error}, which an item lacks; it "
        f"has {sorted(item)}"
      ) from error


def load_template(name_or_path: str | Path) -> Template:
  """Reads a template: one of `prompts/` by name, else a file of your own.

  A template is the text of one exemplar, with {named fields}; {{ and }} stand
  for braces. It must end with the field that is the answer.

  Raises:
    InputError: no such file, a bad field, or it does not end with a field.
  """
  path = Path(name_or_path)
  if not path.suffix:
    path = PROMPTS / f"{name_or_path}.txt"
  if not path.is_file():
    known = sorted(p.stem for p in PROMPTS.glob("*.txt"))
    raise InputError(
      f"no prompt file {path}: give a file's path, or one of {known}"
    )
  text = path.read_text(encoding="utf-8").removesuffix("\n")
  try:
    parts = list(string.Formatter().parse(text))
  except ValueError as error:
    raise InputError(f"{path}: {error}; write {{{{ for a brace") from error
  fields = [field for _, field, _, _ in parts if field is not None]
  if bad := [field for field in fields if not field.isidentifier()]:
    raise InputError(f"{path}: {bad} are no names of fields")
  if not fields or not text.endswith(f"{{{fields[-1]}}}"):
    raise InputError(
      f"{path} must end with the answer's field, such as {{answer}}; it ends "
      f"with {text[-20:]!r}"
    )
  return Template(
    question=text.removesuffix(f"{{{fields[-1]}}}"),
    answer=fields[-1],
    stop="\n" + parts[0][0].strip(),
    origin=str(path),
  )


def prompts(
  template: Template,
  items: Sequence[Mapping],
  pool: Sequence[Mapping],
  *,
  shots: int,
  seed: int,
  fits: Callable[[str], bool] | None = None,
) -> list[tuple[str, list[int]]]:
  """A prompt for each item, behind exemplars of its own.

  What item i is given depends on (seed, i) and the pool, not on how many items
  there are. An exemplar that asks what the item asks is never drawn.

  Args:
    template: how items and exemplars are written.
    items: what is evaluated.
    pool: the dev split.
    shots: exemplars of a prompt.
    seed: of the drawing.
    fits: whether a prompt is short enough; while it is not, the first of its
      exemplars is left out.

  Returns:
    For each item (prompt, places in the pool of its exemplars).

  Raises:
    InputError: a field is missing, or the pool has fewer than `shots` others.
  """
  asked = [template.ask(item) for item in pool]
  out = []
  for number, item in enumerate(items):
    question = template.ask(item)
    order = np.random.default_rng((seed, number)).permutation(len(pool))
    chosen = [int(i) for i in order if asked[i] != question][:shots]
    if len(chosen) < shots:
      raise InputError(
        f"{shots} exemplars are asked for item {number}, the pool has only "
        f"{len(chosen)} others; give fewer shots or a larger pool"
      )
    while True:
      shown = [template.show(pool[i]) for i in chosen]
      prompt = SEPARATOR.join([*shown, question])
      if not chosen or fits is None or fits(prompt):
        break
      chosen = chosen[1:]
    out.append((prompt, chosen))
  return out


def answers(
  prompt: str | Path,
  items: Sequence[Mapping],
  pool: Sequence[Mapping],
  generate: Generate,
  **options,
) -> list[dict[str, Any]]:
  """What a model answers to items.

  Args:
    prompt: see `load_template`.
    items, pool: see `prompts`.
    generate: the model; it may stop at the template's `stop`.
    **options: shots, seed and fits, see `prompts`.

  Returns:
    For each item a row: prompt, exemplars (places in the pool), completion
    (what was wanted), prediction (what was written, up to `stop`).

  Raises:
    InputError: no items, or what `load_template` and `prompts` raise.
  """
  if not items:
    raise InputError("there are no items to evaluate")
  template = load_template(prompt)
  asked = prompts(template, items, pool, **options)
  if any(template.answer not in item for item in items):
    raise InputError(f"an item lacks its answer, {template.answer!r}")
  written = generate([text for text, _ in asked])
  return [
    {
      "prompt": text,
      "exemplars": exemplars,
      "completion": item[template.answer],
      "prediction": template.cut(output),
    }
    for item, (text, exemplars), output in zip(
      items, asked, written, strict=True
    )
  ]


def take_rows(items: list, rows: str) -> list:
  """A slice of a file's items: ":100", "6000:" or "" for all.

  Raises:
    InputError: it is no slice, or nothing is in it.
  """
  part = items[row_slice(rows)]
  if not part:
    raise InputError(f"rows {rows!r} of {len(items)} items are none")
  return part


def mean_shots(rows: Sequence[Mapping]) -> float:
  """Exemplars of a prompt on average: fewer than asked if they did not fit."""
  return sum(len(row["exemplars"]) for row in rows) / len(rows)
