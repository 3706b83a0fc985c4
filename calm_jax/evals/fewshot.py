"""Few-shot evaluation: prompt templates, and exemplars drawn from a pool."""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import Seed
from calm_jax.data.examples import row_slice
from calm_jax.evals import base
from calm_jax.evals.base import Evaluation, Judgement, Prompt, Question, Row
from calm_jax.text import stop_strings

Items = Sequence[Mapping]

PROMPTS = Path(__file__).parent / "prompts"


@dataclasses.dataclass(frozen=True)
class Template:
  """The text of one exemplar, with {fields}; the last one is the answer."""

  before: str  # the text before the answer
  answer: str  # the field that the model is asked for
  ending: str  # the text after the answer
  stop: str  # ends an answer: the line that begins the next question
  origin: str  # the file

  def ask(self, item: Mapping) -> str:
    """Writes an item up to its answer."""
    # Most tokenizers put the space before a word into the word's token.
    return self._fill(self.before.rstrip(" "), item)

  def show(self, item: Mapping) -> str:
    """Writes an exemplar with its answer."""
    return self._fill(f"{self.before}{{{self.answer}}}{self.ending}", item)

  def question(
    self,
    item: Mapping,
    pool: Items | Mapping[int, Mapping],
    places: Sequence[int],
  ) -> Question:
    """Asks an item after exemplars of a pool."""
    return Question(self.ask(item), {i: self.show(pool[i]) for i in places})

  def cut(self, output: str) -> str:
    """Returns the answer in what a model wrote."""
    return stop_strings.cut(output, [self.stop]).strip()

  def _fill(self, text: str, item: Mapping) -> str:
    try:
      return text.format_map(item)
    except KeyError as error:
      raise InputError(
        f"{self.origin} asks for the field {error}, which an item lacks; it "
        f"has {sorted(item)}"
      ) from error


def load_template(name_or_path: str | Path, ending: str = "") -> Template:
  """Reads a template: one of `prompts/` by name, else a file of your own.

  A template is the text of one exemplar, with {named fields}; {{ and }} stand
  for braces. InputError unless it ends with the answer's field, and `ending`.
  """
  path = Path(name_or_path)
  if not path.suffix:
    path = PROMPTS / f"{name_or_path}.txt"
  if not path.is_file():
    known = sorted(p.stem for p in PROMPTS.glob("*.txt"))
    raise InputError(
      f"no prompt file {path}: give a file's path, or one of {known}"
    )
  text = files.read_text(path).removesuffix(ending)
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
    before=text.removesuffix(f"{{{fields[-1]}}}"),
    answer=fields[-1],
    ending=ending,
    stop="\n" + parts[0][0].strip(),
    origin=str(path),
  )


def draw(
  template: Template, items: Items, pool: Items, shots: int, seed: int
) -> list[list[int]]:
  """Draws exemplars for each item: their places in the pool.

  Those of item i follow from (seed, i) and the pool, not from the number of
  items. An exemplar that asks what the item asks is never drawn.
  """
  asked = [template.ask(item) for item in pool]
  drawn = []
  for number, item in enumerate(items):
    question = template.ask(item)
    order = np.random.default_rng((seed, number)).permutation(len(pool))
    chosen = [int(i) for i in order if asked[i] != question][:shots]
    if len(chosen) < shots:
      raise InputError(
        f"{shots} exemplars are asked for item {number}, the pool has only "
        f"{len(chosen)} others; give fewer shots or a larger pool"
      )
    drawn.append(chosen)
  return drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot(base.Options):
  """Options of every evaluation whose exemplars are drawn from a pool."""

  shots: int  # exemplars of a prompt
  language: str = ""  # the subset of the benchmark
  seed: Seed = 0  # of drawing exemplars
  prompt: str = ""  # of `load_template`; by default the kind's own

  def few_shot(
    self,
    task: str,
    metric: str,
    items: Items,
    pool: Items,
    judge: Callable[[list[Row]], Judgement],
  ) -> Evaluation:
    """Makes the evaluation of items, with exemplars drawn from a pool.

    Both have the fields of the template, by default that named as the task.
    `judge` judges rows of "prompt", "exemplars" (places in the pool),
    "completion" (the right answer) and "prediction".
    """
    template = load_template(self.prompt or task)
    if not items:
      raise InputError("there are no items to evaluate")
    drawn = draw(template, items, pool, self.shots, self.seed)
    questions = [
      template.question(item, pool, places)
      for item, places in zip(items, drawn, strict=True)
    ]
    if any(template.answer not in item for item in items):
      raise InputError(f"an item lacks its answer, {template.answer!r}")

    def judge_outputs(prompts: list[Prompt], outputs: list[str]) -> Judgement:
      rows = []
      for item, asked, output in zip(items, prompts, outputs, strict=True):
        row = {"prompt": asked.text, "exemplars": asked.exemplars}
        row["completion"] = item[template.answer]
        rows.append(row | {"prediction": template.cut(output)})
      return judge(rows)

    return Evaluation(
      task=task,
      group=self.group,
      subset=self.language,
      metric=metric,
      examples=len(items),
      shots=self.shots,
      max_new_tokens=self.max_new_tokens,
      stop=(template.stop,),
      questions=questions,
      judge=judge_outputs,
    )


def take(items: list, rows: str = "", limit: int = 0) -> list:
  """Takes a slice of items (":100", "6000:" or ""), at most `limit` of it."""
  part = items[row_slice(rows)]
  if not part:
    raise InputError(f"rows {rows!r} of {len(items)} items are none")
  return part[: limit or None]
