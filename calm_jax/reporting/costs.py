"""The costs of composing (Appendix C), and the models that a run joined."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_jax.reporting import paper
from calm_jax.reporting.runs import LABELS, Run, RunGroup
from calm_jax.reporting.table import NOTHING, Table

# A row is named by its section, which orders the table, and its label.
_Label = tuple[str, str]
_SECTIONS = ("m_A", "m_B", "Θ_C", "trained", "FLOPs", "time")
_COUNTED_BY_C1: _Label = ("Θ_C", "Θ_C, counted as in C.1")
_COMPOSITION: _Label = ("Θ_C", "Θ_C, all of it")
_TRAINING: _Label = ("FLOPs", "FLOPs, training Θ_C")
_FLOPS = {
  "anchor_step": "training all of m_B",
  "anchor_forward": "forward pass of m_B",
  "composed_step": "training Θ_C",
  "composed_forward": "forward pass, composed",
  "lora_step": "training a LoRA of m_B",
  "augmenting_step": "training all of m_A",
  "augmenting_forward": "forward pass of m_A",
}
_NOTES = (
  "In brackets: the share of m_B's parameters or FLOPs.",
  "Appendix C.1 counts D_A D_B + 3 D_B² parameters a connection and forgets "
  "W^O: it is D_A D_B + 4 D_B² (and the norms, if any). It also counts the "
  "vocabulary's embedding once in every layer of m_B, which makes the share "
  "look smaller. The true numbers of its example, BERT-small in BERT-large, "
  "are worked out here.",
  "Appendix C.2 takes a token of training Θ_C to cost what one of training m_B "
  "does, 2% for 2% of the data, and C has nothing on inference. FLOPs are "
  "those of the program's matrix products, of one step or forward pass on the "
  "same batch; a dash where they were not counted.",
)


def overhead(groups: Sequence[RunGroup]) -> Table:
  """Parameters, FLOPs and seconds of the paper's example and of each group."""
  columns = [_paper_column(), *map(_column, groups)]
  labels = dict.fromkeys(label for column in columns for label in column)
  labels.setdefault(_TRAINING)
  ordered = sorted(labels, key=lambda label: _SECTIONS.index(label[0]))
  return Table(
    "overhead",
    "Overhead (Appendix C)",
    ("", "the paper's example", *(group.name for group in groups)),
    [
      (label[1], *(column.get(label, NOTHING) for column in columns))
      for label in ordered
    ],
    _NOTES,
    caption="parameters, FLOPs and time",
  )


def describe_models(group: RunGroup) -> str:
  """A sentence that names the models of a group."""
  run = group.runs[0]
  both = ("augmenting", "anchor")
  # An evaluation may be of a single model; a run joins two.
  measured = run.results.get("parameters", both)
  sides = " and ".join(
    f"{LABELS[side]} is {_describe(run, side)}"
    for side in both
    if side in measured
  )
  return f"In ours {sides}: other models and other data than the paper's."


def _describe(run: Run, side: str) -> str:
  name = run.config.get(side)
  shape = run.config.get(f"{side}_model")
  if not name and shape:
    name = (
      f"trained here from scratch, {shape['num_layers']} layers of width "
      f"{shape['width']}"
    )
  if name and Path(name).is_absolute():
    name = Path(name).name  # the id of a hub stays whole
  count = run.results.get("parameters", {}).get(side)
  size = "" if count is None else f" ({count:,} parameters)"
  return f"{name or 'not told'}{size}"


def _paper_column() -> dict[_Label, str]:
  count = paper.C1
  return {
    ("m_B", "m_B"): f"{count['anchor']:,}",
    ("m_B", "m_B, counted as in C.1"): f"{count['paper_anchor']:,}",
    _COUNTED_BY_C1: _share(count["paper_composition"], count["paper_anchor"]),
    _COMPOSITION: _share(count["composition"], count["anchor"]),
  }


def _column(group: RunGroup) -> dict[_Label, str]:
  """The numbers of a group; of a label that several runs have, the first's."""
  column: dict[_Label, str] = {}
  for run in group.runs:
    for label, text in _costs(run).items():
      column.setdefault(label, text)
  return column


def _costs(run: Run) -> dict[_Label, str]:
  counts = run.results.get("parameters", {})
  anchor = counts.get("anchor")
  costs: dict[_Label, str] = {}
  for side in ("augmenting", "anchor"):
    if counts.get(side) is not None:
      costs[LABELS[side], LABELS[side]] = f"{counts[side]:,}"
  if counts.get("composition_paper_count") is not None:
    costs[_COUNTED_BY_C1] = _share(counts["composition_paper_count"], anchor)
  if counts.get("composition") is not None:
    costs[_COMPOSITION] = _share(counts["composition"], anchor)
  if counts.get("trained") is not None:
    trained = _share(counts["trained"], anchor)
    if more := counts.get("trained_minus_composition"):
      trained += f", {more:+,} against Θ_C"
    costs["trained", f"trained: {LABELS.get(run.kind, run.kind)}"] = trained
  costs |= _flops(run.results.get("flops", {}))
  for stage, seconds in run.results.get("seconds", {}).items():
    costs["time", f"time of {stage}"] = _duration(seconds)
  return costs


def _flops(flops: Mapping[str, Any]) -> dict[_Label, str]:
  """FLOPs with their share of the same (step, forward pass) of all of m_B."""
  costs = {}
  for key, what in _FLOPS.items():
    count, anchor = flops.get(key), flops.get(f"anchor_{key.split('_')[1]}")
    if count is not None:
      share = f" ({100 * count / anchor:.0f}%)" if anchor else ""
      costs["FLOPs", f"FLOPs, {what}"] = f"{count:.3g}{share}"
  return costs


def _share(count: int, anchor: int | None) -> str:
  share = f" ({100 * count / anchor:.1f}%)" if anchor else ""
  return f"{count:,}{share}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"
