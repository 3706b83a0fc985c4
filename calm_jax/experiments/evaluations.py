"""The evaluations that a config asks for."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import tasks
from calm_jax.evals.base import Evaluation
from calm_jax.experiments.languages import expand


def read(
  evals: Mapping[str, Mapping[str, Any]],
  languages: Sequence[str],
  skip: Sequence[str],
  allow_code_execution: bool,
  only: Sequence[str] = ("*",),
  limit: int = 0,
) -> dict[str, Evaluation]:
  """Reads the evaluations that are not left out, by name.

  `only` are patterns of those that are read, the first `limit` examples of each
  if that is not 0.
  `skip` are names or patterns, such as mgsm_*. Raises InputError if one is of
  no evaluation, or as `tasks.make`.
  """
  wanted = expand(evals, languages)
  skipped = {p: fnmatch.filter(wanted, p) for p in skip}
  if unknown := [p for p, names in skipped.items() if not names]:
    raise InputError(f"skip_evals={unknown} are none of {list(wanted)}")
  made = {}
  for name, settings in wanted.items():
    if not any(fnmatch.fnmatch(name, pattern) for pattern in only):
      continue
    if limit:
      asked = settings.get("limit") or limit
      settings = settings | {"limit": min(asked, limit)}
    if any(name in names for names in skipped.values()):
      print(f"evaluation {name} is left out, as skip_evals asks", flush=True)
      continue
    if settings.get("kind") in tasks.RUN_CODE:
      allowed = {"allow_code_execution": allow_code_execution}
      settings = settings | allowed
    made[name] = tasks.make(settings)
  return made
