"""How good machine-made (silver) translations of a test set are (Table 7).

A test set is translated into a language and back. Appendix A.2 measures the
overlap of what came back with the original, and the delta: how much worse a
model does on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from calm_jax.core.errors import InputError
from calm_jax.evals import statistics
from calm_jax.evals.base import Outcome


def silver(
  originals: Sequence[str],
  returned: Sequence[str],
  score_originals: Sequence[float],
  score_returned: Sequence[float],
  *,
  seed: int = 0,
) -> Outcome:
  """Table 7 for one language.

  Args:
    originals: N texts.
    returned: the texts, translated there and back.
    score_originals, score_returned: a model's score of each, such as 100 where
      its answer is right and 0 elsewhere.
    seed: of the intervals.

  Returns:
    "overlap", corpus BLEU of `returned` against `originals`; "delta", the mean
    score on the originals less that on what was returned (positive: worse for
    the translation), its 95% interval, and "delta_p", its paired significance.
    notes["overlap"] is sacrebleu's signature.

  Raises:
    InputError: not the same number of each, or none.
  """
  columns = originals, returned, score_originals, score_returned
  if not originals or len({len(column) for column in columns}) > 1:
    raise InputError(
      "silver translations need as many originals, returned texts and scores "
      f"of both, got {[len(column) for column in columns]}"
    )
  bleu = BLEU()
  overlap = bleu.corpus_score(list(returned), [list(originals)])
  sentence = BLEU(effective_order=True)  # a short text has no 4-grams
  delta = statistics.compare(
    np.array(score_originals, np.float64)[:, None],
    np.array(score_returned, np.float64)[:, None],
    statistics.mean_of(len(originals)),
    seed=seed,
  )
  return Outcome(
    {
      "overlap": overlap.score,
      "delta": delta.delta,
      "delta_low": delta.low,
      "delta_high": delta.high,
      "delta_p": delta.p_value,
    },
    [
      {
        "original": original,
        "returned": back,
        "overlap": sentence.sentence_score(back, [original]).score,
        "score_original": before,
        "score_returned": after,
      }
      for original, back, before, after in zip(*columns, strict=True)
    ],
    {"overlap": f"{overlap.name}|{bleu.get_signature()}"},
  )
