"""The key-value task (§4.1): a dictionary of keys, and expressions over them.

Dimension letters: N expressions, T terms of the longest one.
"""

import dataclasses
import hashlib

import numpy as np

from calm_jax.core.errors import InputError, check_choice

OPERATORS = "+-*"
_PLUS, _MINUS, _TIMES = range(3)
_CONSONANTS = np.array(list("bcdfghjklmnprstvwz"))
_VOWELS = np.array(list("aeiou"))
_PATIENCE = 20  # Rounds without progress after which sampling gives up.


@dataclasses.dataclass(frozen=True, eq=False)
class KeyDictionary:
  """The dictionary D_KV (§4.1): distinct lower-case strings and their values.

  Attributes:
    values: int64 [num_keys], a permutation of 1..num_keys.
    held_in: bool [num_keys], the keys that composition may be trained on.
  """

  keys: tuple[str, ...]
  values: np.ndarray
  held_in: np.ndarray

  @property
  def fingerprint(self) -> str:
    """sha256 of the keys, their values and which are held in."""
    digest = hashlib.sha256(",".join(self.keys).encode())
    digest.update(self.values.tobytes() + self.held_in.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Expressions:
  """N expressions of up to T terms; -1 stands beyond an expression's end.

  Attributes:
    key_ids: int64 [N, T], indices into `KeyDictionary.keys`.
    operators: int64 [N, T-1], indices into `OPERATORS`.
    num_terms: int64 [N].
  """

  key_ids: np.ndarray
  operators: np.ndarray
  num_terms: np.ndarray

  def __len__(self) -> int:
    return len(self.num_terms)

  def __getitem__(self, rows) -> "Expressions":
    """The expressions at a slice, a mask or an array of indices."""
    columns = self.key_ids, self.operators, self.num_terms
    return Expressions(*(column[rows] for column in columns))

  def replace(self, rows: np.ndarray, others: "Expressions") -> None:
    """Puts other expressions in the place of those at some indices."""
    self.key_ids[rows] = others.key_ids
    self.operators[rows] = others.operators
    self.num_terms[rows] = others.num_terms


def make_dictionary(
  num_keys: int, held_in_fraction: float, seed: int
) -> KeyDictionary:
  """Draws a dictionary of pronounceable keys; the same for the same seed."""
  if not 1 <= num_keys <= 1_000_000:
    raise InputError(f"num_keys {num_keys} is not within 1..1000000")
  if not 0 <= held_in_fraction <= 1:
    raise InputError(f"held_in_fraction {held_in_fraction} is not within 0..1")
  rng = np.random.default_rng(seed)
  keys: dict[str, None] = {}
  while len(keys) < num_keys:
    keys.update(dict.fromkeys(_draw_words(rng, 2 * num_keys)))
  values = rng.permutation(num_keys).astype(np.int64) + 1
  held_in = np.zeros(num_keys, bool)
  held_in[rng.permutation(num_keys)[: round(held_in_fraction * num_keys)]] = 1
  return KeyDictionary(tuple(keys)[:num_keys], values, held_in)


def _draw_words(rng: np.random.Generator, count: int) -> list[str]:
  # Consonants and vowels in turn: pronounceable, and never a task's name.
  vowel_first = rng.random((count, 1)) < 0.3
  is_vowel = (np.arange(6) % 2 == 1) ^ vowel_first
  consonants = _CONSONANTS[rng.integers(len(_CONSONANTS), size=(count, 6))]
  vowels = _VOWELS[rng.integers(len(_VOWELS), size=(count, 6))]
  letters = np.where(is_vowel, vowels, consonants)
  pairs = zip(letters, rng.integers(2, 7, size=count), strict=True)
  return ["".join(word[:length]) for word, length in pairs]


def sample_expressions(
  rng: np.random.Generator,
  kv: KeyDictionary,
  n: int,
  *,
  min_terms: int,
  max_terms: int,
  operators: str | tuple[str, ...] = OPERATORS,
  keys: str = "all",
  part: str = "train",
) -> Expressions:
  """Draws `n` expressions D_KV-EXP (§4.1).

  Numbers of terms, operators and keys are uniform. A hash of the expression
  reserves 1/16 of all for evaluation, so the parts are disjoint for any seeds.
  An expression of one term is a line of the dictionary D_KV: the augmenting
  model must see all of them to know its keys, so none is ever reserved.

  Args:
    rng, kv, n: the source of randomness, the dictionary, and how many.
    min_terms, max_terms, operators: of each expression; characters of "+-*".
    keys: "all"; "held_in"; "held_out"; or "mixed", where one held-in and one
      held-out key are at random places and the others are any key.
    part: "train" and "any" repeat expressions; "eval" draws distinct ones.

  Raises:
    InputError: an unknown choice, or not as many expressions exist.
  """
  _check(min_terms, max_terms, operators, keys, part)
  pools = _pools(kv, keys)
  codes = np.array([OPERATORS.index(c) for c in operators])
  if part == "eval":
    return _draw_distinct(rng, n, (min_terms, max_terms), codes, pools)
  num_terms = rng.integers(min_terms, max_terms + 1, size=n)
  drawn = _draw(rng, num_terms, max_terms, codes, pools)
  if part == "any":
    return drawn
  bad = np.flatnonzero(is_eval(drawn))
  for _ in range(10 * _PATIENCE):
    if not len(bad):
      return drawn
    # The number of terms is kept, so that rejection does not skew it.
    again = _draw(rng, num_terms[bad], max_terms, codes, pools)
    drawn.replace(bad, again)
    bad = bad[is_eval(again)]
  raise InputError(
    f"all expressions of {num_terms[bad[0]]} terms over {keys} keys are"
    " reserved for evaluation: use more keys, terms or operators"
  )


def _check(min_terms, max_terms, operators, keys, part) -> None:
  check_choice("part", part, ("train", "eval", "any"))
  terms, found = f"min_terms {min_terms}", f"operators {operators!r}"
  if not 1 <= min_terms <= max_terms:
    problem = f"{terms} and max_terms {max_terms}: expected 1 <= min <= max"
  elif not operators or set(operators) - set(OPERATORS):
    problem = f"{found}: expected some of {OPERATORS!r}"
  elif len(set(operators)) < len(operators):
    problem = f"{found}: one of them is repeated"
  elif part == "eval" and min_terms < 2:
    problem = (
      f"{terms} with part eval: single keys are the dictionary and are never"
      " held back; set min_terms to 2 or more, or part to any"
    )
  elif keys == "mixed" and min_terms < 2:
    problem = f"{terms}: mixed keys need at least 2 terms"
  else:
    return
  raise InputError(problem)


def _pools(kv: KeyDictionary, keys: str) -> tuple[np.ndarray, ...]:
  """Key ids that any place, one place and another place are drawn from."""
  everything = np.arange(len(kv.keys))
  held_in, held_out = everything[kv.held_in], everything[~kv.held_in]
  pools = {"all": (everything,), "held_in": (held_in,), "held_out": (held_out,)}
  pools["mixed"] = (everything, held_in, held_out)
  check_choice("keys", keys, list(pools))
  if not all(len(pool) for pool in pools[keys]):
    raise InputError(
      f"keys {keys!r}: {len(held_in)} keys are held in and {len(held_out)} held"
      " out; change held_in_fraction"
    )
  return pools[keys]


def _draw(rng, num_terms, max_terms, codes, pools) -> Expressions:
  n = len(num_terms)
  places = np.arange(max_terms)
  key_ids = pools[0][rng.integers(len(pools[0]), size=(n, max_terms))]
  if len(pools) > 1:
    first = rng.integers(num_terms)
    # A step of 1..num_terms-1 lands on any other place.
    second = (first + rng.integers(1, num_terms)) % num_terms
    for place, pool in zip((first, second), pools[1:], strict=True):
      key_ids[np.arange(n), place] = pool[rng.integers(len(pool), size=n)]
  operators = codes[rng.integers(len(codes), size=(n, max_terms - 1))]
  key_ids = np.where(places < num_terms[:, None], key_ids, -1)
  operators = np.where(places[1:] < num_terms[:, None], operators, -1)
  return Expressions(key_ids, operators, num_terms)


def _draw_distinct(rng, n, span, codes, pools) -> Expressions:
  """Draws `n` different expressions that are reserved for evaluation."""
  low, high = span
  rows, idle = np.zeros((0, 2 * high), np.int64), 0
  while len(rows) < n and idle < _PATIENCE:
    # 1 in 16 is kept; the floor lets small spaces be exhausted.
    draws = max(1 << 14, 20 * (n - len(rows)))
    num_terms = rng.integers(low, high + 1, size=draws)
    drawn = _draw(rng, num_terms, high, codes, pools)
    drawn = drawn[is_eval(drawn)]
    columns = drawn.key_ids, drawn.operators, drawn.num_terms[:, None]
    joined = np.concatenate([rows, np.concatenate(columns, axis=1)])
    _, first = np.unique(joined, axis=0, return_index=True)
    idle = idle + 1 if len(first) == len(rows) else 0
    rows = joined[np.sort(first)]
  if len(rows) < n:
    raise InputError(
      f"only {len(rows)} expressions of {low} to {high} terms are reserved for"
      f" evaluation, {n} asked for: ask for fewer, or use more keys, terms or"
      " operators"
    )
  return Expressions(rows[:n, :high], rows[:n, high:-1], rows[:n, -1])


def unrelated(
  rng: np.random.Generator, kv: KeyDictionary, expressions: Expressions
) -> Expressions:
  """Replaces every key of the expressions by any key, at random."""
  drawn = rng.integers(len(kv.keys), size=expressions.key_ids.shape)
  return dataclasses.replace(
    expressions, key_ids=np.where(expressions.key_ids < 0, -1, drawn)
  )


def is_eval(expressions: Expressions) -> np.ndarray:
  """bool [N], True for expressions reserved for evaluation."""
  with np.errstate(over="ignore"):
    hash_N = _mix(expressions.num_terms.astype(np.uint64))
    for j in range(expressions.key_ids.shape[1]):
      columns = [expressions.key_ids[:, j]]
      if j:
        columns.append(expressions.operators[:, j - 1])
      for column in columns:
        mixed = _mix(hash_N ^ (column + 1).astype(np.uint64))
        hash_N = np.where(j < expressions.num_terms, mixed, hash_N)
  return (hash_N >> np.uint64(60) == 0) & (expressions.num_terms > 1)


def _mix(x: np.ndarray) -> np.ndarray:
  # The finalizer of SplitMix64: every bit of x moves every bit of the result.
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def evaluate(kv: KeyDictionary, expressions: Expressions) -> np.ndarray:
  """Exact results [N], × before + and −.

  They are int64 where all that is summed fits, else Python integers in an array
  of dtype object (25,000^6 does not fit).
  """
  # An absent term multiplies by 1, which changes nothing.
  present = expressions.key_ids >= 0
  values_NT = np.where(present, kv.values[expressions.key_ids], 1)
  codes = np.where(expressions.operators < 0, _TIMES, expressions.operators)
  all_plus = np.where(codes == _MINUS, _PLUS, codes)
  bounds = _sum_products(values_NT.astype(np.float64), all_plus)
  big = np.flatnonzero(bounds >= 2.0**62)  # Safely within int64.
  with np.errstate(over="ignore"):
    results = _sum_products(values_NT, codes)
  if len(big):
    results = results.astype(object)
    results[big] = _sum_products(values_NT[big].astype(object), codes[big])
  return results


def _sum_products(values_NT: np.ndarray, codes: np.ndarray) -> np.ndarray:
  total = np.zeros_like(values_NT[:, 0])
  product = values_NT[:, 0]
  for j in range(codes.shape[1]):
    value, code = values_NT[:, j + 1], codes[:, j]
    # The sign travels with the first factor of the product that it precedes.
    total = np.where(code == _TIMES, total, total + product)
    product = np.where(
      code == _TIMES, product * value, np.where(code == _MINUS, -value, value)
    )
  return total + product
