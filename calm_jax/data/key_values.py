"""The key-value task (§4.1): a dictionary of keys, and expressions over them.

N expressions of up to T terms are one array `expressions_NW`, int64 with 2T-1
columns: an index into `KeyDictionary.keys`, one into `OPERATORS`, the next
key, and so on; -1 stands beyond an expression's end.
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


@dataclasses.dataclass(frozen=True)
class ExpressionOptions:
  """The expressions D_KV-EXP (§4.1) that are drawn.

  A hash of the expression reserves 1/16 of all for evaluation, so the parts
  are disjoint for any seeds. An expression of one term is a line of the
  dictionary D_KV: the augmenting model must see all of them to know its keys,
  so none is ever reserved.

  Attributes:
    operators: characters of "+-*".
    keys: "all"; "held_in"; "held_out"; or "mixed", where one held-in and one
      held-out key are at random places and the others are any key.
    part: "train" and "any" repeat expressions; "eval" draws distinct ones.
    max_products: how many × an expression may hold; + and − take the places of
      others. None for any number.
    levelling: how many times as often as others a key is drawn whose value has
      a digit less, from all keys; 10 draws all numbers of digits equally often.
  """

  min_terms: int
  max_terms: int
  operators: str = OPERATORS
  keys: str = "all"
  part: str = "train"
  max_products: int | None = None
  levelling: int = 1

  def __post_init__(self):
    check_choice("part", self.part, ("train", "eval", "any"))
    least, operators = self.min_terms, self.operators
    terms, found = f"min_terms {least}", f"operators {operators!r}"
    if not 1 <= least <= self.max_terms:
      problem = (
        f"{terms} and max_terms {self.max_terms}: expected 1 <= min <= max"
      )
    elif not operators or set(operators) - set(OPERATORS):
      problem = f"{found}: expected some of {OPERATORS!r}"
    elif len(set(operators)) < len(operators):
      problem = f"{found}: one of them is repeated"
    elif self.part == "eval" and least < 2:
      problem = (
        f"{terms} with part eval: single keys are the dictionary and are never"
        " held back; set min_terms to 2 or more, or part to any"
      )
    elif self.max_products is not None and operators == "*":
      problem = f"max_products {self.max_products} with no operator but *"
    elif self.keys == "mixed" and least < 2:
      problem = f"{terms}: mixed keys need at least 2 terms"
    else:
      return
    raise InputError(problem)


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
  options: ExpressionOptions,
) -> np.ndarray:
  """Draws `n` expressions, uniform in numbers of terms, operators and keys.

  InputError is raised if there are no such keys or too few expressions.
  """
  if options.part == "eval":
    return _draw_reserved(rng, kv, n, options)
  num_terms_N = _draw_num_terms(rng, n, options)
  drawn_NW = _draw(rng, kv, num_terms_N, options)
  if options.part == "any":
    return drawn_NW
  bad = np.flatnonzero(is_eval(drawn_NW))
  for _ in range(10 * _PATIENCE):
    if not len(bad):
      return drawn_NW
    # The number of terms is kept, so that rejection does not skew it.
    drawn_NW[bad] = _draw(rng, kv, num_terms_N[bad], options)
    bad = bad[is_eval(drawn_NW[bad])]
  raise InputError(
    f"all expressions of {num_terms_N[bad[0]]} terms over {options.keys} keys"
    " are reserved for evaluation: use more keys, terms or operators"
  )


def _draw_reserved(rng, kv, n, options) -> np.ndarray:
  """Draws `n` different expressions that are reserved for evaluation."""
  drawn_NW, idle = np.zeros((0, 2 * options.max_terms - 1), np.int64), 0
  while len(drawn_NW) < n and idle < _PATIENCE:
    # 1 in 16 is kept; the floor lets small spaces be exhausted.
    count = max(1 << 14, 20 * (n - len(drawn_NW)))
    new_NW = _draw(rng, kv, _draw_num_terms(rng, count, options), options)
    joined_NW = np.concatenate([drawn_NW, new_NW[is_eval(new_NW)]])
    _, first = np.unique(joined_NW, axis=0, return_index=True)
    idle = idle + 1 if len(first) == len(drawn_NW) else 0
    drawn_NW = joined_NW[np.sort(first)]
  if len(drawn_NW) < n:
    raise InputError(
      f"only {len(drawn_NW)} expressions of {options.min_terms} to"
      f" {options.max_terms} terms are reserved for evaluation, {n} asked for:"
      " ask for fewer, or use more keys, terms or operators"
    )
  return drawn_NW[:n]


def _draw_num_terms(rng, n: int, options: ExpressionOptions) -> np.ndarray:
  return rng.integers(options.min_terms, options.max_terms + 1, size=n)


def _draw(rng, kv, num_terms_N, options) -> np.ndarray:
  """Draws an expression of each of these numbers of terms."""
  n, terms = len(num_terms_N), options.max_terms
  any_place, *chosen_places = _pools(kv, options)
  keys_NT = any_place[rng.integers(len(any_place), size=(n, terms))]
  if chosen_places:
    first = rng.integers(num_terms_N)
    # A step of 1..num_terms-1 lands on any other place.
    second = (first + rng.integers(1, num_terms_N)) % num_terms_N
    for place, pool in zip((first, second), chosen_places, strict=True):
      keys_NT[np.arange(n), place] = pool[rng.integers(len(pool), size=n)]
  codes = np.array([OPERATORS.index(c) for c in options.operators])
  drawn_NW = np.empty((n, 2 * terms - 1), np.int64)
  drawn_NW[:, ::2] = keys_NT
  drawn_NW[:, 1::2] = codes[rng.integers(len(codes), size=(n, terms - 1))]
  drawn_NW[np.arange(2 * terms - 1) > 2 * num_terms_N[:, None] - 2] = -1
  if options.max_products is not None:
    _limit_products(rng, drawn_NW[:, 1::2], options)
  return drawn_NW


def _limit_products(rng, codes: np.ndarray, options) -> None:
  """Draws other operators, in place, for products beyond max_products."""
  is_product = codes == _TIMES
  # Products that stay come first in an order that is drawn.
  order = np.where(is_product, rng.random(codes.shape), 1).argsort(axis=1)
  is_beyond = is_product & (order.argsort(axis=1) >= options.max_products)
  others = [OPERATORS.index(c) for c in options.operators if c != "*"]
  codes[is_beyond] = rng.choice(others, size=is_beyond.sum())


def _pools(
  kv: KeyDictionary, options: ExpressionOptions
) -> tuple[np.ndarray, ...]:
  """Key ids that any place, one place and another place are drawn from."""
  keys, everything = options.keys, np.arange(len(kv.keys))
  if options.levelling > 1:
    digits = np.char.str_len(kv.values.astype(str))
    counts = options.levelling ** (digits.max() - digits)
    everything = np.repeat(everything, counts)
  held_in, held_out = np.flatnonzero(kv.held_in), np.flatnonzero(~kv.held_in)
  pools: dict[str, tuple] = {"all": (everything,)}
  pools |= {"held_in": (held_in,), "held_out": (held_out,)}
  pools["mixed"] = (everything, held_in, held_out)
  check_choice("keys", keys, list(pools))
  if not all(len(pool) for pool in pools[keys]):
    raise InputError(
      f"keys {keys!r}: {len(held_in)} keys are held in and {len(held_out)} held"
      " out; change held_in_fraction"
    )
  return pools[keys]


def num_terms(expressions_NW: np.ndarray) -> np.ndarray:
  """The number of keys in each expression, int64 [N]."""
  return (expressions_NW[:, ::2] >= 0).sum(axis=1)


def num_products(expressions_NW: np.ndarray) -> np.ndarray:
  """The number of × in each expression, int64 [N]."""
  return (expressions_NW[:, 1::2] == _TIMES).sum(axis=1)


def is_eval(expressions_NW: np.ndarray) -> np.ndarray:
  """bool [N], True for expressions reserved for evaluation."""
  columns_WN = np.ascontiguousarray(expressions_NW.T)  # Quicker.
  num_terms_N = (columns_WN[::2] >= 0).sum(axis=0)
  with np.errstate(over="ignore"):
    hash_N = _mix(num_terms_N.astype(np.uint64))
    for j in range(0, len(columns_WN), 2):
      # Each key goes before the operator in front of it.
      for column_N in columns_WN[max(j - 1, 0) : j + 1][::-1]:
        mixed_N = _mix(hash_N ^ (column_N + 1).astype(np.uint64))
        hash_N = np.where(column_N < 0, hash_N, mixed_N)
  return (hash_N >> np.uint64(60) == 0) & (num_terms_N > 1)


def _mix(x: np.ndarray) -> np.ndarray:
  # The finalizer of SplitMix64: every bit of x moves every bit of the result.
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def evaluate(kv: KeyDictionary, expressions_NW: np.ndarray) -> np.ndarray:
  """Exact results [N], × before + and −, of the dtype of `reductions`."""
  return reductions(kv, expressions_NW)[-1][0][:, 0]


def reductions(
  kv: KeyDictionary, expressions_NW: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Carries out one operation of each expression after another.

  Products come first, from the left, then sums and differences, from the left.
  After the i-th operation, counted from 1, there are numbers [N, T-i], of which
  only the first may be negative, and between them operators [N, T-i-1], as
  indices into `OPERATORS`: -1 from the expression's end on. Expressions that
  are reduced to one number stay so; single keys count as reduced once.

  Numbers are int64 where all of them fit, else Python integers in arrays of
  dtype object (25,000^6 does not fit).
  """
  keys_NT, codes = expressions_NW[:, ::2], expressions_NW[:, 1::2]
  values_NT = np.where(keys_NT < 0, 1, kv.values[keys_NT])
  # With + for −, numbers only grow, and floats do not overflow.
  all_plus = np.where(codes == _MINUS, _PLUS, codes)
  bounds_N = _reduce_all(values_NT.astype(np.float64), all_plus)[-1][0][:, 0]
  if bounds_N.max(initial=0) >= 2.0**62:  # Safely within int64.
    values_NT = values_NT.astype(object)
  return _reduce_all(values_NT, codes)


