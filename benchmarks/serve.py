"""Puts a load on `calm_jax.serve`, and compares every answer with `generate`.

  python -m benchmarks.serve --model=DIR_OR_ID [--clients=64] [--seconds=120]

Clients of OpenAI's package, each in a thread of this process, ask for one
greedy answer after the other; the server is a process of its own. Some clients
are bad: one reads a stream slowly, one leaves its streams, one sends what is no
JSON. Prints answers and how many differ from those that `generate` gives alone,
times to the first token, the server's memory at a quarter of the run and at its
end, and the tokens a second that it makes in between, beside those of
`generate` for --rows prompts at once.
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
    self.answers = self.wrong = 0
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
      begun, first, text = time.monotonic(), None, ""
      try:
        events = self.client.completions.create(
          model="load",
          prompt=prompt,
          max_tokens=self.new,
          temperature=0,
          stream=True,
        )
        for event in events:
          first = first or time.monotonic() - begun
          text += event.choices[0].text
          time.sleep(pause)
          if leaves:
            events.close()
            break
      except openai.APIError as error:
        self.errors.append(repr(error))
        continue
      with self._lock:
        if not leaves:
          self.answers += 1
          self.wrong += text != self.want[prompt]
          self.first.append(first or 0.0)

  def made(self) -> int:
    """Tokens that the server has made for all clients so far."""
    text = httpx.get(f"{self.url}/metrics").text
    found = re.search(r"^calm_jax_new_tokens_total (\d+)$", text, re.M)
    assert found
    return int(found[1])

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
  flag("--clients", type=int, default=64)
  flag("--seconds", type=int, default=120)
  flag("--rows", type=int, default=16)
  flag("--chunk", type=int, default=8)
  flag("--new", type=int, default=48, help="tokens of an answer")
  flag("--port", type=int, default=8123)
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
      *("--name=load", f"--port={given.port}"),
      *(f"--rows={given.rows}", f"--chunk={given.chunk}"),
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
  # Programs of longer caches are compiled by a round that does not count.
  _put_load(given, want, alone, url, pid, given.seconds / 4)
  print(_put_load(given, want, alone, url, pid, given.seconds), flush=True)


def _put_load(
  given: argparse.Namespace,
  want: dict[str, str],
  alone: float,
  url: str,
  pid: int,
  seconds: float,
) -> str:
  """Runs all clients for some time; says what they have seen."""
  begun = time.monotonic()
  load = Load(url, want, given.new, begun + seconds)
  clients = [(7 * i,) for i in range(given.clients)]
  bad = [(1, 0.5), (2, 0.0, True)]
  threads = [
    threading.Thread(target=load.ask, args=arguments)
    for arguments in (*clients, *bad)
  ]
  threads.append(threading.Thread(target=load.send_nonsense))
  for thread in threads:
    thread.start()
  seen = []  # (seconds, tokens, megabytes) at a quarter and at the end
  for share in (0.25, 1.0):
    time.sleep(max(0.0, begun + share * seconds - time.monotonic()))
    seen.append((time.monotonic(), load.made(), memory(pid)))
  for thread in threads:
    thread.join()
  (t, made, before), (t_end, made_end, after) = seen
  rate = (made_end - made) / (t_end - t)
  times = statistics.quantiles(load.first, n=20)
  return (
    f"{load.answers} answers, {load.wrong} differ, "
    f"{len(load.errors)} errors {load.errors[:1]}\n"
    f"{rate:.0f} tokens/s, generate {alone:.0f}: {rate / alone:.2f}\n"
    f"first token: median {times[9]:.2f} s, p95 {times[18]:.2f} s\n"
    f"memory {before:.0f} to {after:.0f} MB"
  )


if __name__ == "__main__":
  main()
