"""A batch of a fixed number of rows, each of which a text enters and leaves."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from calm_jax.composition import inference
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch
from calm_jax.generation import batching, decode_rows, decode_steps, followers
from calm_jax.generation.batching import Readers
from calm_jax.generation.decode_steps import DecodeState, Tops
from calm_jax.generation.followers import Follower
from calm_jax.generation.sampling import GREEDY, RowSampler
from calm_jax.serving.tickets import NewTokens, TextRequest

TOPS = 20  # the likeliest tokens whose log-probabilities are computed
MOST_STOPS = 16  # stop tokens of a row
_ROOM = 4  # chunks that fit behind all rows after these were moved
_PROMPTS = 8  # that are read together at most
_WORD = 16  # tokens of its own that a model often reads at once, at most
_FREE = np.iinfo(np.int32).max  # where the text of a free row begins

_log_probabilities = jax.jit(
  decode_steps.log_probabilities, static_argnames="tops"
)


class Chunk:
  """New tokens by place, and their log-probabilities if these were asked for.

  Tokens [B, T] are -1 from a stop token on, and in `is_full_B`, where a model's
  length limit has ended the text.
  """

  def __init__(
    self, new_BT: np.ndarray, tops: Tops | None, is_full_B: np.ndarray
  ):
    self.new_BT, self.is_full_B = new_BT, is_full_B
    self.tops = None if tops is None else Tops(*map(np.asarray, tops))

  def read(self, place: int, most: int) -> tuple[NewTokens, str | None]:
    """The new tokens at a place, and why these are the last if they are.

    A stop token ends an answer unless `most` tokens, as many as are wanted,
    come before it.
    """
    ids = [int(token) for token in self.new_BT[place] if token >= 0]
    reason = None
    if len(ids) >= most or self.is_full_B[place]:
      reason = "length"
    elif len(ids) < self.new_BT.shape[1]:
      reason = "stop"
    ids = ids[:most]
    if self.tops is None:
      return NewTokens(ids, [], []), reason
    chosen, ids_TN, values_TN = (
      x[place, : len(ids)].tolist() for x in self.tops
    )
    pairs = zip(ids_TN, values_TN, strict=True)
    likeliest = [list(zip(*pair, strict=True)) for pair in pairs]
    return NewTokens(ids, chosen, likeliest), reason


@dataclasses.dataclass
class Lane:
  """Caches whose rows are all written at one slot, the next.

  `begins_B` are the first slots of the rows' texts. It keeps `room` for what is
  written at once.
  """

  names: tuple[str, ...]  # of the models
  room: int
  begins_B: np.ndarray
  slot: int
  slots: int
  follower: Follower | None = None  # that reads the tokens of an own tokenizer

  def place(self, least: int) -> tuple[int, int] | None:
    """The next slot, `least` or more, and the slots to move to, if need be."""
    if least <= self.slot and self.slot + self.room <= self.slots:
      return None
    slot = max(least, self.slot - int(self.begins_B.min()))
    needed = batching.round_up(slot + _ROOM * self.room)
    # All slots are read, the free ones too.
    fits = needed <= self.slots < 4 * needed
    return slot, self.slots if fits else needed

  def move(self, slot: int, slots: int) -> None:
    self.begins_B[self.begins_B != _FREE] += slot - self.slot
    self.slot, self.slots = slot, slots


class RowBatch:
  """The rows of a batch on the device; none at first."""

  def __init__(self, model: Model, rows: int, chunk: int):
    spec, params = model.prepared
    self._model = dataclasses.replace(model, spec=spec, params=params)
    self._allowed_V = batching.allowed_ids(model)
    self._least = inference.least_rows(params)
    self.rows = max(rows, self._least)
    # A follower reads between two steps.
    self._chunk = 1 if followers.names(model) else chunk
    self._advance = decode_steps.advance_on(jax.default_backend(), params)
    self.clear()

  def clear(self) -> None:
    """Forgets all rows; the next ones begin with short caches."""
    self._state: DecodeState | None = None
    self._lanes: list[Lane] = []
    self._newest_B = np.full(self.rows, -1)  # -1 where no text is continued

  def warm_up(self) -> None:
    """Compiles the programs for short texts, while all rows are free."""
    text = self._model.text().encode_prompt("a")
    for count in {1, min(2, self.rows)}:
      requests = [TextRequest(text, 1)] * count
      for _ in self.enter(requests, list(range(count))):
        self.advance(False)
    self.clear()

  def leave(self, rows: Sequence[int]) -> None:
    """Frees rows."""
    if self._state is None:
      return
    is_left_B = np.zeros(self.rows, bool)
    is_left_B[list(rows)] = True
    self._state = self._state._replace(done_B=self._state.done_B | is_left_B)
    self._newest_B[is_left_B] = -1
    for lane in self._lanes:
      lane.begins_B[is_left_B] = _FREE

  def enter(
    self, requests: list[TextRequest], rows: list[int]
  ) -> Iterator[tuple[dict[int, int], Chunk]]:
    """Reads prompts into free rows.

    Yields by groups (the place of each row in the chunk, a chunk of the first
    token of each).
    """
    ids = [request.ids for request in requests]
    # Few sizes: each is a program to compile.
    most = max(self._least, min(_PROMPTS, self.rows))
    least = most if len(ids) > 1 else self._least
    groups = batching.batches(
      self._model, ids, list(map(len, ids)), most, least
    )
    for chosen, batch, readers in groups:
      entering = [requests[i] for i in chosen]
      taken = [rows[i] for i in chosen]
      new = self._read(batch, entering)
      # It waits for the device, so that no row has changed if memory ends.
      first_R = np.where(new.done_B, -1, new.token_B)
      self._make_room(batch)
      R = len(first_R)
      rows_R = np.full(R, self.rows, np.int32)
      rows_R[: len(taken)] = taken
      ends = {
        n: np.int32(lane.slot) for lane in self._lanes for n in lane.names
      }
      tops = None
      if any(request.tops for request in entering):
        tops = _log_probabilities(new.logits_BV, new.token_B, tops=TOPS)
      self._state = decode_rows.enter(self._state, new, rows_R, ends)
      self._newest_B[taken] = first_R[: len(taken)]
      self._begin(taken, batch, readers)
      nowhere_R = np.zeros(R, bool)
      chunk = Chunk(first_R[:, None], tops, nowhere_R)
      yield {row: i for i, row in enumerate(taken)}, chunk

  def advance(self, is_told: bool) -> Chunk:
    """Makes a chunk of tokens in all rows, whose place is their number."""
    is_full_B = self._follow()
    self._make_room()
    self._state, new_BT, *told = self._advance(
      self._model.params,
      self._model.spec,
      self._state,
      np.int32(self._chunk),
      sampler=GREEDY,
      size=self._chunk,
      tops=TOPS if is_told else 0,
    )
    self._lanes[0].slot = int(self._state.slot)
    new_BT = np.asarray(new_BT)
    self._newest_B = new_BT[:, -1].copy()
    return Chunk(new_BT, told[0] if told else None, is_full_B)

  def _read(self, batch: Batch, requests: list[TextRequest]) -> DecodeState:
    """Reads the prompts of a batch, whose spare rows come last."""
    R = len(batch.anchor.tokens)
    spare = R - len(requests)
    seeds_R = [request.seed for request in requests] + [0] * spare
    new_R = [request.max_new_tokens for request in requests] + [0] * spare
    stops_RS = np.full((R, MOST_STOPS), -1, np.int32)
    for stops_S, request in zip(stops_RS, requests, strict=False):
      stops_S[: len(request.stop_ids)] = request.stop_ids
    samplers = [request.sampler for request in requests] + [GREEDY] * spare
    names = ["anchor", *(name for name, _ in self._model.spec.augmenting)]
    slots = ((name, _length(batch, name)) for name in names)
    return decode_steps.start(
      self._model.params,
      self._model.spec,
      batch,
      np.array(seeds_R, np.uint32),
      stops_RS,
      np.array(new_R, np.int32),
      self._allowed_V,
      RowSampler.of(samplers),
      slots=tuple(slots),
      sampler=GREEDY,
    )

  def _make_room(self, batch: Batch | None = None) -> None:
    """Moves all rows, if need be, so that a chunk fits behind them, and the
    prompts of a batch before."""
    if self._state is None:
      assert batch is not None
      self._lanes = self._empty_lanes(batch)
      slots = {name: lane.slots for lane in self._lanes for name in lane.names}
      self._state = decode_rows.empty(
        self._model.params,
        self._model.spec,
        self.rows,
        self._lanes[0].slot,
        slots,
        self._model.tokenizers.keys(),
        MOST_STOPS,
        self._allowed_V,
      )
    for lane in self._lanes:
      least = 0 if batch is None else _length(batch, lane.names[0])
      if (place := lane.place(least)) is None:
        continue
      slot, slots = place
      cache = decode_rows.move(
        self._state.cache,
        np.int32(slot - lane.slot),
        np.int32(slot),
        names=lane.names,
        slots=slots,
      )
      jax.block_until_ready(cache)
      lane.move(slot, slots)
      newest: Any = np.int32(self._lanes[0].slot)
      self._state = self._state._replace(cache=cache, slot=newest)

  def _empty_lanes(self, batch: Batch) -> list[Lane]:
    """One lane for all that read the anchor's tokens, and one for each other.

    The prompts of a batch fit into them.
    """
    own = self._model.tokenizers
    joined = dict(self._model.spec.augmenting)
    shared = "anchor", *(name for name in joined if name not in own)
    rooms = {shared: self._chunk}
    following = followers.names(self._model)
    rooms |= {(name,): _WORD * (name in following) for name in own}
    lanes = []
    for names, room in rooms.items():
      slot = _length(batch, names[0])
      slots = batching.round_up(slot + _ROOM * room)
      free_B = np.full(self.rows, _FREE)
      lane = Lane(names, room, free_B, slot, slots)
      if names[0] in following:
        nobody: list = [None] * self.rows
        read_B = np.zeros(self.rows, int)
        [name] = names
        lane.follower = Follower(name, joined[name], nobody, read_B, 0, 0)
      lanes.append(lane)
    return lanes

  def _begin(self, rows: list[int], batch: Batch, readers: Readers) -> None:
    """Notes where the texts that have entered rows begin, and their readers."""
    for lane in self._lanes:
      name = lane.names[0]
      read = batch.augmenting.get(name, batch.anchor)
      for i, row in enumerate(rows):
        count = int(read.segments[i].sum())
        lane.begins_B[row] = lane.slot - count
        if lane.follower is not None:
          lane.follower.lengths_B[row] = count
          lane.follower.readers[row] = readers[name][i]

  def _follow(self) -> np.ndarray:
    """Followers read what the newest tokens complete; the rows [B] that end."""
    assert self._state is not None
    is_full_B = np.zeros(self.rows, bool)
    cache = self._state.cache
    for lane in self._lanes:
      if lane.follower is None:
        continue
      lane.follower.slot, lane.follower.slots = lane.slot, lane.slots
      cache, is_over_B = lane.follower.follow(
        self._model, cache, self._newest_B, None
      )
      lane.slot, lane.slots = lane.follower.slot, lane.follower.slots
      is_full_B |= is_over_B
    self._state = self._state._replace(cache=cache)
    if is_full_B.any():
      done_B = self._state.done_B | is_full_B
      self._state = self._state._replace(done_B=done_B)
    return is_full_B


def _length(batch: Batch, name: str) -> int:
  """Tokens of the rows that a model reads of a batch."""
  return batch.augmenting.get(name, batch.anchor).tokens.shape[1]
