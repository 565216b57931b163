"""Decoder-only language model, OPT's and Llama's kind, every module behind its gate.

Sources: Zhang et al., "OPT", 2022, and Touvron et al., "Llama 2", 2023, as their modules in
`transformers` compute. Letters: B batch, L or P tokens, S cached tokens, D model width, E width of
the embeddings, V vocabulary, N layers, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm import gates as gates_lib
from gatedfm.gates import Gates
from gatedfm.models import stack as stack_lib
from gatedfm.models.lm_config import STACK, LmConfig
from gatedfm.nn import attention, gating, layers, low_rank
from gatedfm.partitioning import constrain


def _norm(cfg: LmConfig, name: str | None = None) -> nn.Module:
  kind = layers.RMSNorm if cfg.norm == 'rms' else layers.LayerNorm
  return kind(cfg.norm_eps, name=name)


class LmAttention(nn.Module):
  """Norm (of a pre-norm model), self-attention, dropout: `[B, L, D] -> [B, L, D]`."""

  cfg: LmConfig

  def setup(self):
    cfg = self.cfg
    if cfg.pre_norm:
      self.norm = _norm(cfg)
    self.attention = attention.Attention(
      cfg.heads,
      cfg.d,
      dtype=jnp.dtype(cfg.dtype),
      kv_heads=cfg.kv_heads,
      width=cfg.head_width,
      use_bias=cfg.use_bias,
      theta=cfg.theta if cfg.positions == 'rotary' else 0.0,
    )
    self.drop = nn.Dropout(cfg.dropout)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    heads: jax.Array | None,
    deterministic: bool,
  ) -> jax.Array:
    y = self.norm(x) if self.cfg.pre_norm else x
    kv = self.attention.project(y, positions)
    y = self.attention.attend(y, kv, mask, True, heads, positions)
    return self.drop(y, deterministic)

  def extend(
    self,
    x: jax.Array,
    cache: attention.KeyValue,
    at: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    heads: jax.Array | None,
  ) -> tuple[jax.Array, attention.KeyValue]:
    """The same of P tokens that are written into the cache from column `at` on."""
    y = self.norm(x) if self.cfg.pre_norm else x
    cache = attention.update_cache(cache, self.attention.project(y, positions), at)
    return self.attention.attend(y, cache, mask, True, heads, positions), cache

  def empty(self, batch: int, length: int, dtype: layers.Dtype) -> attention.KeyValue:
    """A cache of `length` columns."""
    heads = self.attention.kept_heads()
    return attention.empty_cache(batch, length, heads, self.cfg.width, dtype)


class LmFfn(nn.Module):
  """Norm (of a pre-norm model), feed-forward, dropout: `[B, L, D] -> [B, L, D]`."""

  cfg: LmConfig

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool, channels: jax.Array | None) -> jax.Array:
    cfg = self.cfg
    y = _norm(cfg, 'norm')(x) if cfg.pre_norm else x
    y = layers.FeedForward(
      cfg.ffn,
      layers.ACTIVATIONS[cfg.activation],
      dtype=jnp.dtype(cfg.dtype),
      gated=cfg.gated_ffn,
      use_bias=cfg.use_bias,
      name='ffn',
    )(y, True, channels)
    return nn.Dropout(cfg.dropout)(y, deterministic)


class LmLayer(nn.Module):
  """Self-attention and feed-forward, each a gated residual branch."""

  cfg: LmConfig

  def setup(self):
    cfg = self.cfg
    self.attention, self.ffn = LmAttention(cfg), LmFfn(cfg)
    if not cfg.pre_norm:  # norms of the sums, which no gate closes
      self.attention_norm, self.ffn_norm = _norm(cfg), _norm(cfg)

  def __call__(
    self,
    x: jax.Array,
    gates: stack_lib.Gates,
    mask: jax.Array,
    positions: jax.Array,
    deterministic: bool,
  ) -> tuple[jax.Array, stack_lib.Gates]:
    """All tokens at once, `[B, L, D]`; returns x and the gates used."""
    mode = self.cfg.execution
    heads, channels = self._units(gates)
    x = gating.add_gated(
      mode, gates.get('attention'), self.attention, x, x, mask, positions, heads, deterministic
    )
    x = x if self.cfg.pre_norm else self.attention_norm(x)
    x = gating.add_gated(mode, gates.get('ffn'), self.ffn, x, x, deterministic, channels)
    x = x if self.cfg.pre_norm else self.ffn_norm(x)
    return constrain(x, 'batch', 'time', 'act_embed'), gates

  def _units(self, gates: stack_lib.Gates) -> tuple[jax.Array | None, ...]:
    return tuple(gating.unit_gates(gates, name) for name in ('attention_heads', 'ffn_channels'))

  def empty(self, batch: int, length: int, gates: stack_lib.Gates) -> attention.KeyValue:
    """The attention's cache; of one that is known to be closed there is none to keep."""
    dtype = jnp.dtype(self.cfg.activation_dtype)
    if gates.get('attention') is False:
      return attention.empty_cache(batch, 0, 0, self.cfg.width, dtype)
    return self.attention.empty(batch, length, dtype)

  def step(
    self,
    x: jax.Array,
    cache: attention.KeyValue,
    gates: stack_lib.Gates,
    at: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
  ) -> tuple[jax.Array, attention.KeyValue]:
    """P tokens from column `at` on. A closed gate leaves the cache untouched."""
    mode, gate = self.cfg.execution, gates.get('attention')
    heads, channels = self._units(gates)

    def extend(m: LmAttention, x: jax.Array, cache: attention.KeyValue, gate: Any, *rest: Any):
      y, cache = m.extend(x, cache, *rest)
      return x + gating.scale(mode, gate, y), cache

    keep = lambda m, x, cache, *rest: (x, cache)
    rest = gate, at, mask, positions, heads
    x, cache = gating.under_gate(mode, gate, self.attention, extend, keep, x, cache, *rest)
    x = x if self.cfg.pre_norm else self.attention_norm(x)
    x = gating.add_gated(mode, gates.get('ffn'), self.ffn, x, x, True, channels)
    x = x if self.cfg.pre_norm else self.ffn_norm(x)
    return constrain(x, 'batch', 'time', 'act_embed'), cache


