"""Embedding tables of small integers: each row has a scale, and is made floating when it is read.

Letters: V rows, D features, C bytes or numbers that a row's features are kept in.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.nn import embedding

Dtype = Any
# Of a feature: fixed point, one byte, half a byte (two features in one).
TYPES = {16: np.int16, 8: np.int8, 4: np.uint8}
COLLECTION = 'quantized'  # of variables, which no optimizer touches
BLOCK = 4096  # rows that `attend` makes floating at a time


def width(features: int, bits: int) -> int:
  """C of a row of so many features."""
  return math.ceil(features / 2) if bits == 4 else features


def quantize(
  table_VxD: np.ndarray, bits: int = 8, scale_dtype: Dtype = np.float32
) -> tuple[np.ndarray, np.ndarray]:
  """Codes `[V, C]` and scales `[V, 1]`, symmetric: the largest of a row is the largest code.

  Args:
    table_VxD: on the host; read in blocks, so it may be a memory map.
    bits: 16, 8 or 4.
    scale_dtype: bfloat16 halves what the scales take; they are rounded up, so that the largest of
      a row still has a code, and codes are made for them as rounded.

  Raises:
    ValueError: other bits, or a table with numbers that are not finite.
  """
  _check(bits)
  rows, features = table_VxD.shape
  most = 2 ** (bits - 1) - 1
  codes = np.empty((rows, width(features, bits)), TYPES[bits])
  scales = np.empty((rows, 1), scale_dtype)
  for start in range(0, rows, BLOCK):
    part = np.asarray(table_VxD[start : start + BLOCK], np.float32)
    if not np.isfinite(part).all():
      raise ValueError(f'rows {start} to {start + len(part)} hold numbers that are not finite')
    largest = np.abs(part).max(1, keepdims=True)
    scale = _rounded_up(np.where(largest > 0, largest / most, 1), scale_dtype)
    rounded = np.clip(np.round(part / scale.astype(np.float32)), -most, most).astype(np.int32)
    codes[start : start + BLOCK] = _packed(rounded) if bits == 4 else rounded
    scales[start : start + BLOCK] = scale
  return codes, scales


def _rounded_up(numbers: np.ndarray, dtype: Dtype) -> np.ndarray:
  out = numbers.astype(dtype)
  above = np.nextafter(out, np.array(np.inf, dtype))
  return np.where(out.astype(np.float32) < numbers, above, out)


def _packed(codes: np.ndarray) -> np.ndarray:
  """Two features in a byte, the first in the lower half; 8 is added to each."""
  even = np.pad(codes + 8, ((0, 0), (0, codes.shape[1] % 2)), constant_values=8)
  return (even[:, ::2] | even[:, 1::2] << 4).astype(np.uint8)


def unpack(codes_xC: jax.Array, features: int, bits: int) -> jax.Array:
  """Whole numbers `[..., D]` of codes."""
  if bits != 4:
    return codes_xC
  halves = jnp.stack([codes_xC & 15, codes_xC >> 4], -1).astype(jnp.int8) - 8
  return halves.reshape(*codes_xC.shape[:-1], -1)[..., :features]


def _check(bits: int) -> None:
  if bits not in TYPES:
    raise ValueError(f'bits is {bits}; choose from {", ".join(map(str, TYPES))}')


class QuantizedEmbed(nn.Module):
  """A table of whole numbers and a scale for each row; it answers as `nn.Embed` and is not trained.

  Its variables are in the collection `quantized`, `codes` and `scale`, as `quantize` makes them.

  Attributes:
    num_embeddings, features: V and D, as of `nn.Embed`.
    bits: 16 (fixed point), 8 or 4.
    dtype: of what is looked up.
    scale_dtype: of the scales at rest.
    checked: as of `FactorizedEmbed`.
    axis: logical name of D.
  """

  num_embeddings: int
  features: int
  bits: int = 8
  dtype: Dtype = jnp.float32
  scale_dtype: Dtype = jnp.float32
  checked: bool = False
  axis: str = 'embed'

  def setup(self):
    _check(self.bits)
    shape = self.num_embeddings, width(self.features, self.bits)
    zeros = lambda shape, dtype, *axes: nn.LogicallyPartitioned(jnp.zeros(shape, dtype), axes)
    codes, dtype = 'codes', TYPES[self.bits]
    # Half-byte columns are no features: they are not split.
    axis = None if self.bits == 4 else self.axis
    self.codes = self.variable(COLLECTION, codes, zeros, shape, dtype, 'vocab', axis)
    scales = self.num_embeddings, 1
    self.scale = self.variable(COLLECTION, 'scale', zeros, scales, self.scale_dtype, 'vocab', None)

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows `[..., D]` in `dtype`; raises as `FactorizedEmbed` does."""
    embedding.check(inputs, self.num_embeddings, self.checked)
    at = embedding.from_the_end(inputs, self.num_embeddings)
    codes_xC = jnp.take(self.codes.value, at, axis=0, mode='clip')
    # Out of range the scale is NaN, as a row of `nn.Embed` would be.
    scale_x1 = jnp.take(self.scale.value, inputs, axis=0).astype(self.dtype)
    return unpack(codes_xC, self.features, self.bits).astype(self.dtype) * scale_x1

  def attend(self, query: jax.Array) -> jax.Array:
    """`[..., D] -> [..., V]`, some rows at a time."""
    query = query.astype(self.dtype)

    def products(codes_BxC: jax.Array, scale_Bx1: jax.Array) -> jax.Array:
      rows_BxD = unpack(codes_BxC, self.features, self.bits).astype(self.dtype)
      return (query @ rows_BxD.T) * scale_Bx1[:, 0].astype(self.dtype)

    codes, scale = self.codes.value, self.scale.value
    whole = len(codes) // BLOCK * BLOCK
    if not whole:
      return products(codes, scale)
    blocks = lambda x: x[:whole].reshape(-1, BLOCK, x.shape[-1])
    out = lax.map(lambda block: products(*block), (blocks(codes), blocks(scale)))
    out = jnp.moveaxis(out, 0, -2).reshape(*query.shape[:-1], whole)
    return jnp.concatenate([out, products(codes[whole:], scale[whole:])], -1)


class QuantizedFactors(nn.Module):
  """A factorized table whose first factor is whole numbers; the second, which is small, is trained.

  Attributes:
    num_embeddings, features, rank: V, D, R, as of `FactorizedEmbed`.
    bits, scale_dtype: of the first factor, as of `QuantizedEmbed`.
    dtype: of what is looked up.
  """

  num_embeddings: int
  features: int
  rank: int
  bits: int = 8
  dtype: Dtype = jnp.float32
  scale_dtype: Dtype = jnp.float32

  def setup(self):
    shape = self.num_embeddings, self.rank, self.bits
    self.embedding = QuantizedEmbed(
      *shape, dtype=self.dtype, scale_dtype=self.scale_dtype, axis='rank'
    )
    init = nn.with_logical_partitioning(embedding.PROJECTION_INIT, ('rank', 'embed'))
    self.projection = self.param('projection', init, (self.rank, self.features))

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Rows `[..., D]`."""
    return self.embedding(inputs) @ self.projection.astype(self.dtype)

  def attend(self, query: jax.Array) -> jax.Array:
    """`[..., D] -> [..., V]`."""
    return self.embedding.attend(query.astype(self.dtype) @ self.projection.T.astype(self.dtype))
