"""A CALM composition in PyTorch, the code of an exported folder.

It needs torch and transformers only. The models are transformers' own; their
layers run in `CalmForCausalLM.forward`, one by one. All read the same ids.

Visibility: an anchor position attends to the tokens of m_A up to and including
its own (with visibility="unmasked", to all that are given), never to padding.

B batch, L new tokens, S all, N heads, H their width, D anchor's width, E m_A's.
"""

import hashlib
import inspect
import itertools
import os

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# transformers 4 reads the models' configs without an error, but differently.
if int(hf.__version__.split(".")[0]) < 5:
  raise ImportError(f"it needs transformers 5, and this is {hf.__version__}")

# The names that versions and families of transformers have for a cache.
_CACHES = ("cache", "past_key_values", "layer_past")
# What generation and evaluation look up in a config; here it is the anchor's.
_OF_ANCHOR = (
  *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
  *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def _attribute(module: nn.Module, *names: str) -> nn.Module:
  """Returns what families of models have under different names."""
  return next(getattr(module, name) for name in names if hasattr(module, name))


class CalmConfig(hf.PretrainedConfig):
  """The models of a composition, and how they are connected.

  Attributes:
    anchor: the anchor's config.json.
    augmenting: for each augmenting model {"name", "config": its config.json,
      "connections": pairs of layers [i, j] counted from 1, and the options
      "visibility", "norm", "positions", "output_scale"}.
    norm_eps: epsilon of the connections' norms.
    sources: where all models are, if the folder holds the connections only:
      {"name", "revision", "sha256"} each.
  """

  model_type = "calm"

  def __init__(
    self, anchor=None, augmenting=(), norm_eps=1e-6, sources=(), **kwargs
  ):
    self.anchor = anchor or {}
    self.augmenting = list(augmenting)
    self.norm_eps = norm_eps
    self.sources = list(sources)
    if anchor:
      config = hf.AutoConfig.for_model(**anchor)
      kwargs |= {name: getattr(config, name, None) for name in _OF_ANCHOR}
    super().__init__(**kwargs | {"tie_word_embeddings": False})


def _find(path: str, source: dict) -> str:
  """Returns where a model is; ValueError if it is not the one composed."""
  if source["revision"] is not None:
    return source["name"]  # A commit of the hub does not change.
  folder = os.path.join(path, source["name"])
  for name, expected in source["sha256"].items():
    with open(os.path.join(folder, name), "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
      raise ValueError(f"{folder}/{name} has changed since it was composed")
  return folder


def _rotate(x_BNLH: Tensor, positions_BL: Tensor) -> Tensor:
  """Rotary positions of base 10,000, which pair feature i with i + H/2."""
  half = x_BNLH.shape[-1] // 2
  steps = torch.arange(half, device=x_BNLH.device, dtype=torch.float32)
  angles = positions_BL[:, None, :, None] * 10_000.0 ** (-steps / half)
  cos, sin = angles.cos(), angles.sin()
  a, b = x_BNLH.float().chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BNLH.dtype)


def _distances(seen_BLS: Tensor) -> Tensor:
  """Returns how far before each new token each slot is, [L, S]."""
  length, slots = seen_BLS.shape[1:]
  slots_S = torch.arange(slots, device=seen_BLS.device)
  return slots_S[slots - length :, None] - slots_S


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
  """A mask to add to scores: 0 where seen, else the lowest number."""
  return (~seen).to(dtype) * torch.finfo(dtype).min


class CalmConnection(nn.Module):
  """f_cross(f_proj(H_A), H_B): the anchor attends to a layer of m_A."""

  def __init__(self, augmenting, anchor, eps: float, joined: dict):
    super().__init__()
    D, E = anchor.hidden_size, augmenting.hidden_size
    self.heads, self.scaled = anchor.num_attention_heads, joined["output_scale"]
    inner, self.rope = D - D % self.heads, joined["positions"] == "rope"
    self.projection = nn.Linear(E, D, bias=False)
    self.query, self.key, self.value = (
      nn.Linear(D, inner, bias=False) for _ in range(3)
    )
    self.output = nn.Linear(inner, D, bias=False)
    norm = nn.RMSNorm if joined["norm"] else nn.Identity
    self.projection_norm, self.query_norm = norm(E, eps), norm(D, eps)

  def _split(self, x_BLD: Tensor) -> Tensor:
    return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

  def keys_values(self, h_BLE: Tensor, positions_BL: Tensor):
    """Returns keys and values [B, N, L, H], which a cache keeps."""
    h_BLD = self.projection(self.projection_norm(h_BLE))
    key, value = (self._split(f(h_BLD)) for f in (self.key, self.value))
    return _rotate(key, positions_BL) if self.rope else key, value

  def forward(
    self, x_BLD: Tensor, key_BNSH: Tensor, value_BNSH: Tensor, seen_BLS: Tensor
  ) -> Tensor:
    """Returns what is added to the anchor's state."""
    query_BNLH = self._split(self.query(self.query_norm(x_BLD)))
    if self.rope:
      # A query's position is that of the newest key that it sees.
      query_BNLH = _rotate(query_BNLH, (seen_BLS.sum(-1) - 1).clamp(min=0))
    attend = functional.scaled_dot_product_attention
    mask = _additive(seen_BLS, query_BNLH.dtype)[:, None]
    made_BNLH = attend(query_BNLH, key_BNSH, value_BNSH, attn_mask=mask)
    # What sees nothing, padding, gets nothing.
    made_BLD = made_BNLH.transpose(1, 2).flatten(2)
    made_BLD = self.output(made_BLD * seen_BLS.any(-1, keepdim=True))
    if self.scaled == "state":
      size_BL1 = x_BLD.float().abs().mean(-1, keepdim=True)
      made_BLD = made_BLD * size_BL1.to(made_BLD.dtype)
    return made_BLD


class DecoderPass:
  """A pass of one model over new tokens: `embedded`, then layer by layer.

  All that families do differently outside of their layers is here.
  """

  def __init__(
    self, model: hf.PreTrainedModel, ids_BL, positions_BL, seen_BLS, cache
  ):
    self.model, backbone, config = model, model.base_model, model.config
    self.layers = _attribute(backbone, "layers", "h")
    embed, scale = backbone.get_input_embeddings(), 1.0
    if config.model_type in ("gemma", "gemma2", "granite"):
      # In new versions Gemma's embedding scales by itself.
      own = 1.0 if hasattr(embed, "embed_scale") else config.hidden_size**0.5
      scale = getattr(config, "embedding_multiplier", own)
    self.embedded = embed(ids_BL) * scale
    if hasattr(backbone, "wpe"):
      self.embedded = self.embedded + backbone.wpe(positions_BL)
    self.inputs = {"position_ids": positions_BL, "use_cache": cache is not None}
    accepted = inspect.signature(type(self.layers[0]).forward).parameters
    self.inputs[next(name for name in _CACHES if name in accepted)] = cache
    window = getattr(config, "sliding_window", None)
    kind = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None)
    self.kinds = kinds or [kind] * len(self.layers)
    # What depends on the kind of a layer: its mask, and its rotary angles.
    self.by_kind = {}
    for kind in set(self.kinds):
      mask_BLS = seen_BLS
      if kind == "sliding_attention":
        mask_BLS = seen_BLS & (_distances(seen_BLS) < window)
      mask_B1LS = _additive(mask_BLS, self.embedded.dtype)[:, None]
      self.by_kind[kind] = {"attention_mask": mask_B1LS}
      if hasattr(backbone, "rotary_emb"):
        rotary = backbone.rotary_emb
        by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        angles = rotary(self.embedded, positions_BL, *[kind] * by_kind)
        self.by_kind[kind]["position_embeddings"] = angles

  def layer(self, number: int, x_BLD: Tensor) -> Tensor:
    """Returns the state after a layer, counted from 1."""
    inputs = self.inputs | self.by_kind[self.kinds[number - 1]]
    made = self.layers[number - 1](x_BLD, **inputs)
    return made[0] if isinstance(made, tuple) else made

  def logits(self, x_BLD: Tensor) -> Tensor:
    """Computes the head, of states after the last layer."""
    model, config = self.model, self.model.config
    norm = _attribute(model.base_model, "norm", "ln_f", "final_layer_norm")
    logits = model.get_output_embeddings()(norm(x_BLD))
    logits = logits / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class CalmAugmenting(nn.Module):
  """An augmenting model, and its connections to the anchor."""

  def __init__(self, joined: dict, anchor: hf.PretrainedConfig, eps: float):
    super().__init__()
    self.joined, self.model = joined, None
    self.config = hf.AutoConfig.for_model(**joined["config"])
    self.connections = nn.ModuleDict()
    for i, j in joined["connections"]:
      connection = CalmConnection(self.config, anchor, eps, joined)
      self.connections[f"layer_{i}_to_{j}"] = connection

  def read(self, ids_BL, positions_BL, seen_BLS, cache, real_BLS):
    """Runs the model up to its last connection.

    Returns {anchor's layer: [(connection, its keys, values and mask), ...]}.
    """
    run = DecoderPass(self.model, ids_BL, positions_BL, seen_BLS, cache)
    h_BLE, tapped = run.embedded, {}
    for layer in range(1, 1 + max(i for i, _ in self.joined["connections"])):
      h_BLE = tapped[layer] = run.layer(layer, h_BLE)
    unmasked = self.joined["visibility"] == "unmasked"
    mask_BLS = real_BLS if unmasked else seen_BLS
    by_layer: dict[int, list[tuple]] = {}
    for number, (i, j) in enumerate(self.joined["connections"]):
      connection = self.connections[f"layer_{i}_to_{j}"]
      keys_values = connection.keys_values(tapped[i], positions_BL)
      if cache is not None:
        at = self.config.num_hidden_layers + number
        keys_values = cache.update(*keys_values, at)
      by_layer.setdefault(j, []).append((connection, *keys_values, mask_BLS))
    return by_layer