class LmDecoder(nn.Module):
  """Embeddings, layers, closing norm, logits."""

  cfg: LmConfig

  def setup(self):
    cfg = self.cfg
    e, dtype = cfg.embed_width or cfg.d, jnp.dtype(cfg.dtype)
    init = nn.initializers.normal(0.02)
    self.embedding = layers.param(self, 'embedding', init, ('vocab', 'embed'), (cfg.vocab_size, e))
    if cfg.positions == 'learned':
      rows = cfg.max_tokens + cfg.position_offset
      self.position_embedding = layers.param(
        self, 'position_embedding', init, (None, 'embed'), (rows, cfg.d)
      )
    project = lambda width: layers.Linear(width, ('embed', 'embed_out'), dtype, use_bias=False)
    if cfg.embed_width:
      self.project_in, self.project_out = project(cfg.d), project(e)
    self.layers = stack_lib.Stack(LmLayer, cfg, cfg.layers)
    if cfg.final_norm:
      self.final_norm = _norm(cfg)
    if not cfg.tied:
      self.output = layers.Linear(cfg.vocab_size, ('embed', 'vocab'), dtype, use_bias=False)

  def embed(
    self, tokens_BxL: jax.Array, positions_BxL: jax.Array, ranks: jax.Array | None = None
  ) -> jax.Array:
    """`[B, L, D]`; with `ranks`, gates of the embeddings' ranks, `[1 or B, R]`."""
    cfg = self.cfg
    x = layers.look_up(self.embedding, tokens_BxL, jnp.dtype(cfg.activation_dtype), ranks)
    if cfg.embed_width:
      x = self.project_in(x)
    if cfg.positions == 'learned':
      x = x + self.position_embedding[positions_BxL + cfg.position_offset].astype(x.dtype)
    return x

  def hidden(
    self,
    tokens_BxL: jax.Array,
    mask_BxL: jax.Array | None,
    gates: stack_lib.Gates,
    deterministic: bool,
  ) -> jax.Array:
    """What logits are made of, `[B, L, D]`."""
    seen, positions_BxL = attention.causal_mask(tokens_BxL.shape[1]), _positions(mask_BxL)
    if mask_BxL is None:
      positions_BxL = jnp.arange(tokens_BxL.shape[1])[None]
    else:
      seen = seen & mask_BxL[:, None, None, :]
    ranks, gates = _ranks(gates)
    x = constrain(self.embed(tokens_BxL, positions_BxL, ranks), 'batch', 'time', 'act_embed')
    x, _ = self.layers(x, gates, seen, positions_BxL, deterministic)
    return self.final_norm(x) if self.cfg.final_norm else x

  def logits(self, x_BxLxD: jax.Array, gates: stack_lib.Gates) -> jax.Array:
    """`[..., D] -> [..., V]` float32."""
    cfg = self.cfg
    x = self.project_out(x_BxLxD) if cfg.embed_width else x_BxLxD
    x = x.astype(jnp.float32)  # a product is returned in its input's type
    if not cfg.tied:
      return self.output(x)
    return layers.dot(x, self.embedding.T, jnp.dtype(cfg.dtype), _ranks(gates)[0])

  def start(self, batch: int, length: int, gates: stack_lib.Gates) -> list[attention.KeyValue]:
    """One empty cache per layer; needs the unrolled layout."""
    empty = lambda layer, g, _: layer.empty(batch, length, g)
    return self.layers.each(empty, _ranks(gates)[1])

  def step(
    self,
    tokens_BxP: jax.Array,
    at: jax.Array,
    caches: list[attention.KeyValue],
    mask_BxS: jax.Array,
    gates: stack_lib.Gates,
  ) -> tuple[jax.Array, list[attention.KeyValue]]:
    """P tokens from column `at` on: what their logits are made of, and the new caches."""
    p, new = tokens_BxP.shape[1], []
    columns_P = at + jnp.arange(p)
    positions_BxP = jax.lax.dynamic_slice_in_dim(_positions(mask_BxS), at, p, 1)
    seen = (jnp.arange(mask_BxS.shape[1]) <= columns_P[:, None]) & mask_BxS[:, None, None, :]
    ranks, gates = _ranks(gates)
    x = constrain(self.embed(tokens_BxP, positions_BxP, ranks), 'batch', 'time', 'act_embed')

    def visit(layer: LmLayer, layer_gates: stack_lib.Gates, i: int) -> None:
      nonlocal x
      x, cache = layer.step(x, caches[i], layer_gates, at, seen, positions_BxP)
      new.append(cache)

    self.layers.each(visit, gates)
    return self.final_norm(x) if self.cfg.final_norm else x, new


