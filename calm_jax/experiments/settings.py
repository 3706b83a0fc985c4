"""The settings of an experiment: every field with its type and its default.

The defaults of a stage stand in `training.stage.Stage`, those of a source of
text in `data.examples.ExampleSource`, and those of a connection in
`connections.Augmenting`.
"""

import dataclasses
from typing import Annotated, Any

from calm_jax.composition.connections import Augmenting
from calm_jax.composition.execution import Asked
from calm_jax.core.typed_fields import Count, CountOrRest, Range, Seed, typed
from calm_jax.experiments import variants
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.models.rope import Rope
from calm_jax.parallel import mesh
from calm_jax.parallel.rules import SHARDING
from calm_jax.training.stage import Stage


@dataclasses.dataclass(frozen=True)
class DecoderShape:
  """A decoder that the run trains from scratch; see `ModelConfig`."""

  width: Count = 128
  num_layers: Count = 4
  num_heads: Count = 4
  num_kv_heads: Count = 4
  mlp_width: Count = 352
  max_length: Count = 512
  # Base of the frequencies that positions turn with; short texts need a small
  # one, with which most of them turn.
  rope_theta: float = Rope.theta
  tie_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class Bits:
  """The bits of frozen models: "int8", "int4", or "" for all of them.

  A model that this run trains is quantised after that.
  """

  anchor: str = ""
  augmenting: str = ""


@dataclasses.dataclass(frozen=True)
class CompositionOptions:
  """Options of the composition; for the other fields see `Augmenting`.

  Connections are pairs (augmenting layer, anchor layer) counted from 1. Without
  any, num_connections are evenly spaced: 0 for a quarter of m_A's layers (§4).
  """

  connections: tuple[tuple[int, int], ...] = ()
  num_connections: int = 0
  visibility: str = Augmenting.visibility
  norm: bool = Augmenting.norm
  positions: str = Augmenting.positions
  output_init: str = Augmenting.output_init
  output_scale: str = Augmenting.output_scale
  control: str = Augmenting.control


