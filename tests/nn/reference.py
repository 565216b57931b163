"""What the tests of single modules share: random parameters, plain NumPy convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tiny_speech import jit, random_tree


def normal(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def build(module, *args):
  """The module as a compiled function `run(params, *args)`, and random parameters for it.

  No bias is zero and no scale is one, so nothing agrees only because it starts there.
  """
  shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), *args)))
  params = random_tree(shapes, seed=3, scale=1.0).get('params', {})
  run = jit(lambda params, *args: module.apply({'params': params}, *args))
  return run, jax.tree.map(np.asarray, params)


def depthwise(x_BxTxC, kernel_KxC):
  """'Same' correlation by definition; an even kernel has its extra tap on the left."""
  x, k = np.asarray(x_BxTxC), len(kernel_KxC)
  out = np.zeros_like(x)
  for t in range(x.shape[1]):
    for i in range(k):
      source = t + i - k // 2
      if 0 <= source < x.shape[1]:
        out[:, t] += x[:, source] * np.asarray(kernel_KxC)[i]
  return out
