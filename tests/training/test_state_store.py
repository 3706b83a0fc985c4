"""States on disk: what is read is what was added, or an error by name."""

from __future__ import annotations

import fcntl
import threading

import helpers
import numpy as np
import pytest

from calm_jax.core.errors import InputError, StorageError
from calm_jax.data import packing
from calm_jax.training.state_store import StateStore, locked, spans

FIELDS = {"2/value": ("int8", 24), "2/scale": ("bfloat16", 3)}
ROWS, LENGTH = 4, 16


def batch(seed: int, longest=LENGTH) -> list[np.ndarray]:
  """Tokens, segments and positions of random rows, the last one empty."""
  random = np.random.default_rng(seed)
  lengths = random.integers(1, longest // 2 + 1, 2 * (ROWS - 1))
  rows = np.repeat(np.arange(ROWS - 1), 2)
  made = packing.assemble(
    random.integers(1, 1000, lengths.sum()),
    lengths,
    np.ones_like(lengths),
    rows,
    packing.row_offsets(lengths, rows),
    batch_size=ROWS,
    length=LENGTH,
  )
  return [made[name] for name in ("tokens", "segments", "positions")]


def values(tokens, segments, positions) -> dict[str, np.ndarray]:
  """What a model might say: of a token and its position alone."""
  del segments
  base = (7 * tokens + positions)[..., None]
  return {
    "2/value": (base + np.arange(24)).astype(np.int8),
    "2/scale": (base + np.arange(3)).astype("bfloat16"),
  }


def open_store(folder, **changes) -> StateStore:
  return StateStore(
    folder, FIELDS, {"model": "abc"}, **{"shard_bytes": 1000} | changes
  )


@pytest.fixture
def filled(tmp_path) -> StateStore:
  """Ten batches, in several files."""
  store = open_store(tmp_path)
  for seed in range(10):
    store.add(spans(*batch(seed)), values(*batch(seed)))
  store.flush()
  assert len(list(tmp_path.glob("*.states"))) > 4
  return store


def assert_reads(store: StateStore, seeds):
  for seed in seeds:
    found, want = store.rows(*batch(seed)), values(*batch(seed))
    assert found.keys() == want.keys()
    for name, array in want.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name], array)


def test_spans_cover_the_slots_of_a_batch():
  tokens, segments, positions = batch(3)
  found = spans(tokens, segments, positions)
  assert [s.start for s in found[1:]] == [s.stop for s in found[:-1]]
  assert (found[0].start, found[-1].stop) == (0, tokens.size)
  real = [s for s in found if segments.flat[s.start]]
  assert len(real) == 2 * (ROWS - 1)
  assert all(s.length == s.stop - s.start for s in real)
  # Of padding there is one state only, that of a token by itself.
  assert {s.length for s in found if s not in real} == {1}
  assert len({s.key for s in found if s not in real}) == 1


def test_a_key_is_of_the_tokens_and_of_nothing_else():
  tokens, segments, positions = batch(3)
  keys = [s.key for s in spans(tokens, segments, positions)]
  last = [s.key for s in spans(tokens[2:3], segments[2:3], positions[2:3])]
  assert set(last) <= {*keys}
  other = tokens.copy()
  other[0, 0] += 1
  assert spans(other, segments, positions)[0].key not in keys
  assert len({*keys}) == len([s for s in keys if keys.count(s) == 1]) + 1


@pytest.mark.parametrize("again", [False, True])
def test_what_was_added_is_read(filled, again):
  store = open_store(filled.folder) if again else filled
  assert_reads(store, range(9, -1, -1))
  # In other rows too, and beside others.
  tokens, segments, positions = (a[::-1] for a in batch(4))
  for name, array in values(tokens, segments, positions).items():
    found = store.rows(tokens, segments, positions)[name]
    np.testing.assert_array_equal(found, array)


def test_nothing_is_added_twice(filled):
  before = {p: p.stat().st_size for p in filled.folder.iterdir()}
  filled.add(spans(*batch(2)), values(*batch(2)))
  filled.flush()
  assert {p: p.stat().st_size for p in filled.folder.iterdir()} == before


