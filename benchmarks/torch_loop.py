"""Trains a composition in PyTorch in the plainest way, to be compared with.

Two models of transformers, frozen; forward hooks keep the hidden states of one
and add the cross-attention's output to those of the other; SDPA, one dtype for
everything, AdamW on the composition. It does nothing clever, and nothing that
is needlessly slow: the augmenting model has no head and no gradients, and the
cross-attention is causal. SDPA has no soft cap of scores, so a Gemma-2 is made
without its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks.machine import Clock
from calm_jax.core.batch import Batch


def device() -> str:
  """Where PyTorch runs beside JAX.

  Raises:
    ImportError: JAX has an accelerator that this PyTorch has not.
  """
  if jax.default_backend() == "cpu":
    return "cpu"
  if not torch.cuda.is_available():
    raise ImportError("this torch has no CUDA device")
  return "cuda"


def random_model(
  config: dict[str, Any], dtype: str, device: str, head: bool = True
):
  """A model of a config.json with random weights, made where it will be."""
  config = dict(config)
  kind = config.pop("model_type")
  if kind == "gemma2":
    config["attn_logit_softcapping"] = None
  config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  settings = transformers.AutoConfig.for_model(kind, **config)
  auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
  with torch.device(device):
    model = auto.from_config(
      settings, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
  return with_sdpa(model)


def with_sdpa(model):
  """The model with SDPA, which transformers grants no Gemma-2 at all.

  Raises:
    ValueError: its scores have a soft cap, which SDPA would leave out.
  """
  if getattr(model.config, "attn_logit_softcapping", None) is not None:
    raise ValueError("SDPA has no soft cap of scores, and this model has one")
  # Set from outside: transformers refuses by the class, cap or none.
  model.config._attn_implementation = "sdpa"
  return model


class CrossAttention(torch.nn.Module):
  """f_cross(f_proj(H_A), H_B), with the norms that calm_jax has before each."""

  def __init__(self, small: int, large: int, heads: int, eps: float):
    super().__init__()
    self.heads = heads
    self.projection_norm = torch.nn.RMSNorm(small, eps)
    self.query_norm = torch.nn.RMSNorm(large, eps)
    inner = heads * (large // heads)
    for name, inputs, outputs in (
      ("projection", small, large), ("query", large, inner),
      ("key", large, inner), ("value", large, inner), ("output", inner, large),
    ):  # fmt: skip
      self.add_module(name, torch.nn.Linear(inputs, outputs, bias=False))
    torch.nn.init.zeros_(self.output.weight)

  def forward(self, x_BLD, h_BLE):
    memory_BLD = self.projection(self.projection_norm(h_BLE))
    out_BNLH = F.scaled_dot_product_attention(
      self._heads(self.query(self.query_norm(x_BLD))),
      self._heads(self.key(memory_BLD)),
      self._heads(self.value(memory_BLD)),
      is_causal=True,
    )
    return self.output(out_BNLH.transpose(1, 2).flatten(2))

  def _heads(self, x):
    return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Loop:
  """Steps of training, each called by itself.

  Args:
    anchor: a causal language model of transformers.
    augmenting: a model of transformers without a head.
    connections: pairs of layers (augmenting, anchor), from 1.
    batch: see `steps.batch_of`; one segment a row.
    learning_rate: of AdamW.
  """

  def __init__(
    self,
    anchor: torch.nn.Module,
    augmenting: torch.nn.Module,
    connections: Sequence[tuple[int, int]],
    batch: Batch,
    learning_rate: float = 1e-4,
  ):
    self.anchor = anchor.eval().requires_grad_(False)
    self.augmenting = augmenting.eval().requires_grad_(False)
    big, small = anchor.config, augmenting.config
    one = next(anchor.parameters())
    self.crosses = torch.nn.ModuleList(
      CrossAttention(
        small.hidden_size, big.hidden_size, big.num_attention_heads,
        big.rms_norm_eps,
      )
      for _ in connections
    ).to(one.device, one.dtype)  # fmt: skip
    self.states: dict[int, torch.Tensor] = {}
    for cross, (source, target) in zip(self.crosses, connections, strict=True):
      augmenting.layers[source - 1].register_forward_hook(self._keep(source))
      anchor.model.layers[target - 1].register_forward_hook(
        self._add(cross, source)
      )
    self.tokens, self.targets = (
      torch.from_numpy(np.int64(ids)).to(one.device)
      for ids in (batch.anchor.tokens, batch.targets)
    )
    self.optimizer = torch.optim.AdamW(
      self.crosses.parameters(),
      lr=learning_rate,
      betas=(0.9, 0.95),
      weight_decay=0.0,
    )

  def _keep(self, layer: int):
    def hook(module, arguments, out):
      self.states[layer] = out[0] if isinstance(out, tuple) else out

    return hook

  def _add(self, cross, layer: int):
    def hook(module, arguments, out):
      if isinstance(out, tuple):
        return (out[0] + cross(out[0], self.states[layer]), *out[1:])
      return out + cross(out, self.states[layer])

    return hook

  @property
  def parameters(self) -> int:
    return sum(p.numel() for p in self.crosses.parameters())

  def update(self) -> torch.Tensor:
    """One step; returns the loss, the mean over all targets in nats."""
    with torch.no_grad():
      self.augmenting(input_ids=self.tokens, use_cache=False)
    logits = self.anchor(input_ids=self.tokens, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), self.targets.flatten())
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  def __call__(self, clock: Clock = time.perf_counter) -> float:
    """Seconds of a step, the device's work included."""
    self._wait()
    began = clock()
    self.update()
    self._wait()
    return clock() - began

  def _wait(self) -> None:
    if self.tokens.is_cuda:
      torch.cuda.synchronize()
