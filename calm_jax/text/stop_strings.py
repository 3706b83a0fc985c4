"""Stop strings: texts at which a generated text ends, themselves left out."""

from __future__ import annotations

from collections.abc import Sequence

_UNFINISHED = "\ufffd"  # what the start of a character decodes to


def find(text: str, stop: Sequence[str]) -> int:
  """The index at which the first stop string begins; -1 if there is none."""
  starts = [at for string in stop if (at := text.find(string)) >= 0]
  return min(starts, default=-1)


def cut(text: str, stop: Sequence[str]) -> str:
  """The text before the first of the stop strings."""
  end = find(text, stop)
  return text if end < 0 else text[:end]


def settled_length(text: str, stop: Sequence[str]) -> int:
  """The number of characters that no further token can take back.

  The end of an unfinished text may be half a character, or the beginning of a
  stop string.
  """
  settled = len(text.rstrip(_UNFINISHED))
  for string in stop:
    for n in range(min(len(string) - 1, settled), 0, -1):
      if text[:settled].endswith(string[:n]):
        settled -= n
        break
  return settled
