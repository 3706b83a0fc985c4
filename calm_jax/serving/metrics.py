"""Counts and times of a server, in the text format of Prometheus."""

import threading

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Counter:
  """A number that only grows."""

  def __init__(self):
    self.value = 0
    self._lock = threading.Lock()

  def add(self, count: int = 1) -> None:
    with self._lock:
      self.value += count


class Histogram:
  """Counts of times, in seconds, up to each of `_SECONDS`."""

  def __init__(self):
    self.counts = [0] * len(_SECONDS)  # each of times up to its bound
    self.count, self.sum = 0, 0.0

  def add(self, seconds: float) -> None:
    self.count += 1
    self.sum += seconds
    for i, bound in enumerate(_SECONDS):
      self.counts[i] += seconds <= bound

  def lines(self, name: str) -> list[str]:
    buckets = [
      f'{name}_bucket{{le="{bound:g}"}} {count}'
      for bound, count in zip(_SECONDS, self.counts, strict=True)
    ]
    rest = f'{name}_bucket{{le="+Inf"}} {self.count}'
    ends = [f"{name}_sum {self.sum:.6f}", f"{name}_count {self.count}"]
    return [*buckets, rest, *ends]


class Metrics:
  """Counts all that a server does from its start; the engine writes it."""

  def __init__(self):
    self.prompt_tokens, self.new_tokens = Counter(), Counter()
    self.refused = Counter()
    self.requests: dict[str, int] = {}  # answers, by the reason of their end
    self.first_token, self.whole = Histogram(), Histogram()

  def ended(self, reason: str, first: float | None, whole: float) -> None:
    """Notes the end of an answer, and the seconds to its first token and it."""
    self.requests[reason] = self.requests.get(reason, 0) + 1
    if first is not None:
      self.first_token.add(first)
    self.whole.add(whole)

  def text(self, running: int, waiting: int) -> str:
    """Writes all numbers, with the rows that are decoded and that wait."""
    out: list[str] = []

    def add(name: str, kind: str, help_text: str, lines: list[str]) -> None:
      out.append(f"# HELP calm_jax_{name} {help_text}")
      out.append(f"# TYPE calm_jax_{name} {kind}")
      out.extend(f"calm_jax_{line}" for line in lines)

    for name, kind, help_text, value in (
      ("running", "gauge", "Rows that are decoded.", running),
      ("waiting", "gauge", "Rows that wait.", waiting),
      *(
        (f"{name}_total", "counter", help_text, counter.value)
        for name, help_text, counter in (
          ("prompt_tokens", "Tokens read.", self.prompt_tokens),
          ("new_tokens", "Tokens made.", self.new_tokens),
          ("refused", "Requests that found the queue full.", self.refused),
        )
      ),
    ):
      add(name, kind, help_text, [f"{name} {value}"])
    ends = sorted(self.requests.items())
    lines = [f'answers_total{{end="{why}"}} {count}' for why, count in ends]
    add("answers_total", "counter", "Answers by how they ended.", lines)
    for name, help_text, times in (
      ("first_token_seconds", "From a request to a token.", self.first_token),
      ("answer_seconds", "From a request to its end.", self.whole),
    ):
      add(name, "histogram", help_text, times.lines(name))
    return "\n".join(out) + "\n"
