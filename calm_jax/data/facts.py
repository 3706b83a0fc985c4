"""Facts about people who do not exist, as text that no corpus holds.

A memory learns statements and questions about all people; D_C, `composed`, has
questions about a part of them. A composition that answers questions about the
others can only have read the memory. Every file is jsonl with a "text", or a
"prompt" and a "completion", a line; see `write`.

Each attribute has wordings for statements, for questions, and for questions
that no training file has ("new"); facts.tsv holds them. Closed attributes are
one of a few words, open ones are numbers, and a friend is another person:
two-hop questions ask for the friend's attributes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import Count, Fraction

_TABLE = Path(__file__).with_name("facts.tsv")
_NUMBERS = {"year": (1900, 2000), "code": (1000, 10_000)}
KINDS = {
  "closed": ("country", "job", "colour"),
  "open": tuple(_NUMBERS),
  "friend": ("friend",),
}
ATTRIBUTES = tuple(itertools.chain(*KINDS.values()))
# Parts of the syllables of names.
_ONSETS = "b br d dr f fl g gr h k kl l m n p pl r s st t tr v z"
_VOWELS = "a e i o u au ei"
_CODAS = "l m n r s st nd rk x"


@functools.cache
def wordings() -> dict[tuple[str, str], tuple[str, ...]]:
  """The texts of facts.tsv, by attribute and use.

  Uses are "statements", "questions", "new" (questions for tests only), over a
  name {n} and its value {v}, and "values" of closed attributes.
  """
  texts: dict[tuple[str, str], tuple[str, ...]] = {}
  for line in _TABLE.read_text(encoding="utf-8").splitlines():
    attribute, use, text = line.split("\t")
    own = text.split() if use == "values" else [text]
    texts[attribute, use] = (*texts.get((attribute, use), ()), *own)
  return texts


@dataclasses.dataclass(frozen=True)
class Facts:
  """The people, and where their files go."""

  folder: str = ""  # "" for no facts
  people: Count = 400
  held_in: Fraction = 0.2  # of the people, for D_C
  tested: Count = 150  # questions of a file of tests at most
  memory: int = 0  # people of another number are others


class Person(NamedTuple):
  """A person who does not exist, and the values of `ATTRIBUTES`."""

  name: str
  values: dict[str, str]


def make_people(facts: Facts, seed: int) -> list[Person]:
  """Draws people, whose surnames differ; the first ones are D_C's."""
  rng = np.random.default_rng((seed, 2 * facts.memory))
  surnames = _names(rng, facts.people, 2)
  first_names = _names(rng, max(2, facts.people // 8), 1)
  names = [
    f"{first_names[rng.integers(len(first_names))]} {s}" for s in surnames
  ]
  closed = {
    a: _dealt(rng, wordings()[a, "values"], facts) for a in KINDS["closed"]
  }
  values = []
  for i in range(facts.people):
    drawn = {a: dealt[i] for a, dealt in closed.items()}
    drawn |= {a: str(rng.integers(*ends)) for a, ends in _NUMBERS.items()}
    friend = (i + 1 + rng.integers(facts.people - 1)) % facts.people
    values.append(drawn | {"friend": names[friend]})
  return [Person(*pair) for pair in zip(names, values, strict=True)]


def make_strangers(
  facts: Facts, seed: int, known: list[Person]
) -> list[Person]:
  """Draws half as many people of whom everything is "unknown".

  A memory that learns questions about them can tell what it does not know, and
  so can those who read its states.
  """
  rng = np.random.default_rng((seed, 2 * facts.memory, 1))
  taken = {person.name.split()[1] for person in known}
  first_names = [person.name.split()[0] for person in known]
  surnames = [s for s in _names(rng, len(known), 2) if s not in taken]
  names = zip(first_names[: len(known) // 2], surnames, strict=False)
  unknown = dict.fromkeys(ATTRIBUTES, "unknown")
  return [Person(" ".join(name), unknown) for name in names]


def num_held_in(facts: Facts) -> int:
  """The number of people that D_C asks about; InputError if none or all."""
  count = round(facts.people * facts.held_in)
  if not 0 < count < facts.people:
    raise InputError(
      f"facts.held_in={facts.held_in} of {facts.people} people leaves {count} "
      "for D_C: some must be, and some must not"
    )
  return count


def statements(people: list[Person]) -> list[dict[str, str]]:
  """Every fact in every wording of a statement, as plain text."""
  return [
    {"text": wording.format(n=person.name, v=person.values[attribute])}
    for person in people
    for attribute in ATTRIBUTES
    for wording in wordings()[attribute, "statements"]
  ]


def questions(
  people: list[Person],
  attributes: Sequence[str] = ATTRIBUTES,
  use: str = "questions",
) -> list[dict[str, str]]:
  """Every fact in every wording of a question, or of use "new"."""
  return [
    _question(
      wording.format(n=person.name), person.values[attribute], attribute
    )
    for person in people
    for attribute in attributes
    for wording in wordings()[attribute, use]
  ]


def two_hops(
  people: list[Person], everybody: list[Person]
) -> list[dict[str, str]]:
  """Questions about the attributes of people's friends, in known wordings."""
  by_name = {person.name: person for person in everybody}
  made = []
  for person in people:
    friend = by_name[person.values["friend"]]
    of = f"the best friend of {person.name}"
    for attribute in (*KINDS["closed"], *KINDS["open"]):
      wording = wordings()[attribute, "questions"][0]
      made.append(
        _question(wording.format(n=of), friend.values[attribute], attribute)
      )
  return made


def write(facts: Facts, seed: int) -> None:
  """Writes the files of all people into the folder.

  statements.jsonl, questions.jsonl: about all people, for the memory.
  strangers.jsonl: questions about others, answered by "unknown", likewise.
  composed.jsonl: D_C, questions about the people held in.
  held_in.*.jsonl, held_out.*.jsonl: tests in known wordings, for * of KINDS.
  new_wordings.*.jsonl: of the people held out, in wordings that no training
    file has; two_hop.*.jsonl: about the friends of the people held out.
  """
  people, count = make_people(facts, seed), num_held_in(facts)
  held_in, held_out = people[:count], people[count:]
  made = {
    "statements": statements(people),
    "questions": questions(people),
    "strangers": questions(make_strangers(facts, seed, people)),
    "composed": questions(held_in),
  }
  for kind, attributes in KINDS.items():
    made[f"held_in.{kind}"] = questions(held_in, attributes)
    made[f"held_out.{kind}"] = questions(held_out, attributes)
    made[f"new_wordings.{kind}"] = questions(held_out, attributes, "new")
    if kind == "friend":
      continue
    hops = two_hops(held_out, people)
    made[f"two_hop.{kind}"] = [q for q in hops if q["attribute"] in attributes]
  rng = np.random.default_rng((seed, 2 * facts.memory + 1))
  for name, records in made.items():
    if "." in name:
      chosen = rng.permutation(len(records))[: facts.tested]
      records = [records[i] for i in chosen]
    files.write_json_lines(Path(facts.folder, f"{name}.jsonl"), records)


def _question(question: str, answer: str, attribute: str) -> dict[str, str]:
  prompt = f"Question: {question}\nAnswer:"
  return {"prompt": prompt, "completion": f" {answer}", "attribute": attribute}


def _dealt(
  rng: np.random.Generator, values: Sequence[str], facts: Facts
) -> list[str]:
  """Deals values to all people, each as often among those of D_C."""
  count = num_held_in(facts)
  sizes = (count, facts.people - count)
  hands = [rng.permutation(np.resize(values, size)) for size in sizes]
  return [str(value) for value in np.concatenate(hands)]


def _names(rng: np.random.Generator, count: int, syllables: int) -> list[str]:
  """Draws different names; those of more syllables are longer."""
  names: dict[str, None] = {}
  while len(names) < count:
    parts = [_ONSETS, _VOWELS] * syllables + [_CODAS]
    name = "".join(rng.choice(part.split()) for part in parts)
    names[name.capitalize()] = None
  return list(names)
