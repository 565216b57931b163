"""Multi-head attention with biased projections, and its key/value cache.

Plain scaled dot-product attention as in ESPnet's `MultiHeadedAttention`
(`espnet/nets/pytorch_backend/transformer/attention.py`): no relative positions, no
query/key norm. Letters: B batch, T queries, S keys, H heads, K head width, D model.
"""

from __future__ import annotations

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gatedfm.nn import layers

# Additive mask value: large enough to vanish in float32 and finite, so that a query whose
# keys are all masked (a padding row) gives numbers and not NaN.
MASKED = -1e30


@flax.struct.dataclass
class KeyValue:
  """Keys and values, each `[B, H, S, K]`: products over them need no transposition, which a
  decoder would repeat at every token."""

  key: jax.Array
  value: jax.Array


class Attention(nn.Module):
  """Attention from `[B, T, D]` queries to keys and values `[B, H, S, K]`.

  Call `project(memory)` once and `attend(x, kv, mask)` as often as wanted: a decoder's
  cross-attention then projects an utterance once, not at every step.
  """

  heads: int
  features: int
  dropout: float = 0.0
  dtype: layers.Dtype = jnp.float32

  def setup(self):
    if self.features % self.heads:
      raise ValueError(f'{self.heads} heads do not divide a width of {self.features}')
    inward = lambda: layers.Linear(self.features, ('embed', 'heads'), self.dtype)
    self.query, self.key, self.value = inward(), inward(), inward()
    self.out = layers.Linear(self.features, ('heads', 'embed'), self.dtype)
    self.drop = nn.Dropout(self.dropout)

  def _split(self, x: jax.Array) -> jax.Array:
    width = self.features // self.heads  # of compacted projections fewer heads are left
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)

  def kept_heads(self) -> int:
    """H, or as many as compaction has left."""
    kernel, width = self.key.get_variable('params', 'kernel'), self.features // self.heads
    return kernel.value.shape[-1] // width if isinstance(kernel, layers.Compacted) else self.heads

  def project(self, memory_BxSxD: jax.Array) -> KeyValue:
    """Keys and values of `memory`, `[B, H, S, K]` each."""
    heads = lambda linear: jnp.swapaxes(self._split(linear(memory_BxSxD)), 1, 2)
    return KeyValue(heads(self.key), heads(self.value))

  def attend(
    self,
    x_BxTxD: jax.Array,
    kv: KeyValue,
    mask: jax.Array | None,
    deterministic: bool = True,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    """Attends from `x` to `kv`.

    Args:
      x_BxTxD: query side.
      kv: what `project` gave (or a cache of it).
      mask: bool, True where a key may be seen, broadcastable to `[B, H, T, S]`.
      deterministic: False applies dropout to the attention weights.
      heads: gates of the heads, `[1 or B, H]`.

    Returns: `[B, T, D]`.
    """
    q_BxTxHxK = self._split(self.query(x_BxTxD)) * (self.features // self.heads) ** -0.5
    score_BxHxTxS = jnp.einsum(
      'bthk,bhsk->bhts', q_BxTxHxK, kv.key, preferred_element_type=jnp.float32
    )
    if mask is not None:
      score_BxHxTxS = jnp.where(mask, score_BxHxTxS, MASKED)
    weight_BxHxTxS = jax.nn.softmax(score_BxHxTxS).astype(kv.value.dtype)
    weight_BxHxTxS = self.drop(weight_BxHxTxS, deterministic)
    y_BxTxHxK = jnp.einsum(
      'bhts,bhsk->bthk', weight_BxHxTxS, kv.value, preferred_element_type=jnp.float32
    )
    if heads is not None:
      y_BxTxHxK = y_BxTxHxK * heads[:, None, :, None]
    y_BxTxF = y_BxTxHxK.reshape(*x_BxTxD.shape[:-1], y_BxTxHxK.shape[2] * y_BxTxHxK.shape[3])
    return self.out(y_BxTxF.astype(x_BxTxD.dtype))

  def __call__(
    self,
    x_BxTxD: jax.Array,
    mask: jax.Array | None,
    deterministic: bool = True,
    heads: jax.Array | None = None,
  ) -> jax.Array:
    """Self-attention, `[B, T, D] -> [B, T, D]`."""
    return self.attend(x_BxTxD, self.project(x_BxTxD), mask, deterministic, heads)


def empty_cache(batch: int, length: int, heads: int, width: int, dtype: layers.Dtype) -> KeyValue:
  """A zeroed cache for `length` positions, `[B, H, S, K]`."""
  zeros = jnp.zeros((batch, heads, length, width), dtype)
  return KeyValue(zeros, zeros)


def update_cache(cache: KeyValue, new: KeyValue, position: jax.Array) -> KeyValue:
  """Writes `new` (`[B, H, P, K]`) from `position` (scalar) on into `cache` (`[B, H, S, K]`)."""
  write = lambda c, n: lax.dynamic_update_slice_in_dim(c, n.astype(c.dtype), position, axis=2)
  return jax.tree.map(write, cache, new)


def causal_mask(length: int) -> jax.Array:
  """`[1, 1, T, T]`: each position sees itself and what came before."""
  return jnp.tril(jnp.ones((1, 1, length, length), bool))
