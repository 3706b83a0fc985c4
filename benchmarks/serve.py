"""Puts a load on `calm_jax.serve`, and compares every answer with `generate`.

  python -m benchmarks.serve --model=DIR_OR_ID [--clients=64] [--seconds=120]

Clients of OpenAI's package, each in a thread of this process, ask for one
greedy answer after the other; the server is a process of its own. Some clients
are bad: one reads a stream slowly, one leaves its streams, one sends what is no
JSON. Prints answers and how many differ from those that `generate` gives alone,
tokens a second beside those of `generate` for --rows prompts at once, times to
the first token, and the server's memory at a quarter of the run and at its end.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import threading
import time

import httpx
import openai

import calm_jax

WORDS = "the once upon a time in winter children wrote letters about rivers"


class Load:
  """What the clients have seen."""

  def __init__(self, url: str, want: dict[str, str], new: int, until: float):
    self.url, self.want, self.new, self.until = url, want, new, until
    self.first: list[float] = []
    self.answers = self.tokens = self.wrong = 0
    self.errors: list[str] = []
    # One for all: to make one takes longer than to ask.
    self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    self._lock = threading.Lock()

  def ask(self, seed: int, pause: float = 0.0, leaves: bool = False) -> None:
    """One client: streams answers until the time is over."""
    prompts = list(self.want)
    while time.monotonic() < self.until:
      seed += 1
      prompt = prompts[seed % len(prompts)]
      begun, first, text, tokens = time.monotonic(), None, "", 0
      try:
        events = self.client.completions.create(
          model="load", prompt=prompt, max_tokens=self.new, temperature=0,
          stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        for event in events:
          first = first or time.monotonic() - begun
          text += event.choices[0].text if event.choices else ""
          tokens += event.usage.completion_tokens if event.usage else 0
          time.sleep(pause)
          if leaves:
            events.close()
            break
      except openai.APIError as error:
        self.errors.append(repr(error))
        continue
      with self._lock:
        self.tokens += tokens
        if not leaves:
          self.answers += 1
          self.wrong += text != self.want[prompt]
          self.first.append(first or 0.0)

  def send_nonsense(self) -> None:
    while time.monotonic() < self.until:
      got = httpx.post(f"{self.url}/v1/completions", content=b'{"model": ')
      assert got.status_code == 400, got
      time.sleep(0.5)


def memory(pid: int) -> float:
  """Resident megabytes of a process."""
  with open(f"/proc/{pid}/status") as file:
    found = re.search(r"VmRSS:\s+(\d+) kB", file.read())
  assert found
  return int(found[1]) / 1024


def tokens_a_second(
  model: calm_jax.LanguageModel, prompts: list[str], new: int
) -> float:
  """Of `generate` for all prompts at once, the second time."""
  for _ in range(2):
    begun = time.perf_counter()
    texts = model.generate(prompts, new, batch_size=len(prompts))
    took = time.perf_counter() - begun
  ids = [
    model.text().encode_pair(*p)[1] for p in zip(prompts, texts, strict=True)
  ]
  return sum(map(len, ids)) / took


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  flag = parser.add_argument
  flag("--model", required=True)
  for name, default in {
    "clients": 64, "seconds": 120, "rows": 16, "new": 48, "port": 8123,
  }.items():  # fmt: skip
    flag(f"--{name}", type=int, default=default)
  given = parser.parse_args()
  model = calm_jax.load_model(given.model)
  words = WORDS.split()
  prompts = [" ".join(words[: 1 + i % 12][i // 12 :]) for i in range(24)]
  prompts = list(dict.fromkeys(filter(None, prompts)))
  want = {prompt: model.generate(prompt, given.new) for prompt in prompts}
  alone = tokens_a_second(model, (prompts * 8)[: given.rows], given.new)
  server = subprocess.Popen(
    [
      *(sys.executable, "-m", "calm_jax.serve", f"--model={given.model}"),
      *("--name=load", f"--port={given.port}", f"--rows={given.rows}"),
    ]
  )
  try:
    _run(given, want, alone, server.pid)
  finally:
    server.terminate()
    server.wait()


def _run(
  given: argparse.Namespace, want: dict[str, str], alone: float, pid: int
) -> None:
  url = f"http://127.0.0.1:{given.port}"
  while True:
    try:
      httpx.get(f"{url}/health").raise_for_status()
      break
    except httpx.TransportError:
      time.sleep(0.2)
  # Its programs are compiled by a first round that does not count.
  for seconds, name in ((given.seconds / 4, "warm"), (given.seconds, "load")):
    load = Load(url, want, given.new, time.monotonic() + seconds)
    clients = [
      threading.Thread(target=load.ask, args=(7 * i,))
      for i in range(given.clients)
    ]
    bad = [
      threading.Thread(target=load.ask, args=(1, 0.5)),
      threading.Thread(target=load.ask, args=(2, 0.0, True)),
      threading.Thread(target=load.send_nonsense),
    ]
    begun, before = time.monotonic(), memory(pid)
    for thread in clients + bad:
      thread.start()
    for thread in clients + bad:
      thread.join()
    rate = load.tokens / (time.monotonic() - begun)
    times = statistics.quantiles(load.first, n=20)
    print(
      f"{name}: {load.answers} answers, {load.wrong} differ, "
      f"{len(load.errors)} errors {load.errors[:1]}\n"
      f"  {rate:.0f} tokens/s, generate {alone:.0f}: {rate / alone:.2f}\n"
      f"  first token: median {times[9]:.2f} s, p95 {times[18]:.2f} s\n"
      f"  memory {before:.0f} to {memory(pid):.0f} MB",
      flush=True,
    )


if __name__ == "__main__":
  main()
