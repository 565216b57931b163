"""Transformer decoder, every module behind its gate, with key/value caches for decoding.

Source: `espnet2/asr/decoder/transformer_decoder.py`, pre-norm. Letters: B batch, L tokens,
S encoder frames, D model width, V vocabulary, N layers, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm.models import stack as stack_lib
from gatedfm.models.encoder import FfnBranch, Gates
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import attention, gating, layers, subsampling
from gatedfm.partitioning import constrain


@flax.struct.dataclass
class LayerCache:
  """A layer's self-attention cache `[B, H, L, K]` and cross-attention keys `[B, H, S, K]`."""

  own: attention.KeyValue
  cross: attention.KeyValue


class DecoderAttention(nn.Module):
  """Norm, attention, dropout: `[B, L, D] -> [B, L, D]`."""

  cfg: SpeechConfig

  def setup(self):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    self.norm = layers.LayerNorm()
    self.attention = attention.Attention(cfg.heads, cfg.d, cfg.attention_dropout, dtype)
    self.drop = nn.Dropout(cfg.dropout)

  def __call__(
    self,
    x: jax.Array,
    memory: jax.Array | None,
    mask: jax.Array,
    deterministic: bool,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    """Self-attention where `memory` is None, else cross-attention to it."""
    y = self.norm(x)
    kv = self.attention.project(y if memory is None else memory)
    return self.drop(self.attention.attend(y, kv, mask, deterministic, heads), deterministic)

  def project(self, memory: jax.Array) -> attention.KeyValue:
    """Keys and values of the encoder's output, once per utterance."""
    return self.attention.project(memory)

  def extend(
    self,
    x: jax.Array,
    cache: attention.KeyValue,
    position: jax.Array,
    heads: jax.Array | None = None,
  ) -> tuple[jax.Array, attention.KeyValue]:
    """Cached self-attention of the tokens from `position` on: x `[B, P, D]`."""
    y = self.norm(x)
    cache = attention.update_cache(cache, self.attention.project(y), position)
    seen = jnp.arange(cache.key.shape[2]) <= position + jnp.arange(x.shape[1])[:, None]
    return self.attention.attend(y, cache, seen, heads=heads), cache

  def read(
    self,
    x: jax.Array,
    kv: attention.KeyValue,
    mask: jax.Array,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    """Cross-attention to projected keys and values."""
    return self.attention.attend(self.norm(x), kv, mask, heads=heads)

  def empty(self, batch: int, length: int, dtype: layers.Dtype) -> attention.KeyValue:
    """A cache of `length` positions."""
    heads, width = self.attention.kept_heads(), self.cfg.d // self.cfg.heads
    return attention.empty_cache(batch, length, heads, width, dtype)


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, feed-forward, each a gated residual branch."""

  cfg: SpeechConfig

  def setup(self):
    cfg = self.cfg
    self.self_attention = DecoderAttention(cfg)
    self.cross_attention = DecoderAttention(cfg)
    self.ffn = FfnBranch(cfg.decoder_ffn, 'relu', 1.0, cfg.dropout, jnp.dtype(cfg.dtype))

  def __call__(
    self,
    x: jax.Array,
    gates: Gates,
    memory_BxSxD: jax.Array,
    memory_mask_BxS: jax.Array,
    deterministic: bool,
  ) -> tuple[jax.Array, Gates]:
    """Teacher-forced, x `[B, L, D]`; returns x and the gates used."""
    add = lambda x, name, module, *args: gating.add_gated(
      self.cfg.execution, gates.get(name), module, x, x, *args
    )
    causal = attention.causal_mask(x.shape[1])
    seen = memory_mask_BxS[:, None, None, :]
    own, cross, channels = self._units(gates)
    x = add(x, 'self_attention', self.self_attention, None, causal, deterministic, own)
    x = add(x, 'cross_attention', self.cross_attention, memory_BxSxD, seen, deterministic, cross)
    x = add(x, 'ffn', self.ffn, deterministic, channels)
    return constrain(x, 'batch', 'time', 'act_embed'), gates

  def _units(self, gates: Gates) -> tuple[jax.Array | None, ...]:
    """Gates of both attentions' heads and the FFN's channels."""
    names = 'self_attention_heads', 'cross_attention_heads', 'ffn_channels'
    return tuple(gating.unit_gates(gates, name) for name in names)

  def start(self, memory_BxSxD: jax.Array, gates: Gates, length: int) -> LayerCache:
    """An empty cache for `length` tokens, and the memory's keys and values."""
    (b, s, _), dtype = memory_BxSxD.shape, memory_BxSxD.dtype
    cross = gating.under_gate(
      self.cfg.execution,
      gates.get('cross_attention'),
      self.cross_attention,
      lambda m, memory: m.project(memory),
      lambda m, memory: m.empty(b, s, dtype),
      memory_BxSxD,
    )
    return LayerCache(self.self_attention.empty(b, length, dtype), cross)

  def step(
    self,
    x: jax.Array,
    cache: LayerCache,
    gates: Gates,
    position: jax.Array,
    memory_mask_BxS: jax.Array,
  ) -> tuple[jax.Array, LayerCache]:
    """Tokens from `position` on, x `[B, P, D]`. A closed gate leaves the cache untouched."""
    mode, seen = self.cfg.execution, memory_mask_BxS[:, None, None, :]
    own_gate, cross_gate = gates.get('self_attention'), gates.get('cross_attention')
    own_heads, cross_heads, channels = self._units(gates)

    def extend(m: DecoderAttention, x: jax.Array, own: attention.KeyValue, gate: Any, *at: Any):
      y, own = m.extend(x, own, *at)
      return x + gating.scale(mode, gate, y), own

    def read(m: DecoderAttention, x: jax.Array, gate: Any, *memory: Any) -> jax.Array:
      return x + gating.scale(mode, gate, m.read(x, *memory))

    keep, at = lambda m, x, own, *rest: (x, own), (position, own_heads)
    x, own = gating.under_gate(
      mode, own_gate, self.self_attention, extend, keep, x, cache.own, own_gate, *at
    )
    pass_by, memory = lambda m, x, *rest: x, (cache.cross, seen, cross_heads)
    x = gating.under_gate(
      mode, cross_gate, self.cross_attention, read, pass_by, x, cross_gate, *memory
    )
    x = gating.add_gated(mode, gates.get('ffn'), self.ffn, x, x, True, channels)
    return x, LayerCache(own, cache.cross)


class Decoder(nn.Module):
  """Embedding, layers, closing norm and untied output layer."""

  cfg: SpeechConfig

  def setup(self):
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    init = nn.initializers.normal(cfg.d**-0.5)
    self.embedding = layers.param(
      self, 'embedding', init, ('vocab', 'embed'), (cfg.vocab_size, cfg.d)
    )
    self.drop = nn.Dropout(cfg.dropout)
    self.layers = stack_lib.Stack(DecoderLayer, cfg, cfg.decoder_layers, cfg.unroll_decoder)
    self.after_norm = layers.LayerNorm()
    self.output = layers.Linear(cfg.vocab_size, ('embed', 'vocab'), dtype)

  def _embed(self, tokens_BxL: jax.Array) -> jax.Array:
    return layers.look_up(self.embedding, tokens_BxL, jnp.dtype(self.cfg.activation_dtype))

  def __call__(
    self,
    tokens_BxL: jax.Array,
    gates: Gates,
    memory_BxSxD: jax.Array,
    memory_mask_BxS: jax.Array,
    deterministic: bool,
  ) -> jax.Array:
    """Teacher-forced logits, `[B, L, V]` float32."""
    x = self.drop(subsampling.add_positions(self._embed(tokens_BxL)), deterministic)
    x, _ = self.layers(x, gates, memory_BxSxD, memory_mask_BxS, deterministic)
    return self.output(self.after_norm(x)).astype(jnp.float32)

  def start(self, memory_BxSxD: jax.Array, gates: Gates, length: int) -> list[LayerCache]:
    """One cache per layer; needs the unrolled layout (`unroll_decoder`)."""
    return self.layers.each(lambda layer, g, _: layer.start(memory_BxSxD, g, length), gates)

  def step(
    self,
    tokens_BxP: jax.Array,
    position: jax.Array,
    caches: list[LayerCache],
    gates: Gates,
    memory_mask_BxS: jax.Array,
  ) -> tuple[jax.Array, list[LayerCache]]:
    """The next P tokens of each example: logits `[B, P, V]` float32 and the new caches."""
    limit = caches[0].own.key.shape[2]
    x = subsampling.add_positions(self._embed(tokens_BxP), position, limit)
    new = []

    def visit(layer: DecoderLayer, layer_gates: Gates, i: int) -> None:
      nonlocal x
      x, cache = layer.step(x, caches[i], layer_gates, position, memory_mask_BxS)
      new.append(cache)

    self.layers.each(visit, gates)
    return self.output(self.after_norm(x)).astype(jnp.float32), new