class CalmForCausalLM(hf.PreTrainedModel, hf.GenerationMixin):
  """An anchor, and augmenting models that are connected to it."""

  config_class = CalmConfig
  _supports_sdpa = True
  accepts_loss_kwargs = False

  def __init__(self, config: CalmConfig):
    super().__init__(config)
    anchor, self.anchor = hf.AutoConfig.for_model(**config.anchor), None
    self.augmenting = nn.ModuleList(
      CalmAugmenting(j, anchor, config.norm_eps) for j in config.augmenting
    )
    how = "eager" if config._attn_implementation == "eager" else None
    self.how = {"dtype": config.dtype, "attn_implementation": how}
    if not config.sources:  # or else `from_pretrained` brings the models
      self.anchor = hf.AutoModelForCausalLM.from_config(anchor, **self.how)
      for one in self.augmenting:
        one.model = hf.AutoModel.from_config(one.config, **self.how)
    self.post_init()

  @classmethod
  def from_pretrained(cls, path, *args, config=None, **kwargs):
    """Loads a folder, and the models that it refers to if there are any."""
    config = config or CalmConfig.from_pretrained(path)
    model = super().from_pretrained(path, *args, config=config, **kwargs)
    if not config.sources:
      return model
    loaded, device, auto = [], model.device, hf.AutoModelForCausalLM
    configs = [config.anchor, *(one["config"] for one in config.augmenting)]
    for source, settings in zip(config.sources, configs, strict=True):
      how = {"revision": source["revision"] or "main", **model.how}
      how["config"] = hf.AutoConfig.for_model(**settings)
      loaded.append(auto.from_pretrained(_find(path, source), **how))
    model.anchor, *others = loaded
    for augmenting, other in zip(model.augmenting, others, strict=True):
      augmenting.model = other.base_model
    for head, weight in model.anchor.all_tied_weights_keys.items():
      model.all_tied_weights_keys[f"anchor.{head}"] = f"anchor.{weight}"
    model.config.sources = []  # What is saved from now on holds the models.
    return model.to(device)

  def _caches(self, cache: Cache | None) -> list[Cache | None]:
    """Returns parts of a cache, of the anchor and of each augmenting model.

    They share their layers with the whole, which so grows with them.
    """
    counts = [self.anchor.config.num_hidden_layers]
    for one in self.augmenting:
      counts.append(one.config.num_hidden_layers + len(one.connections))
    if cache is None:
      return [None] * len(counts)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
      raise ValueError("no static or sliding cache: give a DynamicCache()")
    missing = sum(counts) - len(cache.layers)
    cache.layers.extend(DynamicLayer() for _ in range(missing))
    layers = iter(cache.layers)
    return [Cache(layers=[next(layers) for _ in range(n)]) for n in counts]

  @can_return_tuple
  def forward(
    self,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool = False,
    labels: Tensor | None = None,
    logits_to_keep: int = 0,
    **others,
  ) -> CausalLMOutputWithPast:
    """Computes next-token logits [B, L, V], and the loss of `labels` if given.

    `attention_mask` [B, S] is 0 at padding, on either side; a row is one text.
    `cache` (in older versions `past_key_values`) holds the tokens before.
    """
    # Older versions also say where in the cache they are, and what is None.
    given = {name for name, value in others.items() if value is not None}
    if given - {"cache_position"}:
      raise TypeError(f"a composition does not take {given}")
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
      cache = DynamicCache()
    own, *parts = self._caches(cache)
    before = 0 if cache is None else cache.get_seq_length()
    rows, length = input_ids.shape
    if attention_mask is None:
      attention_mask = input_ids.new_ones(rows, before + length)
    if position_ids is None:
      position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
    real_BLS = attention_mask.bool()[:, None].expand(-1, length, -1)
    seen_BLS = real_BLS & (_distances(real_BLS) >= 0)
    inputs = input_ids, position_ids, seen_BLS
    read = [
      augmenting.read(*inputs, part, real_BLS)
      for augmenting, part in zip(self.augmenting, parts, strict=True)
    ]
    run = DecoderPass(self.anchor, *inputs, own)
    x_BLD = run.embedded
    for layer in range(1, 1 + self.anchor.config.num_hidden_layers):
      x_BLD = run.layer(layer, x_BLD)
      # All contributions to a layer come from the same state.
      terms = itertools.chain(*(by_layer.get(layer, ()) for by_layer in read))
      x_BLD = sum([attend(x_BLD, *given) for attend, *given in terms], x_BLD)
    logits, loss = run.logits(x_BLD[:, -logits_to_keep:]), None
    if labels is not None:
      loss = self.loss_function(logits, labels, self.config.vocab_size)
    return CausalLMOutputWithPast(loss, logits, cache)
