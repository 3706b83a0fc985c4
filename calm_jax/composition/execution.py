"""Chooses how models are computed on a device, where a user leaves that open.

Kernels of attention, chunks of the loss, what the backward pass computes again,
and how many layers a loop runs at a time depend on the platform, the shapes,
the dtype and the device's memory. All of it is decided here.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from calm_jax.composition.connections import Composition
from calm_jax.models import attention
from calm_jax.models.config import ModelConfig

# How decoding holds layers: in stacks, as views of them, or copied and joined.
LAYOUTS = ("stacked", "apart", "joined")
# Of a GPU's memory, the share that stays free beside a second copy of layers.
_SPARE = 0.1
# Fewer rows are too thin a product of matrices to keep an accelerator busy.
_LEAST_ROWS = 1024
# The least positions and logits for a CPU; few at a time are few in vain, where
# most positions have no loss.
_CPU_ROWS, _CPU_LOGITS = 512, 2**22
_CHUNKS = 8  # if each has enough rows: those without a loss are skipped
_LANES = 128  # A chunk is a multiple of it.
# The share of a device's memory that the logits of a chunk may take. A logit
# takes 10 bytes: float32, its gradient in float32, and once more in bfloat16.
_LOGITS_SHARE, _LOGIT = 1 / 12, 10
# Bytes that "none" keeps of a layer, in those of its products of matrices:
# measured 3.3 and 2.7 for Gemma 2 2B and Qwen 3 8B compiled for an H100.
_NONE_OVER_DOTS = 3.3
_LAYERS_AT_WORK = 3  # whose activations are there at once, whatever is kept
_SLACK = 1.1  # of the estimate, before it counts as fitting
_UNKNOWN = 16 * 2**30  # bytes of an accelerator that does not tell its memory
# Layers of up to this size gain from a loop that runs several at a time on a
# CPU, where each turn has its cost; larger ones only compile for longer.
_SMALL_LAYER, _UNROLL = 2**19, 4
# A GPU trains small models without a loop. The loop would copy what the
# backward pass needs of each layer into stacks and out of them again, a tenth
# of a step of width 384; in wide layers products of matrices outweigh that.
_SMALL_GPU_LAYER, _FEW_LAYERS = 2**21, 12


class Device(NamedTuple):
  """The kind of device that computes."""

  platform: str  # "cpu", "gpu" or "tpu"
  compute_capability: str = ""  # of a GPU, such as "9.0"
  memory: int | None = None  # bytes that JAX may use; None if not known

  @classmethod
  def here(cls) -> Self:
    """Describes the first device of this process."""
    return cls.of(jax.devices()[0])

  @classmethod
  def of(cls, device: jax.Device) -> Self:
    """Describes a device of this process."""
    memory = None
    if device.platform != "cpu":
      memory = (device.memory_stats() or {}).get("bytes_limit")
    capability = getattr(device, "compute_capability", "")
    return cls(device.platform, str(capability), memory)


@dataclasses.dataclass(frozen=True)
class Asked:
  """The choices that a user may make; the defaults leave all to `choose`."""

  attention: str = "auto"  # see `attention.choose`
  remat: str = "auto"  # or one of `config.REMATS`
  loss_chunk: int = 0  # positions; 0 leaves it open
  unroll: int = 0  # layers; 0 leaves it open


class Work(NamedTuple):
  """One device's share of a training step."""

  model: str  # that is trained: "composed", "anchor" or "augmenting/<name>"
  rows: int  # of a piece of the batch
  length: int  # tokens of a row
  resident: int = 0  # bytes of parameters and of the optimizer's state
  packed: bool = True  # whether a row may hold several segments


def for_inference(
  spec: Composition, asked: Asked, device: Device
) -> Composition:
  """Returns the composition with the kernels and loops that suit a device.

  Raises InputError for a kernel that is asked for and cannot be had.
  """
  configs = models(spec)
  return spec.with_compute(
    lambda part: {
      "attention": attention.choose(asked.attention, device, configs[part]),
      "unroll": asked.unroll or _unroll(configs[part], device),
    }
  )