def _ranks(gates: stack_lib.Gates) -> tuple[jax.Array | None, stack_lib.Gates]:
  """Gates of the embeddings' ranks, `[1 or B, R]`, and those of the layers."""
  rest = {name: g for name, g in gates.items() if name != 'embedding_ranks'}
  return (jnp.atleast_2d(gates['embedding_ranks'][0]) if len(rest) < len(gates) else None), rest


def _positions(mask_BxL: jax.Array | None) -> jax.Array | None:
  """Each token's number among those that `mask` keeps, `[B, L]`, whichever side is padded."""
  return None if mask_BxL is None else jnp.maximum(jnp.cumsum(mask_BxL, 1) - 1, 0)


class LanguageModel(nn.Module):
  """A decoder-only transformer. Gates come from the caller; without any it is dense."""

  cfg: LmConfig

  def setup(self):
    self.decoder = LmDecoder(self.cfg)

  def __call__(
    self,
    tokens_BxL: jax.Array,
    mask_BxL: jax.Array | None = None,
    gates: Gates | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Logits `[B, L, V]` float32 of the token after each.

    Args:
      tokens_BxL: at most `cfg.max_tokens` of them.
      mask_BxL: bool, False for padding, on either side; None where there is none.
      gates: `()`, `[N]` or `[N, B]` per site, and `[N, U]` or `[N, B, U]` per site of heads or
        channels (`cfg.unit_sites()`), which are multiplied by. Sites that it does not name are
        open.
      deterministic: False turns dropout on.

    Raises:
      ValueError: gates for a site that the model has not, or of a wrong shape; too many tokens.
    """
    return self.logits(self.hidden(tokens_BxL, mask_BxL, gates, deterministic), gates)

  def hidden(
    self,
    tokens_BxL: jax.Array,
    mask_BxL: jax.Array | None = None,
    gates: Gates | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """What `logits` reads, `[B, L, D]`; arguments as of `__call__`."""
    self._check(tokens_BxL.shape[1])
    return self.decoder.hidden(tokens_BxL, mask_BxL, self._given(gates), deterministic)

  def logits(self, x: jax.Array, gates: Gates | None = None) -> jax.Array:
    """`[..., D] -> [..., V]` float32; of all gates those of the embeddings' ranks count."""
    return self.decoder.logits(x, self._given(gates))

  def start(self, batch: int, length: int, gates: Gates | None = None) -> list[attention.KeyValue]:
    """Caches for `length` tokens, padding included; needs the unrolled layout."""
    self._check(length)
    return self.decoder.start(batch, length, self._given(gates))

  def step(
    self,
    tokens_BxP: jax.Array,
    at: jax.Array,
    caches: list[attention.KeyValue],
    mask_BxS: jax.Array,
    gates: Gates | None = None,
  ) -> tuple[jax.Array, list[attention.KeyValue]]:
    """Reads P tokens into columns `at` to `at + P` of the caches.

    Args:
      tokens_BxP: the tokens.
      at: scalar, columns that are filled.
      caches: what `start` or the last step gave.
      mask_BxS: which columns of the caches hold (or will hold) tokens and not padding.
      gates: as of `__call__`, `[N]` per site.

    Returns: what `logits` reads, `[B, P, D]`, and the caches.
    """
    return self.decoder.step(tokens_BxP, at, caches, mask_BxS, self._given(gates))

  def _check(self, tokens: int) -> None:
    if tokens > self.cfg.max_tokens:
      raise ValueError(f'{tokens} tokens; the model has positions for {self.cfg.max_tokens}')

  def _given(self, gates: Gates | None) -> stack_lib.Gates:
    """By module."""
    if gates is None:
      return {}
    sites = self.cfg.all_sites()
    sites += tuple(s for s in self.cfg.unit_sites() if s.name in gates.values)
    return gates_lib.completed(gates, sites).stack(STACK, sites)


def for_inference(
  cfg: LmConfig, params: dict[str, Any], execution: str = 'mask'
) -> tuple[LanguageModel, dict[str, Any]]:
  """The model and parameters in the unrolled layout, in which skipping and decoding are fastest."""
  cfg = dataclasses.replace(cfg, execution=execution, remat='none', scan_layers=False)
  return LanguageModel(cfg), stack_lib.unstack(params)


def initializer(cfg: LmConfig) -> Callable[[], dict[str, Any]]:
  """What would make the unrolled parameters, boxed with their axes' names."""
  model = LanguageModel(dataclasses.replace(cfg, scan_layers=False, remat='none'))

  def init() -> dict[str, Any]:
    key = jax.random.key(0)
    made = model.init(key, jnp.zeros((1, 1), jnp.int32))['params']
    return low_rank.with_factors(made, cfg.ranks, key)

  return init


def abstract_params(cfg: LmConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the unrolled parameters by path (factors as `PATH/first`), nothing computed."""
  return low_rank.flat(jax.eval_shape(lambda: nn.unbox(initializer(cfg)())))
