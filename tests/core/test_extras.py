"""What only some commands need is an extra, which the error names."""

from __future__ import annotations

import configparser
import pathlib
import sys

import pytest

from calm_jax import generate, report
from calm_jax.core.errors import InputError
from calm_jax.data import records
from calm_jax.evals import tasks
from calm_jax.models import quantisation
from calm_jax.reporting import figures

OPTIONS = {"group": "g", "language": "en", "shots": 1, "max_new_tokens": 9}


CONFIG = configparser.ConfigParser()
CONFIG.read(pathlib.Path(__file__).parents[2] / "setup.cfg")
EXTRAS = CONFIG["options.extras_require"]


def draw(folder):
  figures.loss_figure({"a": [{"step": 1, "loss": 2.0}]})


def translate(folder):
  """Reads the evaluation, as an experiment does before it trains."""
  for name in ("path", "target"):
    (folder / name).write_text("a\nb\nc\n")
  files = {name: str(folder / name) for name in ("path", "target")}
  options = {"language": "lij_Latn", "rows": ":1", "pool_rows": "1:"}
  tasks.make({"kind": "translation", **OPTIONS, **options, **files})


def translate_problems(folder):
  files = {"path": "none", "pool": "none", "returned": "none"}
  tasks.make({"kind": "silver", **OPTIONS, **files})


@pytest.fixture
def without(monkeypatch):
  """Makes imports of a package fail, as where it is not installed."""

  def remove(package: str) -> None:
    theirs = [n for n in sys.modules if n.partition(".")[0] == package]
    for name in (package, *theirs):
      monkeypatch.setitem(sys.modules, name, None)

  return remove


@pytest.mark.parametrize(
  "package, extra, ask",
  [
    ("matplotlib", "report", draw),
    ("qwix", "quant", lambda _: quantisation.quantise({}, "int4")),
    ("sacrebleu", "sacrebleu", translate),
    ("sacrebleu", "sacrebleu", translate_problems),
    ("datasets", "hf", lambda _: [*records.hf("a", "train")]),
  ],
)
def test_an_error_names_the_extra(package, extra, ask, without, tmp_path):
  without(package)
  with pytest.raises(InputError) as caught:
    ask(tmp_path)
  for words in (f"package {package} is not", f"install 'calm_jax[{extra}]'"):
    assert words in str(caught.value)
  assert f"\n{package}>=" in EXTRAS[extra]
  assert f"\n{package}>=" not in CONFIG["options"]["install_requires"]


def test_a_picture_of_attention_is_refused_before_a_model_is_loaded(
  without, monkeypatch
):
  without("matplotlib")
  flags = ["--model=none", "--prompt=a", "--attention=a.png"]
  monkeypatch.setattr(sys, "argv", ["generate", *flags])
  with pytest.raises(InputError, match=r"calm_jax\[report\]"):
    generate.main()


def test_a_run_without_matplotlib_says_so_and_writes_its_numbers(
  without, tmp_path, capsys
):
  without("matplotlib")
  draw = report.can_draw()
  assert "pip install 'calm_jax[report]'" in capsys.readouterr().out
  numbers = {"perplexity": {"a": {"anchor": 2.5}}}
  report.write_results(tmp_path, numbers, draw)
  report.log_results(tmp_path, [], draw)
  assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
