"""Text in, text out: generation and scoring above token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calm_jax.core.errors import InputError
from calm_jax.generation import decode, scoring
from calm_jax.generation.sampling import Sampler
from calm_jax.generation.scoring import Score
from calm_jax.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what the start of a character decodes to


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Ids behind the BOS token, if there is one."""
  return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def generate(
  model,
  prompts: Sequence[str],
  max_new_tokens: int,
  sampler: Sampler,
  *,
  stop: Sequence[str],
  seeds: Sequence[int],
  batch_size: int,
) -> list[str]:
  """Continuations of prompts; see `LanguageModel.generate`."""
  tokenizer = model.text()
  ids = [with_bos(tokenizer, tokenizer.encode(p)) for p in prompts]

  def text(i, new):
    return tokenizer.decode_continuation(ids[i], new)

  out = decode.generate(
    model.params,
    model.spec,
    ids,
    max_new_tokens=max_new_tokens,
    stop_ids=tokenizer.stop_ids,
    sampler=sampler,
    seeds=seeds,
    readers=model.readers(),
    finished=(lambda i, new: _end(text(i, new), stop) >= 0) if stop else None,
    batch_size=batch_size,
  )
  texts = [text(i, new) for i, new in enumerate(out)]
  ends = [_end(t, stop) for t in texts]
  return [t if end < 0 else t[:end] for t, end in zip(texts, ends, strict=True)]


def stream(
  model,
  prompt: str,
  max_new_tokens: int,
  sampler: Sampler,
  *,
  stop: Sequence[str],
  seed: int,
) -> Iterator[str]:
  """Pieces of one continuation as they come; joined, what generate gives."""
  tokenizer = model.text()
  ids = with_bos(tokenizer, tokenizer.encode(prompt))
  new: list[int] = []
  sent, text = 0, ""
  for _, tokens in decode.stream(
    model.params,
    model.spec,
    [ids],
    max_new_tokens=max_new_tokens,
    stop_ids=tokenizer.stop_ids,
    sampler=sampler,
    seeds=[seed],
    readers=model.readers(),
  ):
    new += tokens
    text = tokenizer.decode_continuation(ids, new)
    end = _end(text, stop)
    if end >= 0:
      text = text[:end]
      break
    sure = _sure(text, stop)
    if sure > sent:
      yield text[sent:sure]
      sent = sure
  if text[sent:]:
    yield text[sent:]


def score(
  model, prompts: Sequence[str], completions: Sequence[str], batch_size: int
) -> list[Score]:
  """See `LanguageModel.score`."""
  tokenizer = model.text()
  if len(prompts) != len(completions):
    raise InputError(
      f"{len(prompts)} prompts and {len(completions)} completions: give as "
      "many of the one as of the other"
    )
  return scoring.score(
    model.params,
    model.spec,
    [with_bos(tokenizer, tokenizer.encode(p)) for p in prompts],
    [
      tokenizer.encode_continuation(p, c)
      for p, c in zip(prompts, completions, strict=True)
    ],
    readers=model.readers(),
    batch_size=batch_size,
  )


def _end(text: str, stop: Sequence[str]) -> int:
  """Where the first of the stop strings begins; -1 if there is none."""
  return min((at for s in stop if (at := text.find(s)) >= 0), default=-1)


def _sure(text: str, stop: Sequence[str]) -> int:
  """How much of a text no further token can take back."""
  sure = len(text.rstrip(_UNFINISHED))
  for s in stop:
    for n in range(min(len(s) - 1, sure), 0, -1):
      if text[:sure].endswith(s[:n]):
        sure -= n
        break
  return sure
