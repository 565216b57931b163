"""Embedding tables that are smaller than `nn.Embed`'s and answer the same calls.

Each looks up integers `[...]` as `[..., D]`, and `attend`s, `[..., D] -> [..., V]`: products with
all rows, for output layers that share the table. None ever makes the whole table `[V, D]`.
Letters: V rows, D features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from flax.linen.linear import default_embed_init
from jax.experimental import checkify

Dtype = Any
# A column of the second factor has the variance that makes the product's `nn.Embed`'s.
PROJECTION_INIT = nn.initializers.variance_scaling(1.0, 'fan_out', 'normal')


class FactorizedEmbed(nn.Module):
  """A table as the product of two factors, `embedding` `[V, R]` and `projection` `[R, D]`.

  Source: Acharya et al., "Online Embedding Compression for Text Classification using Low Rank
  Matrix Factorization", AAAI 2019.

  Attributes:
    num_embeddings, features: V and D, as of `nn.Embed`.
    rank: R.
    dtype, param_dtype, promote_dtype: as of `nn.Embed`.
    embedding_init, projection_init: of the factors.
    one_hot: looks up by a product with one-hot rows, which suits tables sharded over TPUs;
      numbers out of range then give zeros.
    checked: whether numbers out of range, and negative ones, are an error: at once outside jit,
      inside of `checkify`'s. Otherwise they give NaN, or count from the end, as of `nn.Embed`.
  """

  num_embeddings: int
  features: int
  rank: int
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  embedding_init: Callable[..., Any] = default_embed_init
  projection_init: Callable[..., Any] = PROJECTION_INIT
  promote_dtype: Callable[..., Any] = dtypes.promote_dtype
  one_hot: bool = False
  checked: bool = False

  def setup(self):
    if self.rank < 1:
      raise ValueError(f'rank is {self.rank}; it must be at least 1')
    part = lambda name, init, axes, shape: self.param(
      name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype
    )
    v, d, r = self.num_embeddings, self.features, self.rank
    self.embedding = part('embedding', self.embedding_init, ('vocab', 'rank'), (v, r))
    self.projection = part('projection', self.projection_init, ('rank', 'embed'), (r, d))

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows of the table, `[..., D]`, of integers of any shape; raises ValueError for others."""
    x_xR = self.narrow(inputs)
    return jnp.matmul(*self.promote_dtype(x_xR, self.projection, dtype=self.dtype, inexact=False))

  def narrow(self, inputs: jax.Array) -> jax.Array:
    """Rows of the first factor, `[..., R]`: what a layer reads that the second is folded into."""
    check(inputs, self.num_embeddings, self.checked)
    (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
    return look_up(table, inputs, self.one_hot)

  def attend(self, query: jax.Array) -> jax.Array:
    """Products with all rows, `[..., D] -> [..., V]`."""
    query, projection = self.promote_dtype(query, self.projection, dtype=self.dtype)
    x_xR, table = self.promote_dtype(query @ projection.T, self.embedding, dtype=self.dtype)
    return x_xR @ table.T


def from_the_end(inputs: jax.Array, rows: int) -> jax.Array:
  """Numbers of rows, negative ones counted from the end as in `nn.Embed`."""
  return jnp.where(inputs < 0, inputs + rows, inputs)


def check(inputs: jax.Array, rows: int, checked: bool) -> None:
  """Raises ValueError for what is no integer; of `checked` ones, too, for what is out of range.

  The latter is `checkify.JaxRuntimeError`, and only the caller's `checkify` finds it inside jit.
  """
  if not jnp.issubdtype(inputs.dtype, jnp.integer):
    raise ValueError(f'inputs of an embedding are {inputs.dtype}; they must be integers')
  if checked:
    inside = jnp.all((inputs >= 0) & (inputs < rows))
    checkify.check(inside, f'numbers out of range: the table has {rows} rows')


def look_up(table: jax.Array, inputs: jax.Array, one_hot: bool = False) -> jax.Array:
  """Rows `[..., R]` of a table `[V, R]`."""
  if one_hot:
    return jax.nn.one_hot(from_the_end(inputs, len(table)), len(table), dtype=table.dtype) @ table
  return jnp.take(table, inputs, axis=0)
