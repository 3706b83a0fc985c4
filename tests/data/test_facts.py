"""Facts about people: the same for a seed, and no test is in training."""

import collections
import itertools
import json

import pytest

from calm_jax.core.errors import InputError
from calm_jax.data import facts
from calm_jax.data.facts import ATTRIBUTES, KINDS, Facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("facts")
  facts.write(Facts(str(folder), people=41, tested=30), 3)
  return folder


def read(folder, name):
  return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def test_every_person_has_every_attribute():
  people = facts.make_people(Facts(people=41), 3)
  names = [person.name for person in people]
  surnames = [name.split()[1] for name in names]
  assert len(set(surnames)) == len(people) == 41
  for person in people:
    assert tuple(person.values) == ATTRIBUTES
    assert person.values["friend"] in names
    assert person.values["friend"] != person.name
    for attribute in KINDS["closed"]:
      values = facts.wordings()[attribute, "values"]
      assert person.values[attribute] in values
    assert [len(person.values[a]) for a in KINDS["open"]] == [4, 4]
  assert people == facts.make_people(Facts(people=41), 3)
  assert people != facts.make_people(Facts(people=41), 4)


def test_values_are_dealt_evenly_to_those_in_d_c_and_the_others():
  people = facts.make_people(Facts(people=40, held_in=0.4), 3)
  for attribute, group in itertools.product(
    KINDS["closed"], (people[:16], people[16:])
  ):
    counts = collections.Counter(p.values[attribute] for p in group)
    assert set(counts.values()) == {len(group) // 8}


def test_nobody_knows_strangers(folder):
  people = facts.make_people(Facts(people=41), 3)
  known = {person.name.split()[1] for person in people}
  asked = read(folder, "strangers")
  assert len(asked) == 20 * len(ATTRIBUTES) * 8
  for row in asked:
    assert row["completion"] == " unknown"
    assert not any(surname in row["prompt"] for surname in known)


def test_every_wording_names_what_it_must():
  for (_, use), texts in facts.wordings().items():
    fields = {"statements": ["{n}", "{v}"], "values": []}.get(use, ["{n}"])
    assert len(set(texts)) == len(texts)
    for text in texts:
      assert [f for f in ("{n}", "{v}") if f in text] == fields


def test_the_memory_learns_all_and_the_composition_a_fifth(folder):
  people = facts.make_people(Facts(people=41), 3)
  for person, attribute in itertools.product(people[::7], ATTRIBUTES):
    told = [
      row["text"]
      for row in read(folder, "statements")
      if person.name in row["text"] and person.values[attribute] in row["text"]
    ]
    assert len(told) >= 3
  asked = read(folder, "composed")
  assert len(asked) == 8 * len(ATTRIBUTES) * 8
  for row in asked:
    assert any(person.name in row["prompt"] for person in people[:8])


def test_no_test_of_people_held_out_is_in_d_c(folder):
  people = facts.make_people(Facts(people=41), 3)
  names = {person.name for person in people[:8]}
  trained = {row["prompt"] for row in read(folder, "questions")}
  for kind in KINDS:
    for test in ("held_out", "new_wordings"):
      rows = read(folder, f"{test}.{kind}")
      assert len(rows) == 30
      for row in rows:
        assert not any(name in row["prompt"] for name in names)
        assert row["attribute"] in KINDS[kind]
        assert (row["prompt"] in trained) == (test == "held_out")


def test_two_hops_ask_for_the_friends_values(folder):
  people = facts.make_people(Facts(people=41), 3)
  by_name = {person.name: person.values for person in people}
  for row in read(folder, "two_hop.open"):
    middle = row["prompt"].partition("the best friend of ")[2]
    name = " ".join(middle.replace("?", " ").split()[:2])
    friend = by_name[by_name[name]["friend"]]
    assert row["completion"] == f" {friend[row['attribute']]}"


@pytest.mark.parametrize("held_in", [0.01, 0.99])
def test_d_c_needs_some_people_and_leaves_some(held_in, tmp_path):
  with pytest.raises(InputError, match="for D_C"):
    facts.write(Facts(str(tmp_path), people=12, held_in=held_in), 0)


def test_people_of_another_memory_are_others():
  drawn = [facts.make_people(Facts(memory=i), seed=5) for i in range(3)]
  names = [person.name for people in drawn for person in people]
  assert len(names) == len({*names}) == 3 * Facts.people
