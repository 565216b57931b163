"""Multi-head attention, and its key/value cache.

Scaled dot-product attention as in ESPnet's `MultiHeadedAttention`
(`espnet/nets/pytorch_backend/transformer/attention.py`) and in language models: optionally without
biases, with rotary positions (Su et al., "RoFormer", 2021) and several query heads to a head of
keys and values (Ainslie et al., "GQA", 2023). Letters: B batch, T queries, S keys, H heads, G
heads of keys and values, R query heads to each, K head width, D model.
"""

from __future__ import annotations

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.nn import layers

# Additive mask value: large enough to vanish in float32 and finite, so that a query whose
# keys are all masked (a padding row) gives numbers and not NaN.
MASKED = -1e30


@flax.struct.dataclass
class KeyValue:
  """Keys and values, each `[B, G, S, K]`: products over them need no transposition, which a
  decoder would repeat at every token."""

  key: jax.Array
  value: jax.Array


def rotate(x_BxTxHxK: jax.Array, positions_BxT: jax.Array, theta: float) -> jax.Array:
  """Turns each pair of a head's channels `(k, k + K / 2)` by `position * theta^(-2 k / K)`.

  The layout of Hugging Face's Llama; files in llama.cpp's pair neighbours instead.
  """
  half = x_BxTxHxK.shape[-1] // 2
  frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BxTx1xK = positions_BxT[..., None, None].astype(jnp.float32) * frequency_K
  cos, sin = jnp.cos(angle_BxTx1xK), jnp.sin(angle_BxTx1xK)
  a, b = x_BxTxHxK[..., :half], x_BxTxHxK[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)