def for_training(
  spec: Composition, asked: Asked, device: Device, work: Work
) -> Composition:
  """Does the same, and chooses what the loss and the backward pass keep."""
  spec = for_inference(spec, asked, device)
  head = "anchor" if work.model == "composed" else work.model
  config = models(spec)[head]
  rows = asked.loss_chunk or _chunk(config.vocab_size, device, work)
  remat = asked.remat
  if remat == "auto":
    remat = _remat(spec, config, rows, device, work)
  how = {"remat": remat, "loss_chunk": rows, "packed": work.packed}
  spec = spec.with_compute(lambda _: how)
  # Without a loop the compiler may keep what it should compute again.
  needed = _needed(spec, config, rows, work, _NONE_OVER_DOTS)
  if asked.unroll or device.platform != "gpu" or not _fits(needed, device):
    return spec
  configs = models(spec)
  return spec.with_compute(lambda part: {"unroll": _unlooped(configs[part])})


def layout(device: Device, devices: int, size: int, free: int | None) -> str:
  """Chooses how decoding holds layers, one of LAYOUTS.

  XLA's backends for CPUs and GPUs copy the slices of a stack. Views cost
  nothing on one CPU; one NVIDIA GPU needs room for a copy of all layers. A TPU
  slices without a copy; on several devices `decoder.run_layers` gathers a layer
  at a time.

  Args:
    device: the kind of device.
    devices: how many hold the parameters.
    size: bytes of all layers.
    free: bytes of its memory that are not in use; None if not known.
  """
  if devices > 1 or device.platform == "tpu":
    return "stacked"
  if device.platform == "cpu":
    return "apart"
  if attention.nvidia_generation(device) < 8:
    return "stacked"
  if free is None or device.memory is None:
    return "joined"
  fits = size + _SPARE * device.memory <= free
  return "joined" if fits else "stacked"


def models(spec: Composition) -> dict[str, ModelConfig]:
  """Returns the models of a composition by their names in its parameters."""
  augmenting = {f"augmenting/{n}": a.config for n, a in spec.augmenting}
  return {"anchor": spec.anchor} | augmenting


def describe(spec: Composition, work: Work) -> dict[str, str]:
  """Says how a stage's models are computed, by what was chosen."""
  parts = models(spec)
  trained = parts["anchor" if work.model == "composed" else work.model]
  if work.model != "composed":
    parts = {work.model: trained}
  kernels = {part: c.compute.attention for part, c in parts.items()}
  attention_text = trained.compute.attention
  if len(set(kernels.values())) > 1:
    attention_text = ", ".join(f"{k} ({part})" for part, k in kernels.items())
  compute, positions = trained.compute, work.rows * work.length
  rows = min(compute.loss_chunk or positions, positions)
  chunks = math.ceil(positions / rows)
  return {
    "attention": attention_text,
    "loss": f"{chunks} x {rows:,} tokens" if chunks > 1 else "all tokens",
    "remat": compute.remat,
    "unroll": str(compute.unroll),
  }


def resident_bytes(trainable: Any, frozen: Any) -> int:
  """Counts the bytes that a device holds of parameters during training.

  Each trained number is kept in float32 with its gradient and two moments of
  the optimizer. Leaves are arrays or shapes, whole if they have no sharding.
  """
  trained = sum(map(_size, jax.tree.leaves(trainable)))
  kept = sum(_size(x) * x.dtype.itemsize for x in jax.tree.leaves(frozen))
  return 4 * 4 * trained + kept


def _size(leaf: Any) -> int:
  sharding = getattr(leaf, "sharding", None)
  shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
  return math.prod(shape)


