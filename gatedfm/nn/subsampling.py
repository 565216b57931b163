"""Convolutional subsampling to 40 ms and sinusoidal positions.

Source: `espnet/nets/pytorch_backend/transformer/{subsampling,embedding}.py`.
Letters: B batch, T frames (10 ms), S subsampled frames (40 ms), M mel bands, D model.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gatedfm.nn import layers


def subsampled_length(frames: int) -> int:
  """Frames that two unpadded convolutions of size 3 and stride 2 leave; ints or arrays."""
  return ((frames - 1) // 2 - 1) // 2


def subsampled_mask(mask_BxT: jax.Array) -> jax.Array:
  """The time mask after subsampling, `[B, S]`: `[:-2:2]`, twice, as ESPnet slices it."""
  return mask_BxT[:, :-2:2][:, :-2:2]


def positions(length: int, width: int) -> np.ndarray:
  """Interleaved sine and cosine positions, `[length, width]` float32 (Vaswani et al. 2017)."""
  rate = np.exp(np.arange(0, width, 2, dtype=np.float32) * -(math.log(10_000.0) / width))
  angle = np.arange(length, dtype=np.float32)[:, None] * rate
  return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, -1)[:, :width]


class Conv2dSubsampling(nn.Module):
  """Two 3x3 stride-2 convolutions with ReLU and a projection: `[B, T, M] -> [B, S, D]`.

  Attributes:
    features: D.
    channels: convolution channels; ESPnet has D, small models do well with fewer.
  """

  features: int
  channels: int
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BxTxM: jax.Array) -> jax.Array:
    x = x_BxTxM[..., None]
    for i in range(2):
      shape = (3, 3, x.shape[-1], self.channels)
      init = nn.initializers.variance_scaling(2.0, 'fan_in', 'uniform')
      # Input channels stay whole: with them on a mesh axis of the batch's, XLA (jaxlib 0.10.2)
      # partitions the gradient by the convolution's input wrongly, without a word.
      axes = ('small', 'small', 'small', 'mlp')
      kernel = layers.param(self, f'conv_{i + 1}_kernel', init, axes, shape)
      bias = layers.param(
        self, f'conv_{i + 1}_bias', nn.initializers.zeros, ('small',), (self.channels,)
      )
      x = lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (2, 2),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
      x = jax.nn.relu(x + bias.astype(x.dtype))
    # ESPnet flattens channel-major: (B, C, S, M') -> (B, S, C * M').
    x = x.transpose(0, 1, 3, 2).reshape(*x.shape[:2], -1)
    return layers.Linear(self.features, ('mlp', 'embed'), self.dtype, name='out')(x)


def add_positions(x_BxTxD: jax.Array, start: jax.Array | int = 0, limit: int = 0) -> jax.Array:
  """`x * sqrt(D) + sinusoid`, from position `start` (a traced scalar needs `limit` rows)."""
  d = x_BxTxD.shape[-1]
  table = jnp.asarray(positions(limit or x_BxTxD.shape[1], d))
  rows = lax.dynamic_slice_in_dim(table, start, x_BxTxD.shape[1]) if limit else table
  return x_BxTxD * math.sqrt(d) + rows.astype(x_BxTxD.dtype)
