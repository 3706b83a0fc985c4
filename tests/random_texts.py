"""Random texts that hypothesis draws for tests of tokenizers.

Those of `make test` are few; HYPOTHESIS_PROFILE=thorough draws 10,000.
"""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Letters of the vocabularies and of none, that normalise to others, that are
# split into bytes; whitespace; signs that join with their neighbours, or that
# turn the direction of writing.
ALPHABET = (
  "ab cde\n .\t'é\u0301ﬁﷺ①½日本かｶ한ไทยمرשל👍🏽\u200d\ufe0f\x00\u00a0\u3000"
  "\u200e\u200f\u202b\u202c\u2067\u2069<0xE4>▁~"
)
RANDOM = st.one_of(
  st.text(max_size=60),
  st.text(ALPHABET, max_size=60),
  st.lists(
    st.sampled_from([
      "the cat", " sat", "  ", "\n", "日本語", " straightforwardnesses",
      "👩‍👩‍👧", "</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>", "<|user|>",
      "<|end|>", "é", "e\u0301", "ﬁ", ".", "1234", " x", "สวัสดี", "שלום",
      " \u2067مرحبا\u2069",
    ]),
    max_size=12,
  ).map("".join),
)  # fmt: skip
