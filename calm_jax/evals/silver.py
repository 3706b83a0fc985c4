"""Quality of machine-made (silver) problems, by back-translation (Table 7).

Problems are translated into a language and back, by whatever translates test
sets. Appendix A.2 measures the overlap of what came back with the original, and
the delta: how much worse a model does on it.
"""

import dataclasses

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot, maths, statistics
from calm_jax.evals.base import Evaluation, Judgement, Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silver(maths.Maths):
  """Problems of a file, and the same after translation there and back.

  The accuracy is that on the problems in the file `returned`, which are those
  of `path`, line by line. In results.json "measures" holds the rest of Table 7:
  "overlap", the corpus BLEU of the returned questions against the originals;
  "delta", the accuracy on the originals less that on the returned problems, its
  95% interval "delta_low" to "delta_high", and its paired p-value "delta_p".
  """

  returned: str

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    metrics = chrf.load_metrics()
    originals, returned = (
      fewshot.take(maths.read_gsm(path, self.language), limit=self.limit)
      for path in (self.path, self.returned)
    )
    if [p["number"] for p in originals] != [p["number"] for p in returned]:
      raise InputError(
        f"{self.returned} must hold the problems of {self.path} in the same "
        f"order, with the same answers: got {len(returned)} problems for "
        f"{len(originals)}, or other numbers"
      )
    before, after = self.solve(originals), self.solve(returned)
    references = [problem["question"] for problem in originals]
    hypotheses = [problem["question"] for problem in returned]
    bleu = metrics.BLEU()
    overlap = bleu.corpus_score(hypotheses, [references])
    sentence = metrics.BLEU(effective_order=True)  # a short text has no 4-grams
    overlaps = [
      sentence.sentence_score(hypothesis, [reference]).score
      for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]

    def judge(prompts: list[Prompt], outputs: list[str]) -> Judgement:
      count = len(originals)
      original = before.judge(prompts[:count], outputs[:count])
      back = after.judge(prompts[count:], outputs[count:])
      parts = original.parts_NS, back.parts_NS
      delta, low, high, p_value = statistics.compare(*parts, original.metric)
      rows = [row | {"text": "original"} for row in original.rows]
      rows += [
        row | {"text": "returned", "overlap": score}
        for row, score in zip(back.rows, overlaps, strict=True)
      ]
      measures = {"overlap": overlap.score, "delta": delta}
      measures |= {"delta_low": low, "delta_high": high, "delta_p": p_value}
      note = f"overlap: {overlap.name}|{bleu.get_signature()}"
      return dataclasses.replace(back, rows=rows, note=note, measures=measures)

    questions = before.questions + after.questions
    return dataclasses.replace(
      after, task="silver", questions=questions, judge=judge
    )
