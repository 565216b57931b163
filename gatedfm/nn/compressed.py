"""Embedding tables of other kinds that are smaller than `nn.Embed`'s and answer the same calls.

Products of pieces, widths by frequency, rows put together by hashing: what factors are compared
with. Letters: V rows, D features, M parts, K pieces, W features of a part, Q rows of a bucket.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import default_embed_init

from gatedfm.nn import embedding
from gatedfm.nn.embedding import FactorizedEmbed
from gatedfm.nn.quantized import COLLECTION

Dtype = Any


class ProductQuantizedEmbed(nn.Module):
  """Rows put together from pieces: `factorization.product_quantization.fit` makes both variables.

  Codes are in the collection `quantized`; `pieces` `[M, K, W]` are parameters, trained or not.

  Attributes:
    num_embeddings, features: V and D.
    parts, pieces: M and K.
  """

  num_embeddings: int
  features: int
  parts: int
  pieces: int = 256

  def setup(self):
    zeros = lambda: nn.LogicallyPartitioned(
      jnp.zeros((self.num_embeddings, self.parts), jnp.uint8), ('vocab', None)
    )
    self.codes = self.variable(COLLECTION, 'codes', zeros)
    shape = self.parts, self.pieces, self.features // self.parts
    init = nn.with_logical_partitioning(default_embed_init, (None, None, None))
    self.piece = self.param('pieces', init, shape)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows `[..., D]`; NaN for numbers out of range."""
    embedding.check(inputs, self.num_embeddings, False)
    inputs = embedding.from_the_end(inputs, self.num_embeddings)
    codes_xM = jnp.take(self.codes.value, inputs, axis=0, mode='clip').astype(jnp.int32)
    rows_xMxW = self.piece[jnp.arange(self.parts), codes_xM]
    return _inside(inputs, self, rows_xMxW.reshape(*inputs.shape, self.features))

  def attend(self, query: jax.Array) -> jax.Array:
    """`[..., D] -> [..., V]`: products with all pieces, of which each row is a sum of some."""
    query_xMxW = query.reshape(*query.shape[:-1], self.parts, -1)
    products_xMxK = jnp.einsum('...mw,mkw->...mk', query_xMxW, self.piece)
    codes = self.codes.value.astype(jnp.int32)
    take = lambda m: jnp.take(products_xMxK[..., m, :], codes[:, m], axis=-1)
    return sum(take(m) for m in range(self.parts))


class BandedEmbed(nn.Module):
  """Frequent rows are wide and rare ones narrow, each projected to D.

  Source: Baevski and Auli, "Adaptive Input Representations for Neural Language Modeling", 2019.
  Rows are in the order of their frequency.

  Attributes:
    num_embeddings, features: V and D.
    ends: where each band ends; the last is V.
    ranks: of each band.
  """

  num_embeddings: int
  features: int
  ends: Sequence[int]
  ranks: Sequence[int]

  def setup(self):
    rising = all(a < b for a, b in itertools.pairwise((0, *self.ends)))
    if not rising or self.ends[-1] != self.num_embeddings or len(self.ends) != len(self.ranks):
      raise ValueError(
        f'bands end at {tuple(self.ends)} with ranks {tuple(self.ranks)}: ends rise to '
        f'{self.num_embeddings}, and each has a rank'
      )
    sizes = np.diff((0, *self.ends))
    self.bands = [
      FactorizedEmbed(int(n), self.features, r, name=f'band_{i}')
      for i, (n, r) in enumerate(zip(sizes, self.ranks))
    ]

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows `[..., D]`: each band looks all up, and its own count; NaN out of range."""
    embedding.check(inputs, self.num_embeddings, False)
    inputs = embedding.from_the_end(inputs, self.num_embeddings)
    out, start = 0.0, 0
    for band, end in zip(self.bands, self.ends):
      mine = (inputs >= start) & (inputs < end)
      rows = band(jnp.where(mine, inputs - start, 0))
      out, start = out + jnp.where(mine[..., None], rows, 0), end
    return _inside(inputs, self, out)

  def attend(self, query: jax.Array) -> jax.Array:
    """`[..., D] -> [..., V]`."""
    return jnp.concatenate([band.attend(query) for band in self.bands], -1)


class HashedEmbed(nn.Module):
  """A row is the product of two, by quotient and remainder of its number.

  Source: Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
  Recommendation Systems", 2020 (QR trick).

  Attributes:
    num_embeddings, features: V and D.
    buckets: Q, how many remainders there are.
  """

  num_embeddings: int
  features: int
  buckets: int

  def setup(self):
    if not 1 <= self.buckets <= self.num_embeddings:
      raise ValueError(f'buckets is {self.buckets}; it is between 1 and {self.num_embeddings}')
    part = lambda name, rows, init: self.param(
      name, nn.with_logical_partitioning(init, ('vocab', 'embed')), (rows, self.features)
    )
    self.remainder = part('remainder', self.buckets, default_embed_init)
    quotients = -(-self.num_embeddings // self.buckets)
    self.quotient = part('quotient', quotients, nn.initializers.ones)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows `[..., D]`; NaN for numbers out of range."""
    embedding.check(inputs, self.num_embeddings, False)
    inputs = embedding.from_the_end(inputs, self.num_embeddings)
    rows = self.remainder[inputs % self.buckets] * self.quotient[inputs // self.buckets]
    return _inside(inputs, self, rows)

  def attend(self, query: jax.Array) -> jax.Array:
    """`[..., D] -> [..., V]`, quotient by quotient."""
    of = lambda quotient_D: (query * quotient_D) @ self.remainder.T
    out = jax.lax.map(of, self.quotient)  # [V / Q, ..., Q]
    return jnp.moveaxis(out, 0, -2).reshape(*query.shape[:-1], -1)[..., : self.num_embeddings]


def _inside(inputs: jax.Array, table: nn.Module, rows_xD: jax.Array) -> jax.Array:
  """NaN where there is no such row, so that nobody takes another one for it."""
  inside_x = (inputs >= 0) & (inputs < table.num_embeddings)
  return jnp.where(inside_x[..., None], rows_xD, jnp.nan)
