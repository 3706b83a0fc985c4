"""What composing costs (Appendix C), and which models a run joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_jax.reporting.paper import C1
from calm_jax.reporting.runs import LABELS, Experiment, Run
from calm_jax.reporting.table import NOTHING, Table


def overhead(found: Sequence[Experiment]) -> Table:
  """Parameters, FLOPs and seconds; the paper's example beside each of ours."""
  columns = [_paper(), *(_column(one) for one in found)]
  named = [label for column in columns for label in column]
  labels = [*dict.fromkeys([*named, _TRAINING])]
  labels.sort(key=lambda label: _ORDER.index(label.split(" ")[0].strip(",:")))
  rows = [
    (label, *(column.get(label, NOTHING) for column in columns))
    for label in labels
  ]
  return Table(
    "overhead",
    "Overhead (Appendix C)",
    ("", "the paper's example", *(one.name for one in found)),
    rows,
    (
      "In brackets: the share of m_B's parameters or FLOPs.",
      "Appendix C.1 counts D_A D_B + 3 D_B² parameters a connection and "
      "forgets W^O: it is D_A D_B + 4 D_B² (and the norms, if any). It also "
      "counts the vocabulary's embedding once in every layer of m_B, which "
      "makes the share look smaller. The true numbers of its example, "
      "BERT-small in BERT-large, are worked out here.",
      "Appendix C.2 takes a token of training Θ_C to cost what one of training "
      "m_B does, 2% for 2% of the data, and C has nothing on inference. FLOPs "
      "are those of the program's matrix products, of one step or forward "
      "pass on the same batch; a dash where they were not counted.",
    ),
    beside="parameters, FLOPs and time",
  )


def ours(experiment: Experiment) -> str:
  """Which models ours are, in a sentence."""
  run = experiment.runs[0]
  both = ("augmenting", "anchor")
  # What was measured, if it says so: it may be one model by itself.
  known = run.results.get("parameters", both)
  sides = " and ".join(
    f"{LABELS[side]} is {_model(run, side)}" for side in both if side in known
  )
  return f"In ours {sides}: other models and other data than the paper's."


def _model(run: Run, side: str) -> str:
  count = run.results.get("parameters", {}).get(side)
  size = "" if count is None else f" ({count:,} parameters)"
  name = run.config.get(side)
  shape = run.config.get(f"{side}_model")
  if not name and shape:
    name = (
      f"trained here from scratch, {shape['num_layers']} layers of width "
      f"{shape['width']}"
    )
  # Of a folder its name is enough, a hub's id stays whole.
  name = Path(name).name if name and Path(name).is_absolute() else name
  return f"{name or 'not told'}{size}"


_THETA_PAPER = "Θ_C, counted as in C.1"
_THETA = "Θ_C, all of it"
_TRAINING = "FLOPs, training Θ_C"
_FORWARD = {
  "anchor": "forward pass of m_B", "composed": "forward pass, composed",
  "augmenting": "forward pass of m_A",
}  # fmt: skip
_ORDER = ("m_A", "m_B", "Θ_C", "trained", "FLOPs", "time")


def _paper() -> dict[str, str]:
  a, b = C1["augmenting_width"], C1["anchor_width"]
  layers, embedding = C1["anchor_layers"], C1["vocabulary"] * C1["anchor_width"]
  mlp = 2 * C1["mlp"] * b * b
  claimed = layers * (embedding + 3 * b * b + mlp)
  anchor = embedding + layers * (4 * b * b + mlp)
  theta = [C1["connections"] * (a * b + k * b * b) for k in (3, 4)]
  return {
    "m_B": f"{anchor:,}",
    "m_B, counted as in C.1": f"{claimed:,}",
    _THETA_PAPER: _share(theta[0], claimed),
    _THETA: _share(theta[1], anchor),
  }


def _column(experiment: Experiment) -> dict[str, str]:
  column: dict[str, str] = {}
  for run in experiment.runs:
    column |= {k: v for k, v in _of_run(run).items() if k not in column}
  return column


def _of_run(run: Run) -> dict[str, str]:
  counts = run.results.get("parameters", {})
  anchor = counts.get("anchor")
  made = {}
  for key, label in (("augmenting", "m_A"), ("anchor", "m_B")):
    if counts.get(key) is not None:
      made[label] = f"{counts[key]:,}"
  for key, label in (
    ("composition_paper_count", _THETA_PAPER),
    ("composition", _THETA),
  ):
    if counts.get(key) is not None:
      made[label] = _share(counts[key], anchor)
  if counts.get("trained") is not None:
    kind = LABELS.get(run.kind, run.kind)
    trained = _share(counts["trained"], anchor)
    if more := counts.get("trained_minus_composition"):
      trained += f", {more:+,} against Θ_C"
    made[f"trained: {kind}"] = trained
  made |= _flops(run.results.get("flops", {}))
  for stage, seconds in run.results.get("seconds", {}).items():
    made[f"time of {stage}"] = _duration(seconds)
  return made


def _flops(flops: Mapping[str, Any]) -> dict[str, str]:
  """Of what is trained or run, with its share of the same of all of m_B."""
  made = {}
  for part, name in (
    ("anchor", "all of m_B"), ("composed", "Θ_C"),
    ("lora", "a LoRA of m_B"), ("augmenting", "all of m_A"),
  ):  # fmt: skip
    for kind in ("step", "forward"):
      count, alone = (flops.get(f"{p}_{kind}") for p in (part, "anchor"))
      if count is not None:
        what = f"training {name}" if kind == "step" else _FORWARD[part]
        share = f" ({100 * count / alone:.0f}%)" if alone else ""
        made[f"FLOPs, {what}"] = f"{count:.3g}{share}"
  return made


def _share(count: int, anchor: int | None) -> str:
  share = f" ({100 * count / anchor:.1f}%)" if anchor else ""
  return f"{count:,}{share}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
  )
