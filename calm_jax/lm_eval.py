"""lm-evaluation-harness's tasks, for a model or a saved composition.

    python -m calm_jax.lm_eval --model calm_jax \\
      --model_args pretrained=DIR --tasks TASK

is `lm_eval` with calm_jax among its models. Releases of the harness after
0.4.13 find this module by its entry point: there `lm_eval` itself will do.
Needs the extra `eval`.
"""

import json
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

try:
  from lm_eval import utils
  from lm_eval.__main__ import cli_evaluate
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
  if __name__ != "__main__":
    raise
  print(f"error: {error}: pip install 'calm_jax[eval]'", file=sys.stderr)
  sys.exit(2)

from calm_jax import cli, language_model
from calm_jax.core.errors import InputError, check_choice, check_int, check_seed
from calm_jax.generation import batching, decode, scoring
from calm_jax.generation.sampling import Sampler
from calm_jax.text import chat, stop_strings
from calm_jax.text.backends import load_tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_AUTO = 16  # rows at once, for batch_size=auto


@register_model("calm_jax")
class CalmJax(TemplateLM):
  """Adapter that answers the harness as its own model class `hf` does.

  So that numbers compare, texts become tokens as there: a BOS token is put
  first if the checkpoint's own tokenizer does so, what is too long loses its
  beginning, and what was generated is decoded by itself. Raises InputError if
  there is no such model or tokenizer, or for an impossible setting.

  Args:
    pretrained: a folder or hub id of a model, or of a composition.
    dtype, quantise, anchor, augmenting: see `load_composed`.
    batch_size: rows at once, or "auto".
    max_length: tokens that are read at most; the models' limit if None.
    max_gen_toks: tokens of an answer, where a task does not say.
    add_bos_token: whether a BOS token is put before every text, as calm_jax
      trains compositions; as the anchor's own tokenizer does if None.
    seed: of sampling; request i draws with seed + i.
    device: not used, for the harness always names one: JAX_PLATFORMS does.
    max_batch_size: must be left out.
    ignore: keys to read config.json without, with plus signs between.
  """

  def __init__(
    self,
    pretrained: str,
    dtype: str | None = None,
    batch_size: int | str = _AUTO,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    add_bos_token: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    max_batch_size: int | None = None,
    quantise: str | None = None,
    ignore: str = "",
    anchor: str | None = None,
    augmenting: str | dict[str, str] | None = None,
  ):
    super().__init__()
    if max_batch_size is not None:
      raise InputError("calm_jax has no max_batch_size: give batch_size")
    self.model = language_model.load_any(
      pretrained,
      dtype,
      quantise,
      ignore=ignore,
      anchor=anchor,
      augmenting=augmenting,
    )
    self._text = self.model.text()
    if isinstance(batch_size, str) and batch_size.isdecimal():
      batch_size = int(batch_size)
    if batch_size == "auto":
      batch_size = _AUTO
    self._batch_size = check_int("batch_size", batch_size, 1)
    limit = self.model.max_length
    if max_length is None:
      max_length = limit
    self.max_length = check_int("max_length", max_length, 1, limit)
    self.max_gen_toks = check_int("max_gen_toks", max_gen_toks, 1)
    self._seed = check_seed("seed", seed)
    check_choice("add_bos_token", add_bos_token, (None, True, False))
    if self._text.bos_id is None and self._text.eos_id is None:
      raise InputError(
        f"the tokenizer of {pretrained} has neither a BOS nor an EOS token, "
        "which the harness puts before texts without a context"
      )
    if add_bos_token is None:
      add_bos_token = _puts_bos(self.model.sources["anchor"].folder)
    self._add_bos = add_bos_token
    self._stop_ids = self._text.stop_ids

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The chat template, which the harness keeps with its results."""
    if not chat_template:
      return None
    if isinstance(chat_template, str):
      raise InputError(
        f"--apply_chat_template {chat_template}: calm_jax knows the default "
        "template only; give the flag without a name"
      )
    self._stop_ids = chat.frame(self._text).stop_ids
    return self._text.chat_template

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Writes a conversation, which may end within an answer, as `hf` does.

    That includes leaving the system message out where the template refuses it;
    a warning says so. Answers then end where the template ends a turn, too.
    """
    self._stop_ids = chat.frame(self._text).stop_ids
    options = {
      "add_generation_prompt": add_generation_prompt,
      "continue_final_message": not add_generation_prompt,
    }
    try:
      return chat.render(self._text, chat_history, **options)
    except InputError as error:
      rest = [each for each in chat_history if each["role"] != "system"]
      if len(rest) == len(chat_history):
        raise
      warnings.warn(f"{error}; its system message is left out", stacklevel=2)
      return chat.render(self._text, rest, **options)

  @property
  def eot_token_id(self) -> int | None:
    return self._text.eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without a context: BOS, else EOS."""
    for token in (self._text.bos_id, self._text.eos_id):
      if token is not None:
        return token
    raise InputError(
      "a text without a context needs a BOS or EOS token, and the tokenizer of "
      "the model has neither"
    )

  @property
  def tokenizer_name(self) -> str:
    return self._text.fingerprint

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Token ids; BOS only if the text does not spell it already."""
    wanted = self._add_bos if add_special_tokens is None else add_special_tokens
    encode = self._text.encode_prompt if wanted else self._text.encode
    return encode(string)

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs,
  ) -> list[tuple[float, bool]]:
    prompts, completions = [], []
    for _, context, continuation in requests:
      # The last token is only predicted: there may be one more than are read.
      ids = [*context, *continuation][-self.max_length - 1 :]
      learnt = len(continuation) - 1  # of those that are read
      ids = [*self._readable_end(ids[:-1], learnt), *ids[-1:]]
      if not 0 < len(continuation) < len(ids):
        raise InputError(
          f"a continuation of {len(continuation)} tokens: it must have from 1 "
          f"to {self.max_length}, and fewer where an augmenting model with "
          "other tokens reads less: give a lower max_length"
        )
      prompts.append(ids[: -len(continuation)])
      completions.append(continuation)
    scores = scoring.score(
      self.model, prompts, completions, batch_size=self._batch_size
    )
    answers = [(score.logprob, score.is_greedy) for score in scores]
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      if texts is not None:  # None: a window of loglikelihood_rolling
        self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def _readable_end(
    self, ids: list[int], learnt: int = 0, new_tokens: int = 0
  ) -> list[int]:
    """The last of a prompt and of `learnt` ids that all models can read."""

    def count() -> int:
      prompt_length = len(ids) - learnt
      return batching.num_readable(self.model, ids, prompt_length, new_tokens)

    while excess := len(ids) - count():
      ids = ids[excess:]
      if not ids:
        raise InputError(
          f"an augmenting model reads too few tokens for {new_tokens} new ones "
          "and a context: lower --gen_kwargs max_gen_toks=N"
        )
    return ids

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = False
  ) -> list[float]:
    windows, owners = [], []
    for number, request in enumerate(requests):
      for window in utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *utils.make_disjoint_window(window)))
        owners.append(number)
    totals = [0.0] * len(requests)
    scores = self._loglikelihood_tokens(windows)
    for number, (logprob, _) in zip(owners, scores, strict=True):
      totals[number] += logprob
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      key = json.dumps(request.args[1], sort_keys=True)
      groups.setdefault(key, []).append(number)
    texts = [""] * len(requests)
    for numbers in groups.values():
      contexts = [requests[number].args[0] for number in numbers]
      options = requests[numbers[0]].args[1]
      written = self._generate(contexts, numbers, options)
      for number, text in zip(numbers, written, strict=True):
        texts[number] = text
        key = requests[number].args
        self.cache_hook.add_partial("generate_until", key, text)
    return texts

  def _generate(
    self, contexts: list[str], numbers: list[int], options: dict[str, Any]
  ) -> list[str]:
    """Continuations of contexts that are asked for with the same options."""
    options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
    until = [stop for stop in options.pop("until") if stop]
    longest = check_int("max_gen_toks", options.pop("max_gen_toks"))
    if not options.pop("do_sample"):
      options["temperature"] = 0.0
    if unknown := sorted(options.keys() - set(_SAMPLING)):
      raise InputError(
        f"calm_jax cannot generate with {', '.join(unknown)}; it knows until, "
        f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
      )
    room = self.max_length - longest
    if room < 1:
      raise InputError(
        f"max_gen_toks={longest} leaves no room for a context in max_length="
        f"{self.max_length}: lower it by --gen_kwargs max_gen_toks=N"
      )

    def stopped(_: int, new: list[int]) -> bool:
      return stop_strings.find(self._text.decode(new), until) >= 0

    prompts = [
      self._readable_end(
        self.tok_encode(text)[-room:] or [self.prefix_token_id], 0, longest
      )
      for text in contexts
    ]
    out = decode.generate(
      self.model,
      prompts,
      max_new_tokens=longest,
      sampler=Sampler(**options),
      seeds=[self._seed + number for number in numbers],
      finished=stopped if until else None,
      batch_size=self._batch_size,
      stop_ids=self._stop_ids,
    )
    return [stop_strings.cut(self._text.decode(new), until) for new in out]


def _puts_bos(folder: pathlib.Path) -> bool:
  """True if a checkpoint's own tokenizer begins every text with BOS."""
  try:
    tokenizer = load_tokenizer(folder)
  except (OSError, ValueError, KeyError, ImportError) as error:
    raise InputError(
      f"transformers cannot read the tokenizer of {folder} ({error}): say "
      "add_bos_token=True or False in --model_args"
    ) from error
  ids = tokenizer.encode("")
  return bool(ids) and ids[0] == tokenizer.bos_token_id


def main() -> None:
  """`lm_eval`, with calm_jax among its models."""
  cli.guarded(cli_evaluate)


if __name__ == "__main__":
  main()
