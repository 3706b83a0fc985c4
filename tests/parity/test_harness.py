"""The adapter against lm-evaluation-harness's own `hf` model."""

from __future__ import annotations

import os
import pathlib

import chats
import helpers
import numpy as np
import pytest
import spelled
from harness import TASKS, evaluate, evaluate_hf, write

import calm_jax

pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
pytest.importorskip(
  "lm_eval", reason="lm-evaluation-harness is not installed (extra eval)"
)
from calm_jax.lm_eval import CalmJax
from calm_jax.models.hf import export
from calm_jax.text.tokenizer import load_tokenizer

LONG = (
  "Once upon a time, there was a big dog named Max. He liked to run and play "
  "with his friends in the park. One day, Max saw a little bird. "
)
CHOICES = [" play outside.", " was sad", "zzz 42!", " the red ball, and then"]
DOCS = {
  "tiny_choice": [
    {"context": "Lily liked to", "choices": CHOICES, "target": 0},
    {"context": "She said, ", "choices": ['"Hi!"', "no"], "target": 1},
    {"context": "", "choices": ["Once upon a time", "Tom"], "target": 0},
    # More than the 512 tokens that the model reads.
    {"context": 12 * LONG, "choices": CHOICES[:2], "target": 0},
  ],
  "tiny_rolling": [{"text": LONG}, {"text": 12 * LONG + "É 7."}, {"text": "A"}],
  "tiny_generate": [
    {"context": "Once upon a time"},
    {"context": "Tom and Ben went to the"},
    {"context": LONG + "The bird"},
    {"context": 12 * LONG},
  ],
}
OPTIONS = {"until": ["\n\n", " the park"], "max_gen_toks": 32}


@pytest.fixture(scope="module")
def folder():
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED does not name the folder of shared models")
  return pathlib.Path(os.environ["CALM_SHARED"], "models", "stories260k")


def assert_same(ours: dict, theirs: dict):
  assert ours.keys() == theirs.keys() == set(TASKS)
  assert ours["tiny_generate"] == theirs["tiny_generate"]
  pairs = zip(
    *(
      [resp[0] for resps in side["tiny_choice"] for resp in resps]
      for side in (ours, theirs)
    ),
    strict=True,
  )
  for (logprob, greedy), (want, want_greedy) in pairs:
    assert logprob == pytest.approx(want, abs=1e-3)
    assert greedy == want_greedy
  np.testing.assert_allclose(
    np.squeeze(ours["tiny_rolling"]),
    np.squeeze(theirs["tiny_rolling"]),
    atol=1e-3,
  )


def test_the_same_as_hf(folder, tmp_path):
  tasks = write(tmp_path, DOCS, OPTIONS)
  ours = evaluate(tasks, TASKS, CalmJax(str(folder)))
  assert_same(ours, evaluate_hf(tasks, TASKS, folder))
  written = [resps[0][0] for resps in ours["tiny_generate"]]
  assert any(len(text) > 40 for text in written)


def test_a_fresh_composition_is_its_anchor_there_too(folder, tmp_path):
  # The other model has other tokens, and reads at most 256 of them.
  settings = {"max_length": 60, "add_bos_token": True}
  tasks = write(
    tmp_path, {name: rows[:2] for name, rows in DOCS.items()}, OPTIONS
  )
  calm_jax.compose(
    calm_jax.load_model(str(folder)),
    calm_jax.load_model(str(folder.parent / "babyllama")),
  ).save(tmp_path / "composed")
  ours = evaluate(tasks, TASKS, CalmJax(str(tmp_path / "composed"), **settings))
  assert_same(ours, evaluate_hf(tasks, TASKS, folder, **settings))


def test_chats_are_the_same_as_hf(tmp_path):
  folder = chats.write(tmp_path / "model", "gemma")
  size = load_tokenizer(folder).vocab_size
  shape = spelled.SHAPE | {"vocab_size": size, "max_length": 256}
  export.save_params(folder, *helpers.model(1, **shape))
  docs = {
    "tiny_choice": [{"context": "once", "choices": ["a", "cat"], "target": 0}],
    "tiny_rolling": [{"text": "the cat"}],
    "tiny_generate": [{"context": "the cat"}, {"context": "a mat"}],
  }
  options = {"until": ["\n\n"], "max_gen_toks": 16}
  tasks = write(tmp_path, docs, options)
  chat = {"apply_chat_template": True, "system_instruction": "x"}
  ours = evaluate(tasks, TASKS, CalmJax(str(folder)), **chat)
  theirs = evaluate_hf(tasks, TASKS, folder, settings=chat)
  assert_same(ours, theirs)
  assert ours != evaluate(tasks, TASKS, CalmJax(str(folder)))


def test_an_exported_composition(folder, tmp_path):
  settings = {"max_length": 60, "add_bos_token": True}
  tasks = write(
    tmp_path, {name: rows[:2] for name, rows in DOCS.items()}, OPTIONS
  )
  model = calm_jax.load_model(str(folder))
  composed = calm_jax.compose(model, model, 2, output_init="normal")
  composed.save(tmp_path / "composed")
  composed.export_hf(tmp_path / "exported")
  ours = evaluate(tasks, TASKS, CalmJax(str(tmp_path / "composed"), **settings))
  settings["trust_remote_code"] = True
  theirs = evaluate_hf(tasks, TASKS, tmp_path / "exported", **settings)
  assert_same(ours, theirs)
  assert ours != evaluate(tasks, TASKS, CalmJax(str(folder), max_length=60))