def _reduce_all(numbers_NT, codes) -> list[tuple[np.ndarray, np.ndarray]]:
  states = [(numbers_NT, codes)]
  while states[-1][1].shape[1]:
    states.append(_reduce(*states[-1]))
  return states[1:] or states


def _reduce(numbers_NT, codes) -> tuple[np.ndarray, np.ndarray]:
  """Carries out the first product of each row, or else its first operation."""
  at_N1 = (codes == _TIMES).argmax(axis=1)[:, None]
  code_N1 = np.take_along_axis(codes, at_N1, axis=1)
  left_N1, right_N1 = (
    np.take_along_axis(numbers_NT, at_N1 + i, axis=1) for i in (0, 1)
  )
  results_N1 = np.select(
    [code_N1 == _PLUS, code_N1 == _MINUS, code_N1 == _TIMES],
    [left_N1 + right_N1, left_N1 - right_N1, left_N1 * right_N1],
    left_N1,
  )
  places = np.arange(codes.shape[1])
  after = places + (places > at_N1)
  reduced_NT = np.take_along_axis(numbers_NT, after, axis=1)
  np.put_along_axis(reduced_NT, at_N1, results_N1, axis=1)
  after = places[:-1] + (places[:-1] >= at_N1)
  return reduced_NT, np.take_along_axis(codes, after, axis=1)
