"""Stop strings: texts at which a generated text ends, themselves left out."""

from collections.abc import Sequence

from calm_jax.core.errors import InputError, check_texts

_UNFINISHED = "\ufffd"  # what the start of a character decodes to


def check(stop: str | Sequence[str]) -> list[str]:
  """Returns one stop string or several as a list.

  Raises InputError for what is no text, and for an empty one.
  """
  texts = check_texts("stop", [stop] if isinstance(stop, str) else stop)
  if "" in texts:
    raise InputError(
      f"stop={stop!r}: a text of no characters would end every answer at its "
      "start; leave it out, or give the text that ends one"
    )
  return texts


def find(text: str, stop: Sequence[str]) -> int:
  """Returns where the first stop string begins; -1 if there is none."""
  starts = [at for string in stop if (at := text.find(string)) >= 0]
  return min(starts, default=-1)


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns the text before the first of the stop strings."""
  end = find(text, stop)
  return text if end < 0 else text[:end]


def settled_length(text: str, stop: Sequence[str]) -> int:
  """Returns the number of characters that no further token can take back.

  A text may end in half a character, or in the beginning of a stop string.
  """
  settled = len(text.rstrip(_UNFINISHED))
  for string in stop:
    for n in range(min(len(string) - 1, settled), 0, -1):
      if text[:settled].endswith(string[:n]):
        settled -= n
        break
  return settled
