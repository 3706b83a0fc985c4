"""The overhead of compositions that are not made yet, as printed."""

from __future__ import annotations

import helpers
import pytest

from calm_jax import cli, info
from calm_jax.composition.connections import Connection
from calm_jax.models.hf import export
from calm_jax.planning import overhead


@pytest.fixture
def run(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "160")

  def run(*arguments) -> str:
    monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
    cli.guarded(info.main)
    return capsys.readouterr().out

  return run


def cells(out: str, what: str) -> list[str]:
  [line] = [line for line in out.splitlines() if what in line]
  return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_papers_example(run):
  out = run("--example=bert")
  assert cells(out, "parameters of m_B") == [
    "≈1B", "1,014,104,064", "333,555,712"
  ]  # fmt: skip
  assert cells(out, "parameters of Θ_C") == ["≈15M", "14,680,064", "18,874,368"]
  assert cells(out, "Θ_C / m_B") == ["1.5%", "1.4%", "5.7%"]
  assert cells(out, "training Θ_C on 2% of the data, m_A") == [
    "12%", "9.2%", "9.8%"
  ]  # fmt: skip


def test_a_plan(run, tmp_path):
  for i, name in enumerate(("anchor", "augmenting")):
    export.save_params(tmp_path / name, *helpers.model(i, vocab_size=14))
  named = [f"--{n}={tmp_path / n}" for n in ("anchor", "augmenting")]
  spec = info.plan(*(str(tmp_path / n) for n in ("anchor", "augmenting")), 2)
  [(_, joined)] = spec.augmenting
  assert joined.connections == (Connection(2, 2), Connection(4, 4))
  shape = "--batch_size=3", "--length=9", "--augmenting_length=11"
  out = run(*named, "--connections=2", *shape, "--data_share=0.5")
  steps = overhead.training_flops(spec, 3, 9, 11)
  counts = overhead.parameters(spec)
  assert cells(out, "parameters of Θ_C") == [
    f"{counts['paper_composition']:,}", f"{counts['composition']:,}"
  ]  # fmt: skip
  share = steps["composed_step"] / steps["anchor_step"]
  assert cells(out, "step: Θ_C") == ["100.0%", f"{share:.1%}"]
  assert f"{0.5 * share:.1%}" in cells(out, "on 50% of the data  ")
  assert f"m_B is {steps['anchor_step']:.3g} FLOPs" in out


def test_a_plan_of_several(run, tmp_path):
  for i, name in enumerate(("anchor", "law", "lr=1")):
    changes = {"vocab_size": 14, "num_layers": 4 + i}
    export.save_params(tmp_path / name, *helpers.model(i, **changes))
  law, code = str(tmp_path / "law"), str(tmp_path / "lr=1")
  out = run(
    f"--anchor={tmp_path / 'anchor'}", f"--augmenting=law={law},c={code}"
  )
  assert f"augmenting/law: {law}" in out and f"augmenting/c: {code}" in out
  spec = info.plan(str(tmp_path / "anchor"), f"law={law},c={code}", 2)
  layers = {name: joined.config.num_layers for name, joined in spec.augmenting}
  assert layers == {"law": 5, "c": 6}
  [(name, _)] = info.plan(str(tmp_path / "anchor"), code).augmenting
  assert name == "m_A"


@pytest.mark.parametrize(
  "arguments",
  [
    (), ("--anchor=a",), ("a", "--example=bert"), ("a", "--connections=x"),
    ("--example=bert", "--length=0"),
  ],
)  # fmt: skip
def test_wrong_usage(run, arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    run(*arguments)
  assert stopped.value.code == 2
  assert "error:" in capsys.readouterr().err


def test_impossible_plans(run, tmp_path, capsys):
  export.save_params(tmp_path / "m", *helpers.model(0, vocab_size=14))
  both = f"--anchor={tmp_path / 'm'}", f"--augmenting={tmp_path / 'm'}"
  with pytest.raises(SystemExit):
    run(*both, "--connections=5")
  assert "5 connections are impossible" in capsys.readouterr().err