class Attention(nn.Module):
  """Attention from `[B, T, D]` queries to keys and values `[B, G, S, K]`.

  Call `project(memory)` once and `attend(x, kv, mask)` as often as wanted: a decoder's
  cross-attention then projects an utterance once, not at every step.

  Attributes:
    heads: H; features: D.
    kv_heads: G; 0 means H.
    width: K; 0 means D / H.
    use_bias: whether the projections have biases.
    theta: base of rotary positions; 0 means none.
  """

  heads: int
  features: int
  dropout: float = 0.0
  dtype: layers.Dtype = jnp.float32
  kv_heads: int = 0
  width: int = 0
  use_bias: bool = True
  theta: float = 0.0

  def setup(self):
    if not self.width and self.features % self.heads:
      raise ValueError(f'{self.heads} heads do not divide a width of {self.features}')
    if self.kv_heads and self.heads % self.kv_heads:
      raise ValueError(f'{self.kv_heads} heads of keys and values do not divide {self.heads}')
    linear = lambda heads: layers.Linear(
      heads * self.head_width, ('embed', 'heads'), self.dtype, use_bias=self.use_bias
    )
    kv_heads = self.kv_heads or self.heads
    self.query, self.key, self.value = linear(self.heads), linear(kv_heads), linear(kv_heads)
    self.out = layers.Linear(self.features, ('heads', 'embed'), self.dtype, use_bias=self.use_bias)
    self.drop = nn.Dropout(self.dropout)

  @property
  def head_width(self) -> int:
    """K."""
    return self.width or self.features // self.heads

  def _split(self, x: jax.Array) -> jax.Array:
    width = self.head_width  # of compacted projections fewer heads are left
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)

  def kept_heads(self) -> int:
    """G, or as many as compaction has left."""
    kernel = self.key.get_variable('params', 'kernel')
    kernel = kernel.value if isinstance(kernel, layers.Compacted) else kernel
    return self.kv_heads or self.heads if kernel is None else kernel.shape[-1] // self.head_width

  def _sources(self) -> tuple[int, ...] | None:
    """Which head of keys and values each query head reads, where compaction left it uneven."""
    query = self.query.get_variable('params', 'kernel')
    if getattr(query, 'kept', None) is None or self.kv_heads in (0, self.heads):
      return None
    kept = {g: i for i, g in enumerate(self.key.get_variable('params', 'kernel').kept)}
    ratio = self.heads // self.kv_heads
    sources = tuple(kept[h // ratio] for h in query.kept)
    each = len(sources) // max(len(kept), 1)
    return None if sources == tuple(i // max(each, 1) for i in range(len(sources))) else sources

  def project(self, memory_BxSxD: jax.Array, positions_BxS: jax.Array | None = None) -> KeyValue:
    """Keys and values of `memory`, `[B, G, S, K]` each; rotary keys are turned by `positions`."""
    key_BxSxGxK, value_BxSxGxK = map(
      self._split, (self.key(memory_BxSxD), self.value(memory_BxSxD))
    )
    if self.theta:
      key_BxSxGxK = rotate(key_BxSxGxK, positions_BxS, self.theta)
    return KeyValue(jnp.swapaxes(key_BxSxGxK, 1, 2), jnp.swapaxes(value_BxSxGxK, 1, 2))

  def attend(
    self,
    x_BxTxD: jax.Array,
    kv: KeyValue,
    mask: jax.Array | None,
    deterministic: bool = True,
    heads: jax.Array | None = None,
    positions_BxT: jax.Array | None = None,
  ) -> jax.Array:
    """Attends from `x` to `kv`.

    Args:
      x_BxTxD: query side.
      kv: what `project` gave (or a cache of it).
      mask: bool, True where a key may be seen, broadcastable to `[B, H, T, S]`.
      deterministic: False applies dropout to the attention weights.
      heads: gates of the heads, `[1 or B, H]`, or of each token `[B, T, H]`.
      positions_BxT: of the queries, where positions are rotary.

    Returns: `[B, T, D]`.
    """
    q_BxTxHxK = self._split(self.query(x_BxTxD))
    if self.theta:
      q_BxTxHxK = rotate(q_BxTxHxK, positions_BxT, self.theta)
    q_BxTxHxK = q_BxTxHxK * self.head_width**-0.5
    if sources := self._sources():
      kv = jax.tree.map(lambda a: a[:, np.array(sources)], kv)
    weight_BxHxTxS, grouped = self.weights(q_BxTxHxK, kv.key, mask, deterministic)
    rows = weight_BxHxTxS
    if grouped:  # queries of a group in one axis: XLA:CPU has no bfloat16 product of two of them
      rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])
    product = 'bhts,bhsk->bhtk' if grouped else 'bhts,bhsk->bthk'
    y = jnp.einsum(product, rows, kv.value, preferred_element_type=jnp.float32)
    if grouped:
      y = jnp.moveaxis(y.reshape(*weight_BxHxTxS.shape[:-1], y.shape[-1]), 3, 1)
    y_BxTxHxK = y.reshape(q_BxTxHxK.shape)
    if heads is not None:
      heads = heads if heads.ndim == 3 else heads[:, None]
      y_BxTxHxK = y_BxTxHxK * heads[..., None]
    y_BxTxF = y_BxTxHxK.reshape(*x_BxTxD.shape[:-1], y_BxTxHxK.shape[2] * y_BxTxHxK.shape[3])
    return self.out(y_BxTxF.astype(x_BxTxD.dtype))

  def weights(
    self, q_BxTxHxK: jax.Array, key: jax.Array, mask: jax.Array | None, deterministic: bool
  ) -> tuple[jax.Array, bool]:
    """Attention weights `[B, H, T, S]` and False, or `[B, G, R, T, S]` and True.

    A method of its own, so that `nn.intercept_methods` can see them.
    """
    b, t, h, k = q_BxTxHxK.shape
    groups = key.shape[1]
    if grouped := h != groups:
      q, product = q_BxTxHxK.reshape(b, t, groups, h // groups, k), 'btgrk,bgsk->bgrts'
      mask = None if mask is None else mask[..., None, :, :]
    else:
      q, product = q_BxTxHxK, 'bthk,bhsk->bhts'
    score = jnp.einsum(product, q, key, preferred_element_type=jnp.float32)
    if mask is not None:
      score = jnp.where(mask, score, MASKED)
    return self.drop(jax.nn.softmax(score).astype(key.dtype), deterministic), grouped

  def __call__(
    self,
    x_BxTxD: jax.Array,
    mask: jax.Array | None,
    deterministic: bool = True,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    """Self-attention without rotary positions, `[B, T, D] -> [B, T, D]`."""
    return self.attend(x_BxTxD, self.project(x_BxTxD), mask, deterministic, heads)


def empty_cache(batch: int, length: int, heads: int, width: int, dtype: layers.Dtype) -> KeyValue:
  """A zeroed cache for `length` positions, `[B, G, S, K]`."""
  zeros = jnp.zeros((batch, heads, length, width), dtype)
  return KeyValue(zeros, zeros)


def update_cache(cache: KeyValue, new: KeyValue, position: jax.Array) -> KeyValue:
  """Writes `new` (`[B, G, P, K]`) from `position` (scalar) on into `cache` (`[B, G, S, K]`)."""
  write = lambda c, n: lax.dynamic_update_slice_in_dim(c, n.astype(c.dtype), position, axis=2)
  return jax.tree.map(write, cache, new)


def causal_mask(length: int) -> jax.Array:
  """`[1, 1, T, T]`: each position sees itself and what came before."""
  return jnp.tril(jnp.ones((1, 1, length, length), bool))