@dataclasses.dataclass(frozen=True)
class Ablations:
  """The runs of `python -m calm_jax.ablations`."""

  kinds: tuple[str, ...] = tuple(variants.KINDS)
  trials: Count = 3  # of each kind
  minutes: float = 1.4  # of a run on two CPU cores, for the first estimate


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that a config file and the command line say about a run."""

  experiment: str  # a key of `recipe.EXPERIMENTS`
  task: Any  # of the experiment's `task_type`
  workdir: str = "runs/default"
  seed: Seed = 0  # of data, fresh parameters and samples
  # Trainable leaves and optimizer state are float32 always.
  dtype: str = "float32"
  # How models are computed, see `models.config.Compute`; what is "auto" or 0
  # `composition.execution` chooses, for the device and the stage.
  attention: str = Asked.attention
  remat: str = Asked.remat
  loss_chunk: Annotated[int, Range()] = Asked.loss_chunk
  unroll: Annotated[int, Range()] = Asked.unroll
  # Devices along each axis; -1, on one axis, for all that are left. All 1: one
  # device without a mesh.
  mesh: dict[str, CountOrRest] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(mesh.AXES, 1)
  )
  sharding: tuple[tuple[str, tuple], ...] = SHARDING  # see `parallel.rules`
  # Regexes of leaves that every device holds whole, whatever the rules say,
  # such as "augmenting/.*".
  replicated: tuple[str, ...] = ()
  distributed: bool = False  # whether this is one of several processes
  # Seconds to save in after a signal; spot machines are gone after 30.
  grace: float = 25.0
  # Seconds after which a step counts as hung, 0 for never; ten times that where
  # programs are compiled.
  watchdog: float = 1800.0
  # Steps of every stage that are traced for TensorBoard, such as "20:25" for
  # six of them; "" for none.
  profile: str = ""
  # Where numbers, tables and figures go, with commas: keys of
  # `training.trackers.TRACKERS`. Reports draw the loss from jsonl.
  trackers: str = "jsonl,tensorboard"
  heartbeat: Count = 100  # seconds after which a silent process counts as gone
  # Folders or hub ids; a model without one is trained from scratch, in the
  # shape of anchor_model or augmenting_model. Several m_A are a dict by name.
  anchor: str = ""
  augmenting: str | dict[str, str] = ""
  # A saved composition that the models of `augmenting` are added to, with an
  # anchor of its own.
  add_to: str = ""
  ignore: str = ""  # keys to read their config.json without, with commas
  # The name, in the tree of parameters, of a single m_A that has none.
  augmenting_name: str = "augmenting"
  quantise: Bits = Bits()
  anchor_model: DecoderShape = DecoderShape()
  augmenting_model: DecoderShape = DecoderShape()
  composition: CompositionOptions = CompositionOptions()
  # By the name of an augmenting model, where its options differ from those.
  compositions: dict[str, dict[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  recipe: tuple[str, ...] = ("compose",)  # names of the stages, in order
  stages: dict[str, Stage] = dataclasses.field(
    default_factory=lambda: {"compose": Stage()}
  )
  # Stages that make further compositions of the same frozen models, each from a
  # fresh start.
  alternatives: tuple[str, ...] = ()
  kind: str = "composed"  # this run's in tables, a key of `variants.KINDS`
  # Where in workdir the last stage and the results go; the stages before it are
  # in workdir itself, shared by all kinds.
  output: str = ""
  trial: int = 0  # added to the seed of the last stage
  # Of LoRA on the anchor in the last stage; 0 for none, -1 for about as many
  # parameters as the composition has.
  lora_rank: CountOrRest = 0
  random_augmenting: bool = False  # m_A has random weights instead of its own
  # Stages that train a vanilla m_A, in place of those on its domain.
  vanilla: tuple[str, ...] = ()
  ablations: Ablations = Ablations()
  # Of a composition, after training.
  audit: AuditOptions = dataclasses.field(default_factory=AuditOptions)

  @property
  def augmenting_paths(self) -> dict[str, str]:
    """The folders or hub ids of the augmenting models, by name."""
    if isinstance(self.augmenting, str):
      return {self.augmenting_name: self.augmenting}
    return self.augmenting

  @property
  def augmenting_sides(self) -> dict[str, str]:
    """The names of the augmenting models, by side.

    A side is the column of a model in results: "augmenting" if there is one,
    else "augmenting/<name>".
    """
    names = list(self.augmenting_paths)
    if len(names) == 1:
      return {"augmenting": names[0]}
    return {f"augmenting/{name}": name for name in names}

  @property
  def parts(self) -> dict[str, str]:
    """The names of the models in the tree of parameters, by side."""
    sides = self.augmenting_sides.items()
    return {"anchor": "anchor"} | {s: f"augmenting/{n}" for s, n in sides}

  @property
  def asked(self) -> Asked:
    """Returns the choices of kernels and memory that the settings make."""
    return Asked(self.attention, self.remat, self.loss_chunk, self.unroll)

  @property
  def checkpoints(self) -> dict[str, str]:
    """The folders or hub ids of the models that are loaded, by side."""
    paths, named = self.augmenting_paths, {"anchor": self.anchor}
    named |= {s: paths[n] for s, n in self.augmenting_sides.items()}
    return {side: path for side, path in named.items() if path}

  def composition_of(self, name: str) -> CompositionOptions:
    """The options of the augmenting model of a name."""
    own, shared = self.compositions.get(name, {}), vars(self.composition)
    if "num_connections" in own:
      shared = shared | {"connections": ()}
    where = f"config.compositions.{name}"
    return typed(CompositionOptions, shared | own, where)

  @property
  def last(self) -> Stage:
    """The stage that the recipe ends with."""
    return self.stages[self.recipe[-1]]

  @property
  def ends(self) -> tuple[str, ...]:
    """The names of the last stage and of its alternatives."""
    return (self.recipe[-1], *self.alternatives)

  @property
  def trial_seed(self) -> int:
    """The seed of the last stage; trials share the stages before it."""
    return self.seed + self.trial

  def stage_seed(self, name: str) -> int:
    """The seed of a stage."""
    return self.trial_seed if name in self.ends else self.seed