def _chunk(vocabulary: int, device: Device, work: Work) -> int:
  """Chooses how many positions the head computes at a time."""
  positions = work.rows * work.length
  if device.platform == "cpu":
    most = max(_CPU_ROWS, _CPU_LOGITS // vocabulary)
    return math.ceil(positions / math.ceil(positions / most))
  memory, logits = device.memory or _UNKNOWN, _LOGIT * vocabulary
  most = int(memory * _LOGITS_SHARE / logits)
  if most < _LEAST_ROWS and 4 * _LEAST_ROWS * logits <= memory - work.resident:
    most = _LEAST_ROWS
  most = min(most, max(_LEAST_ROWS, positions // _CHUNKS))
  chunks = math.ceil(positions / max(most, _LANES))
  rows = math.ceil(positions / chunks / _LANES) * _LANES
  return min(max(rows, min(most, _LEAST_ROWS)), positions)


def _remat(
  spec: Composition, config: ModelConfig, rows: int, device: Device, work: Work
) -> str:
  """Chooses what is computed again: the least that fits.

  To keep everything pays on CPUs alone, and where all layers run in one loop:
  elsewhere reading it back takes longer than computing it.
  """
  if device.platform == "cpu":
    connections = spec.connections() if work.model == "composed" else []
    cut = any(c.anchor < spec.anchor.num_layers for _, c in connections)
    return "dots" if cut else "none"
  needed = _needed(spec, config, rows, work)
  return "dots" if _fits(needed, device) else "full"


def _needed(
  spec: Composition, config: ModelConfig, rows: int, work: Work, kept=1.0
) -> float:
  """Estimates the bytes of a step that keeps so many times what "dots" does."""
  connections = spec.connections() if work.model == "composed" else []
  first = min((c.anchor for _, c in connections), default=0)
  kernel = config.compute.attention
  layer = activation_bytes(config, kernel, work.rows, work.length)
  needed = work.resident + _LAYERS_AT_WORK * layer
  needed += rows * config.vocab_size * _LOGIT
  return needed + (config.num_layers - first) * kept * layer


def _fits(needed: float, device: Device) -> bool:
  return _SLACK * needed <= (device.memory or _UNKNOWN)


def activation_bytes(
  config: ModelConfig, kernel: str, rows: float, length: int, tensor: int = 1
) -> float:
  """Estimates the bytes of what "dots" keeps of a layer.

  `tensor` is the number of devices that share the work of a matrix.
  """
  number = jnp.dtype(config.compute.dtype).itemsize
  heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  experts = config.experts_per_token or 1
  inner = (heads + 2 * config.mlp_width * experts) / tensor
  total = rows * length * (2 * config.width + inner) * number
  if kernel == "xla":  # It keeps the scores in float32.
    total += 4 * rows * length**2 * config.num_heads / tensor
  if kernel in ("cudnn", "pieces"):  # Its output, and statistics of cuDNN's.
    outputs = config.num_heads * (config.head_dim * number + 4)
    total += rows * length * outputs / tensor
  return total


def kept_bytes(
  config: ModelConfig,
  remat: str,
  kernel: str,
  rows: float,
  length: int,
  tensor: int = 1,
) -> float:
  """Estimates the bytes that the backward pass finds of a layer."""
  if remat == "full":
    itemsize = jnp.dtype(config.compute.dtype).itemsize
    return rows * length * config.width * itemsize
  layer = activation_bytes(config, kernel, rows, length, tensor)
  return layer * (_NONE_OVER_DOTS if remat == "none" else 1)


def _unroll(config: ModelConfig, device: Device) -> int:
  """Chooses how many layers a turn of the loop over layers runs."""
  is_small = device.platform == "cpu" and _layer_size(config) < _SMALL_LAYER
  return min(_UNROLL, config.num_layers) if is_small else 1


def _unlooped(config: ModelConfig) -> int:
  """Chooses all layers of a small model on a GPU, or else 1."""
  is_small = _layer_size(config) < _SMALL_GPU_LAYER
  few = config.num_layers <= _FEW_LAYERS
  return config.num_layers if is_small and few else 1


def _layer_size(config: ModelConfig) -> int:
  """Counts the weights of the matrices of a layer, of one expert."""
  attention_size = 2 * config.width * config.head_dim
  attention_size *= config.num_heads + config.num_kv_heads
  matrices = 3 if config.gated_mlp else 2
  return attention_size + matrices * config.width * config.mlp_width
