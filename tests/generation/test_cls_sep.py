"""An anchor with byte-level tokens beside an m_A that wants [CLS] first.

The Goldfish, one GPT-2 for each language, have such tokenizers; see
configs/ntl.py. These are small models of the same kinds.
"""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import real_tokenizers

import calm_jax
from calm_jax.composition.connections import Composition
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import TextExample
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel
from calm_jax.text.alignment import chunk_encoder

TEXTS = [("once upon", " a time the cat"), ("", "cats and 123 mats é")]
GPT2 = {
  "learned_positions": True, "rope": None, "norm": "layer", "gated_mlp": False,
  "activation": "gelu", "mlp_bias": True, "attention_bias": True,
  "output_bias": True, "tie_embeddings": True, "num_kv_heads": 4,
  "max_length": 48,
}  # fmt: skip


def decoder(tokenizer, seed: int, **changes) -> LanguageModel:
  config, params = helpers.model(
    seed, vocab_size=tokenizer.vocab_size, num_layers=2, **changes
  )
  return LanguageModel(Composition(config), {"anchor": params}, tokenizer)


@pytest.fixture(scope="module")
def goldfish(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizers") / "cls_sep"
  return decoder(real_tokenizers.cls_sep(folder), 2, **GPT2)


@pytest.fixture(scope="module")
def composed(tmp_path_factory, goldfish):
  folder = tmp_path_factory.mktemp("anchor") / "byte_level"
  anchor = decoder(real_tokenizers.byte_level(folder), 1, qk_norm="head")
  model = calm_jax.compose(
    anchor, {"lij": goldfish, "fur": goldfish}, 2, output_init="normal"
  )
  return model


def test_a_text_begins_with_cls_and_ends_at_sep(goldfish):
  tokenizer = goldfish.text()
  cls, sep = (tokenizer.pieces.index(t) for t in ("[CLS]", "[SEP]"))
  assert tokenizer.bos_id == cls and tokenizer.stop_ids == (sep,)
  for prompt, completion in TEXTS:
    given, new = tokenizer.encode_pair(prompt, completion)
    assert given[0] == cls and {cls, sep}.isdisjoint(given[1:] + new)
    assert tokenizer.decode(given + new) == prompt + completion
    spelled = b"".join(tokenizer.spell([*given, *new, sep]))
    assert spelled.decode() == prompt + completion
  assert tokenizer.encode("a mat")[-1] != sep


def test_rows_of_training_give_each_text_one_cls(composed):
  examples = [TextExample(*texts, f"line {i}") for i, texts in enumerate(TEXTS)]
  encoders = {n: chunk_encoder(t) for n, t in composed.tokenizers.items()}
  options = RowOptions(
    tokenizer=composed.text(), batch_size=1, length=96, seed=None,
    augmenting=encoders,
  )  # fmt: skip
  [batch] = pipeline.text_source({"": (examples, 1.0)}, options)
  for name, tokenizer in composed.tokenizers.items():
    rows = batch.augmenting[name]
    for number in (1, 2):
      ids = rows.tokens[rows.segments == number].tolist()
      assert [i for i, t in enumerate(ids) if t == tokenizer.bos_id] == [0]
      assert tokenizer.eos_id not in ids


def test_cached_generation_is_the_forward_pass_token_by_token(composed):
  prompts, steps = [prompt for prompt, _ in TEXTS if prompt] + ["a cat"], 6
  anchor, expected = composed.text(), []
  for prompt in prompts:
    given = anchor.encode_prompt(prompt)
    ids = list(given)
    for _ in range(steps):
      inputs = batching.token_batch(composed, np.array([ids]), len(given))
      logits = helpers.composed(composed.params, composed.spec, *inputs[:4])
      ids.append(int(np.argmax(logits[0, -1])))
      if ids[-1] in anchor.stop_ids:
        break
    new = [i for i in ids[len(given) :] if i not in anchor.stop_ids]
    expected.append(anchor.decode_continuation(given, new))
  assert composed.generate(prompts, steps) == expected
