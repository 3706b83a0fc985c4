"""The costs of composing (Appendix C), and the models that a run joined."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from calm_jax.reporting import paper
from calm_jax.reporting.runs import Run, RunGroup, model_label
from calm_jax.reporting.table import NOTHING, Table

# How the rows' labels begin, in the order of the table.
_SECTIONS = ("m_A", "m_B", "Θ_C", "trained", "FLOPs", "time")
_COUNTED_BY_C1 = "Θ_C, counted as in C.1"
_COMPOSITION = "Θ_C, all of it"
_TRAINING = "FLOPs, training Θ_C"
_FLOPS = {
  "anchor_step": "FLOPs, training all of m_B",
  "anchor_forward": "FLOPs, forward pass of m_B",
  "composed_step": _TRAINING,
  "composed_forward": "FLOPs, forward pass, composed",
  "lora_step": "FLOPs, training a LoRA of m_B",
  "augmenting_step": "FLOPs, training all of m_A",
  "augmenting_forward": "FLOPs, forward pass of m_A",
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
  "same batch, or of all steps of a stage; a dash where they were not "
  "counted.",
)


def overhead(groups: Sequence[RunGroup]) -> Table:
  """Parameters, FLOPs and seconds of the paper's example and of each group."""
  columns = [_paper_column(), *map(_column, groups)]
  labels = [label for column in columns for label in column]
  labels = sorted(dict.fromkeys([*labels, _TRAINING]), key=_section)
  return Table(
    "overhead",
    "Overhead (Appendix C)",
    ("", "the paper's example", *(group.name for group in groups)),
    [
      (label, *(column.get(label, NOTHING) for column in columns))
      for label in labels
    ],
    _NOTES,
    caption="parameters, FLOPs and time",
  )


def describe_models(group: RunGroup) -> str:
  """A sentence that names the models of a group."""
  run = group.runs[0]
  # An evaluation may be of a single model; a run joins two or more.
  sides = " and ".join(
    f"{model_label(side)} is {_describe(run, side)}" for side in run.sides
  )
  return f"In ours {sides}: other models and other data than the paper's."


def _describe(run: Run, side: str) -> str:
  kind, _, part = side.partition("/")
  name = run.config.get(side) or run.config.get(kind)
  if isinstance(name, Mapping):
    name = name.get(part) if part else next(iter(name.values()))
  shape = run.config.get(f"{kind}_model")
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


def _section(label: str) -> int:
  return [label.startswith(name) for name in _SECTIONS].index(True)


def _paper_column() -> dict[str, str]:
  count = paper.C1
  return {
    "m_B": f"{count['anchor']:,}",
    "m_B, counted as in C.1": f"{count['paper_anchor']:,}",
    _COUNTED_BY_C1: _share(count["paper_composition"], count["paper_anchor"]),
    _COMPOSITION: _share(count["composition"], count["anchor"]),
  }


def _column(group: RunGroup) -> dict[str, str]:
  """The numbers of a group; of a label that several runs have, the first's."""
  column: dict[str, str] = {}
  for run in group.runs:
    column |= {k: v for k, v in _costs(run).items() if k not in column}
  return column


def _costs(run: Run) -> dict[str, str]:
  """The texts of a run's parameters, FLOPs and seconds by their labels."""
  counts, flops = (run.results.get(k, {}) for k in ("parameters", "flops"))
  anchor, trained = counts.get("anchor"), f"trained: {run.label}"
  costs = {
    label: _share(counts[name], whole)
    for name, label, whole in (
      *((side, model_label(side), None) for side in run.sides),
      ("composition_paper_count", _COUNTED_BY_C1, anchor),
      ("composition", _COMPOSITION, anchor),
      ("trained", trained, anchor),
    )
    if counts.get(name) is not None
  }
  more = counts.get("trained_minus_composition")
  if more and trained in costs:
    costs[trained] += f", {more:+,} against Θ_C"
  for name, label in _FLOPS.items():
    # The share is that of the same (step, forward pass) of all of m_B.
    count, whole = flops.get(name), flops.get(f"anchor_{name.split('_')[1]}")
    if count is not None:
      share = f" ({100 * count / whole:.0f}%)" if whole else ""
      costs[label] = f"{count:.3g}{share}"
  for stage, count in run.results.get("stage_flops", {}).items():
    if count is not None:
      costs[f"FLOPs, all steps of {stage}"] = f"{count:.3g}"
  for stage, seconds in run.results.get("seconds", {}).items():
    costs[f"time of {stage}"] = _duration(seconds)
  return costs


def _share(count: int, whole: int | None) -> str:
  share = f" ({100 * count / whole:.1f}%)" if whole else ""
  return f"{count:,}{share}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"
