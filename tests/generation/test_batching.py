"""Small compositions of models with different tokenizers."""

from __future__ import annotations

import random

import helpers
import jax
import numpy as np
import pytest
import real_tokenizers

import calm_jax
from calm_jax.composition import forward
from calm_jax.composition.connections import Composition, connect
from calm_jax.composition.visibility import visible_counts
from calm_jax.core.errors import InputError
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import TextExample
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel
from calm_jax.text.alignment import AlignedReader, ChunkEncoder

TEXTS = [
  ("", "the cat sat on a mat; 日本 ﬁn é  end of it"),
  ("once upon", " a time the cat"),
  ("the mats:  ", "cats and 123"),
  ("", "straightforwardnesses of cats\nand mats"),
  ("a cat ", "."),
]
EXAMPLES = [TextExample(p, c, f"line {i}") for i, (p, c) in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
  return real_tokenizers.toys(tmp_path_factory.mktemp("toys"))


def decoder(tokenizer, seed, **changes) -> LanguageModel:
  config, params = helpers.model(
    seed, vocab_size=tokenizer.vocab_size, num_layers=2, **changes
  )
  return LanguageModel(Composition(config), {"anchor": params}, tokenizer)


@pytest.fixture(scope="module", params=["byte_level", "unigram_nfkc"])
def anchor(request, toys):
  return decoder(toys[request.param], 1)


@pytest.fixture(scope="module")
def augmenting(toys):
  """Two with other tokens, one of them without a BOS."""
  small = {"width": 24, "num_heads": 3, "num_kv_heads": 1}
  return {
    "bpe": decoder(toys["bpe_bytes"], 2, **small),
    "letters": decoder(toys["one_dropped"], 3, **small),
  }


def compose(anchor, augmenting, **options) -> LanguageModel:
  """With random connections, as if it were trained."""
  spec = Composition(
    anchor.spec.anchor,
    tuple(
      (n, connect(m.spec.anchor, anchor.spec.anchor, 2, **options))
      for n, m in augmenting.items()
    ),
  )
  params = {
    "anchor": anchor.params["anchor"],
    "augmenting": {n: m.params["anchor"] for n, m in augmenting.items()},
    "composition": helpers.random_params(helpers.theta_shapes(spec), 5),
  }
  tokenizers = {n: m.tokenizer for n, m in augmenting.items()}
  return LanguageModel(spec, params, anchor.tokenizer, tokenizers=tokenizers)


def encoders(model):
  return {n: ChunkEncoder(t) for n, t in model.tokenizers.items()}


def batches(model, examples=EXAMPLES, **options):
  settings = {"batch_size": 2, "length": 64, "pack": True} | options
  return list(source_of(model, examples, **settings))


def source_of(model, examples=EXAMPLES, **options):
  settings = {"augmenting": encoders(model), "seed": None} | options
  options = RowOptions(tokenizer=model.tokenizer, **settings)
  return pipeline.text_source({"": (examples, 1.0)}, options)


run = jax.jit(forward.forward, static_argnums=1)


def logits_of(model, batch):
  return np.asarray(run(model.params, model.spec, batch)[0])


def test_scrambling_the_future_changes_no_logit(anchor, augmenting):
  model = compose(anchor, augmenting)
  shuffle, compared, changed = random.Random(0), 0, 0
  for example in EXAMPLES:
    text = example.prompt + example.completion
    for at in shuffle.sample(range(1, len(text)), 4 if len(text) > 8 else 1):
      rest = list(text[at:])
      shuffle.shuffle(rest)
      both = [text, text[:at] + "".join(rest)]
      [batch] = batches(
        model,
        [TextExample("", t, "x") for t in both],
        pack=False,
        augmenting_length=96,
      )
      logits = logits_of(model, batch)
      for t, pair in enumerate(batch.anchor.tokens.T):
        if pair[0] != pair[1]:
          changed += (logits[0, t] != logits[1, t]).any()
          break
        np.testing.assert_array_equal(logits[0, t], logits[1, t])
        compared += 1
  assert compared > 60 and changed > 5


def test_packed_rows_equal_each_text_by_itself(toys, augmenting):
  """By itself: laid out from the anchor's ids alone."""
  model = compose(decoder(toys["byte_level"], 1), augmenting)
  [batch] = batches(model, EXAMPLES[1:3], batch_size=1)
  logits = logits_of(model, batch)
  assert batch.anchor.segments.max() == 2
  for number in (1, 2):
    where = batch.anchor.segments[0] == number
    ids = batch.anchor.tokens[:, where]
    given = batch.prompt_ends[0, where][0] - np.argmax(where)
    expected = helpers.composed(
      model.params,
      model.spec,
      *batching.token_batch(model, ids, int(given))[:4],
    )
    np.testing.assert_allclose(
      logits[0, where], expected[0], rtol=1e-4, atol=1e-4
    )


def test_the_batch_by_hand(toys):
  augmenting = {"a": decoder(toys["bpe_bytes"], 2)}
  model = compose(decoder(toys["byte_level"], 1), augmenting)
  [batch] = batches(model, EXAMPLES[1:3], batch_size=1, length=96)
  part, seen_L = batch.augmenting["a"], batch.visible["a"][0]
  encoder, anchor = ChunkEncoder(toys["bpe_bytes"]), toys["byte_level"]
  slot = first = 0
  for number, texts in enumerate(TEXTS[1:3], start=1):
    given, new = anchor.encode_pair(*texts)
    eos = [anchor.eos_id] if anchor.eos_id is not None else []
    reader = AlignedReader(anchor, encoder)
    ids, visible = reader.read(given + new + eos, len(given))
    assert visible[len(given) - 1] > 1  # The prompt's last word is closed.
    where = part.segments[0] == number
    assert np.flatnonzero(where)[0] == first
    assert part.tokens[0, where].tolist() == ids
    assert part.positions[0, where].tolist() == list(range(len(ids)))
    seen = seen_L[slot : slot + len(visible)]
    assert seen.tolist() == [first + count for count in visible]
    slot, first = slot + len(visible), first + len(ids)
  assert part.tokens.shape[1] % 8 == 0
  assert not part.segments[0, first:].any() and not seen_L[slot:].any()


def test_same_tokens_add_nothing(toys):
  anchor = decoder(toys["byte_level"], 1)
  model = calm_jax.compose(anchor, anchor, 1)
  plain = batches(anchor, pack=False)
  for batch, expected in zip(batches(model, pack=False), plain, strict=True):
    assert batch.augmenting == batch.visible == {}
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
  assert batching.token_batch(model, [[1]]).augmenting == {}


def test_rows_hold_no_more_than_both_lengths(anchor, augmenting):
  model = compose(anchor, augmenting)
  examples = EXAMPLES * 4
  made = batches(model, examples, augmenting_length=70)
  longest = batches(model, examples)
  assert len(made) > len(longest)
  for name in augmenting:
    shapes = {batch.augmenting[name].tokens.shape for batch in longest}
    assert len(shapes) == 1
    shapes = {batch.augmenting[name].tokens.shape for batch in made}
    assert shapes == {(2, 70)}
  for total in (made, longest):
    assert sum(batch.anchor.segments.max(1).sum() for batch in total) == 20


def test_long_text_goes_on_in_windows_of_both(anchor, augmenting):
  model = compose(anchor, augmenting)
  text = "the cat sat on a mat; 日本 é  end of it and on. " * 4
  whole = anchor.tokenizer.encode(text)
  for limit, length in ((0, 24), (20, 64)):
    made = batches(
      model,
      [TextExample("", text, "x")],
      length=length,
      augmenting_length=limit,
      pack=False,
    )
    targets = np.concatenate([b.targets[b.weights > 0] for b in made]).tolist()
    targets = [t for t in targets if t != anchor.tokenizer.eos_id]
    assert targets == whole[len(whole) - len(targets) :]
    for batch in made:
      for name in augmenting:
        rows = batch.augmenting[name].segments > 0
        assert not limit or rows.sum(1).max() <= limit
        for row in range(batch.anchor.segments[:, 0].sum()):
          real = batch.anchor.segments[row] > 0
          reader = AlignedReader(anchor.tokenizer, encoders(model)[name])
          ids, counts = reader.read(batch.anchor.tokens[row, real].tolist())
          assert batch.augmenting[name].tokens[row, rows[row]].tolist() == ids
          assert batch.visible[name][row, real].tolist() == counts
        # All that it has read is of use to the window's last token.
        seen = batch.visible[name].max(1)
        assert seen.tolist() == rows.sum(1).tolist()


def test_a_prompt_too_long_for_the_augmenting_model(anchor, augmenting):
  with pytest.raises(InputError, match=r"line 1: .* more than 8 tokens"):
    batches(compose(anchor, augmenting), EXAMPLES[1:2], augmenting_length=8)


def test_an_encoder_shows_the_prompt_only(toys, augmenting):
  anchor = decoder(toys["byte_level"], 1)
  model = compose(anchor, augmenting, visibility="encoder")
  [batch] = batches(model, EXAMPLES[1:3], pack=False, augmenting_length=96)
  before, real = logits_of(model, batch), batch.anchor.segments > 0
  for name in augmenting:
    causal = batch.visible[name]
    shown = np.asarray(visible_counts("encoder", batch, name))
    for row in range(2):
      given = batch.prompt_ends[row, 0]
      limit = causal[row, given - 1]
      assert causal[row].max() > limit > 1
      expected = np.minimum(causal[row], limit)
      assert (shown[row] == expected)[real[row]].all()
      # Other tokens after the prompt, which nobody may see.
      batch.augmenting[name].tokens[row, limit:] = 5
  after = logits_of(model, batch)
  np.testing.assert_array_equal(before[real], after[real])


def test_where_it_looks(toys):
  anchor = decoder(toys["byte_level"], 1)
  model = compose(anchor, {"a": decoder(toys["bpe_bytes"], 2)})
  ids = anchor.tokenizer.encode("the cat sat on")
  look = model.cross_attention(ids, 3)
  L, M = len(look["tokens"]), len(look["augmenting_tokens"])
  assert look["weights"].shape == (2, 4, L, M)
  assert "▁cat" in "".join(look["augmenting_tokens"])
  [visible] = batching.token_batch(model, [ids], 3).visible.values()
  for t, count in enumerate(visible[0]):
    assert not look["weights"][:, :, t, count:].any()


def test_a_model_without_a_tokenizer_cannot_be_aligned(toys):
  anchor = decoder(toys["byte_level"], 1)
  config, params = helpers.model(2)
  with pytest.raises(InputError, match="both models need a tokenizer"):
    calm_jax.compose(
      anchor, LanguageModel(Composition(config), {"anchor": params})
    )


def test_data_names_what_it_was_aligned_with(anchor, augmenting):
  model = compose(anchor, augmenting)

  def fingerprint(**changes):
    settings = {"batch_size": 2, "length": 64, "seed": 0} | changes
    return source_of(model, **settings).fingerprint

  plain = fingerprint(augmenting={})
  assert len({plain, fingerprint(), fingerprint(augmenting_length=90)}) == 3
  assert fingerprint() == fingerprint()


def test_hosts_share_aligned_batches(anchor, augmenting):
  model = compose(anchor, augmenting)
  whole, *parts = (
    source_of(
      model, EXAMPLES * 3, batch_size=4, length=64, seed=0,
      process_index=i, process_count=n,
    )
    for i, n in ((0, 1), (0, 2), (1, 2))
  )  # fmt: skip
  for index in range(3):
    batch = whole[index]
    shares = [part[index] for part in parts]
    both = jax.tree.map(lambda *halves: np.concatenate(halves), *shares)
    jax.tree.map(np.testing.assert_array_equal, both, batch)