def test_what_is_not_flushed_is_not_there_for_the_next(tmp_path):
  store = open_store(tmp_path, shard_bytes=1 << 20)
  found = spans(*batch(0))
  store.add(found, values(*batch(0)))
  assert not any(s.key in open_store(tmp_path) for s in found)
  store.flush()
  assert all(s.key in open_store(tmp_path) for s in found)


def test_a_process_that_does_not_write_reads_what_the_first_wrote(tmp_path):
  stores = [open_store(tmp_path), open_store(tmp_path, writes=False)]
  for seed in range(6):
    for store in stores:
      store.add(spans(*batch(seed)), values(*batch(seed)))
  files = {*tmp_path.iterdir()}
  stores[1].flush()
  assert {*tmp_path.iterdir()} == files
  stores[0].flush()
  assert_reads(stores[1], range(6))


def test_what_a_killed_process_left_is_ignored_and_swept(filled):
  # Records without an index, and a file that was being written.
  (filled.folder / "00001.index").unlink()
  half = filled.folder / "00077.states.tmp"
  half.write_bytes(b"half")
  store = open_store(filled.folder)
  assert not half.exists()
  lost = [s for i in range(10) for s in spans(*batch(i)) if s.key not in store]
  assert lost
  for seed in range(10):
    store.add(spans(*batch(seed)), values(*batch(seed)))
  store.flush()
  assert_reads(open_store(filled.folder), range(10))


@pytest.mark.parametrize("kind", ["states", "index"])
@pytest.mark.parametrize(
  "damage", [helpers.truncate, helpers.flip, helpers.empty]
)
def test_a_damaged_file_is_named(filled, kind, damage):
  path = filled.folder / f"00002.{kind}"
  damage(path)
  with pytest.raises(InputError, match=f"00002.{kind} is missing or not"):
    assert_reads(open_store(filled.folder), range(10))
  # As the message says: what is left is used, and the rest is made again.
  for kind in ("states", "index"):
    (filled.folder / f"00002.{kind}").unlink()
  store = open_store(filled.folder)
  lost = [i for i in range(10) if any(
    s.key not in store for s in spans(*batch(i))
  )]  # fmt: skip
  assert 0 < len(lost) < 10
  for seed in lost:
    store.add(spans(*batch(seed)), values(*batch(seed)))
  store.flush()
  assert_reads(open_store(filled.folder), range(10))


def test_missing_records_are_named(filled):
  (filled.folder / "00000.states").unlink()
  with pytest.raises(InputError, match=r"00000\.states is missing"):
    open_store(filled.folder)


def test_states_of_something_else_are_refused(filled):
  with pytest.raises(InputError, match="model: was abc, is abd") as caught:
    StateStore(filled.folder, FIELDS, {"model": "abd"})
  assert len(str(caught.value).splitlines()) == 3
  wider = FIELDS | {"3/value": ("int8", 24)}
  with pytest.raises(InputError, match="fields: was"):
    StateStore(filled.folder, wider, {"model": "abc"})
  (filled.folder / "store.json").write_text("{")
  with pytest.raises(InputError, match=r"store\.json is damaged"):
    open_store(filled.folder)


def test_more_than_there_is_room_for(filled):
  with pytest.raises(InputError, match="are free; make room"):
    filled.check_space(1 << 60)


def test_a_file_that_cannot_be_written(filled):
  (filled.folder / f"{filled._shard:05}.states.tmp").mkdir()
  filled.add(spans(*batch(99)), values(*batch(99)))
  with pytest.raises(StorageError, match="could not be written"):
    filled.flush()


def test_a_second_run_waits(tmp_path, capsys):
  with locked(tmp_path / "kv"):
    done = threading.Event()

    def second():
      with locked(tmp_path / "kv"):
        done.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not done.wait(0.2)
  assert done.wait(10)
  waiting.join()
  assert "waiting for the run that adds to" in capsys.readouterr().out
  with (tmp_path / "kv" / "lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
