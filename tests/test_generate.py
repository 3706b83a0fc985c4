"""The command lines that continue texts and describe models."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal

import helpers
import pytest
from test_language_model import spell

import calm_jax
from calm_jax import cli, generate, info
from calm_jax.composition.connections import Composition
from calm_jax.models.hf import export
from calm_jax.planning import flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint of 14 tokens, and a composition of it with another."""
  folder = tmp_path_factory.mktemp("models")
  for i, name in enumerate(("anchor", "augmenting")):
    export.save_params(folder / name, *helpers.model(i, vocab_size=14))
    spell(folder / name, "abcdefghij")
  anchor, augmenting = (
    calm_jax.load_model(str(folder / name)) for name in ("anchor", "augmenting")
  )
  composed = calm_jax.compose(anchor, augmenting, 2, output_init="normal")
  composed.save(folder / "composed")
  return folder


@pytest.fixture
def run(monkeypatch, capsys):
  monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)

  def run(module, *arguments, stdin: str = "") -> str:
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    cli.guarded(module.main)
    return capsys.readouterr().out

  return run


def test_a_prompt(folder, run, tmp_path):
  model = calm_jax.load_composed(folder / "composed")
  out = run(
    generate, f"--model={folder / 'composed'}", "--prompt=abc",
    "--max_new_tokens=9", f"--attention={tmp_path / 'look.png'}",
  )  # fmt: skip
  assert out == model.generate("abc", 9) + "\n"
  assert (tmp_path / "look.png").read_bytes()[1:4] == b"PNG"
  drawn = {"temperature": 3.0, "top_k": 5, "seed": 4}
  flags = [f"--{name}={value}" for name, value in drawn.items()]
  out = run(
    generate, f"--model={folder / 'anchor'}", "--prompt=abc",
    "--max_new_tokens=9", *flags,
  )  # fmt: skip
  anchor = calm_jax.load_model(str(folder / "anchor"))
  assert out == anchor.generate("abc", 9, **drawn) + "\n"


def test_prompts_of_a_file_and_of_a_person(folder, run, tmp_path):
  model = calm_jax.load_model(str(folder / "anchor"))
  want = model.generate(["abc", "j"], 5)
  asked = tmp_path / "asked.jsonl"
  asked.write_text('{"prompt": "abc"}\n\n{"prompt": "j"}\n')
  options = f"--model={folder / 'anchor'}", "--max_new_tokens=5"
  lines = run(generate, *options, f"--prompts={asked}").splitlines()
  assert [json.loads(line)["completion"] for line in lines] == want
  assert run(generate, *options, stdin="abc\nj\n").splitlines() == want


@pytest.mark.parametrize(
  ("line", "message"),
  [("{", "line 1: not JSON"), ("{}", "line 1: it has no 'prompt'")],
)
def test_bad_prompts_end_with_code_2(
  folder, run, tmp_path, line, message, capsys
):
  asked = tmp_path / "asked.jsonl"
  asked.write_text(line)
  with pytest.raises(SystemExit) as stopped:
    run(generate, f"--model={folder / 'anchor'}", f"--prompts={asked}")
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_a_composition_whose_models_moved(folder, run, tmp_path, capsys):
  shutil.copytree(folder / "composed", tmp_path / "alone" / "composed")
  config = tmp_path / "alone" / "composed" / "calm_config.json"
  text = config.read_text().replace(f'"{folder}/composed"', '"/nowhere/run"')
  config.write_text(text)
  given = f"--model={config.parent}", "--prompt=abc", "--max_new_tokens=2"
  with pytest.raises(SystemExit) as stopped:
    run(generate, *given)
  assert stopped.value.code == 2
  assert "--anchor=FOLDER and --augmenting=FOLDER" in capsys.readouterr().err
  where = [f"--{n}={folder / n}" for n in ("anchor", "augmenting")]
  model = calm_jax.load_composed(folder / "composed")
  assert run(generate, *given, *where) == model.generate("abc", 2) + "\n"
  with pytest.raises(SystemExit):
    run(info, config.parent)
  assert "anchor: no folder" in capsys.readouterr().err
  assert run(info, config.parent, *where) == run(info, folder / "composed")
  for module, option in ((info, ""), (generate, "--model=")):
    with pytest.raises(SystemExit):
      run(module, f"{option}{folder / 'anchor'}", where[0])
    assert "is no composition" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_command_in_words(
  folder, run, number, code, monkeypatch, capsys
):
  def stream(*_, **__):
    yield "a"
    signal.raise_signal(number)
    pytest.fail("not reached")

  monkeypatch.setattr(calm_jax.LanguageModel, "stream", stream)
  with pytest.raises(SystemExit) as stopped, handlers_kept():
    run(generate, f"--model={folder / 'anchor'}", "--prompt=a")
  assert stopped.value.code == code
  said = f"error: {signal.Signals(number).name}: the same command starts from"
  assert capsys.readouterr().err.startswith(said)


@contextlib.contextmanager
def handlers_kept():
  before = signal.getsignal(signal.SIGTERM)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def test_what_a_model_is(folder, run):
  config, _ = helpers.model(0, vocab_size=14)
  out = run(info, folder / "anchor")
  count = calm_jax.load_model(str(folder / "anchor")).num_params
  assert f"{count:,}" in out
  out = run(info, folder / "composed")
  composed = calm_jax.load_composed(folder / "composed")
  assert f"Θ_C: {composed.num_composition_params:,} parameters" in out
  assert "2→2, 4→4" in out
  assert f"{2 * count + composed.num_composition_params:,}" in out
  # Counted by hand: per layer q, k, v, o and the MLP; the head; 2 connections.
  layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 40
  alone = 4 * layer + 14 * 32
  both = alone + 4 * layer + 2 * (4 * 32 * 32)
  assert flops.generated_token(composed.spec) == both
  assert flops.generated_token(Composition(config)) == alone
  assert re.search(rf"token: {both / alone:.2f} of", out)


def test_keys_of_config_json_are_left_out(folder, run, tmp_path, capsys):
  model = tmp_path / "model"
  shutil.copytree(folder / "anchor", model)
  config = json.loads((model / "config.json").read_text())
  config |= {"quantization_config": {"quant_method": "x"}, "is_causal": False}
  (model / "config.json").write_text(json.dumps(config))
  prompt = ("--prompt=abc", "--max_new_tokens=3")
  with pytest.raises(SystemExit, match="2"):
    run(generate, f"--model={model}", *prompt)
  assert "--ignore=quantization_config" in capsys.readouterr().err
  keys = "--ignore=quantization_config,is_causal"
  assert run(generate, f"--model={model}", *prompt, keys) == run(
    generate, f"--model={folder / 'anchor'}", *prompt
  )
  assert "layers" in run(info, model, keys)
