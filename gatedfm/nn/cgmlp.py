"""Convolutional gating MLP of the (E-)Branchformer.

Source: `espnet2/asr/layers/cgmlp.py`; Peng et al., "Branchformer" (ICML 2022).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from gatedfm.nn import layers


class CgMlp(nn.Module):
  """Linear D->F, exact GELU, spatial gating by a depthwise convolution, Linear F/2->D.

  `[B, T, D] -> [B, T, D]`. `mask` (`[B, T, 1]` or None) zeroes padding before the
  convolution; None lets the convolution see it, as ESPnet does.
  """

  hidden: int
  kernel_size: int = 31
  dropout: float = 0.0
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
  ) -> jax.Array:
    d = x_BxTxD.shape[-1]
    h = layers.Linear(self.hidden, ('embed', 'mlp'), self.dtype, name='w_1')(x_BxTxD)
    r, g = jnp.split(layers.gelu(h), 2, axis=-1)
    g = layers.LayerNorm(name='norm')(g)
    if mask is not None:
      g = jnp.where(mask, g, 0)
    # Gate starts as the identity: taps near 0, bias 1 (ESPnet's `espnet_initialization_fn`).
    g = layers.DepthwiseConv(self.kernel_size, bias_init=nn.initializers.ones, name='conv')(g)
    h = nn.Dropout(self.dropout)(r * g, deterministic)
    return layers.Linear(d, ('mlp', 'embed'), self.dtype, name='w_2')(h)
