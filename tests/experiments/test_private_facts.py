"""The facts experiment from end to end, tiny: both tokenizers are its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

import calm_jax
from calm_jax import train
from configs import facts


@pytest.mark.slow
def test_facts_from_end_to_end(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(90)]
  lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(6100)]
  folder = tmp_path / "shared" / "data"
  for name in ("nllb_seed", "gsm8k"):
    (folder / name).mkdir(parents=True)
  english = folder / "nllb_seed" / "eng_Latn.txt"
  english.write_text("\n".join(lines))
  for name in ("train", "test"):
    rows = [{"question": line, "answer": line[:9]} for line in lines[:40]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "gsm8k" / f"{name}.jsonl").write_text(text)
  monkeypatch.setenv("CALM_SHARED", str(tmp_path / "shared"))
  config = facts.get_config("tiny")
  config.workdir = str(tmp_path / "run")
  config.task.tokenizers.anchor.pieces = 150
  config.task.skip_evals = ("held_in-*", "two_hop-*")
  results = train.main(config)
  assert results["parameters"]["anchor"] != results["parameters"]["augmenting"]
  entry = results["evals"]["held_out-closed"]
  columns = {"augmenting", "anchor", "composed", "pasted"}
  assert entry["scores"].keys() == columns
  assert entry["note"].startswith("a constant answer closed: ")
  # Perplexities are of the anchor's tokens.
  assert results["perplexity"]["English"].keys() == {"anchor", "composed"}
  assert results["bits_per_byte"]["English"].keys() == columns - {"pasted"}
  audit = results["audit"]
  assert audit["answers"].keys() == {"held_out-closed", "held_out-open"}
  assert "English" in audit["likelihood"]
  composed = calm_jax.load_composed(tmp_path / "run" / "composition")
  assert composed.tokenizers["people"].vocab_size == 400
  assert composed.text().vocab_size == 150
