"""Linear, norm, feed-forward and convolution layers with logical axis names.

Letters: B batch, T time (frames or tokens), D model, F hidden, C channels, K kernel taps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Dtype = Any


@flax.struct.dataclass
class Indexed:
  """Matrix `index` (scalar) of a stack `[N, ...]`, taken out where `dot` needs it.

  A loop that slices its layers' matrices copies those of closed modules too; this way a matrix
  is sliced inside the branch that reads it.
  """

  stack: jax.Array
  index: jax.Array

  def take(self) -> jax.Array:
    """The matrix."""
    return lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)


@flax.struct.dataclass
class Compacted:
  """A parameter of a module of which heads or hidden channels have been cut out.

  Attributes:
    value: what is left of it.
    kept: which of the module's units those are; () where nobody asks.
  """

  value: jax.Array
  kept: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


def _left(x: Any) -> Any:
  """What is left of a parameter that may be `Compacted`."""
  return x.value if isinstance(x, Compacted) else x


@flax.struct.dataclass
class Factorized:
  """A matrix as the product of two, `[in, R] @ [R, out]`, which is never made.

  It stands among the parameters where the matrix would; what reads that by `param` needs `dot`,
  `look_up`, `.T` and `.shape` alone. Each factor may be `Indexed` or `Compacted`.
  """

  first: Any
  second: Any

  @property
  def shape(self) -> tuple[int, int]:
    """Of the product."""
    return (*_left(self.first).shape[:-1], _left(self.second).shape[-1])

  @property
  def rank(self) -> int:
    """R."""
    return _left(self.second).shape[-2]

  @property
  def T(self) -> Factorized:
    """The transposed product."""
    return Factorized(_left(self.second).T, _left(self.first).T)

  def take(self, rows: np.ndarray) -> Factorized:
    """The product's rows of these numbers."""
    return Factorized(_left(self.first)[rows], _left(self.second))

  @property
  def kept(self) -> tuple[int, ...] | None:
    """As of `Compacted`; None where no units were cut out."""
    return getattr(self.second, 'kept', getattr(self.first, 'kept', None))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """The product, for what reads matrices on the host."""
    pair = (np.asarray(_left(x), np.float32) for x in (self.first, self.second))
    return np.matmul(*pair).astype(dtype or np.float32)


def param(
  module: nn.Module,
  name: str,
  init: Callable,
  axes: Sequence[str | None],
  shape: Sequence[int],
) -> jax.Array:
  """A float32 parameter whose axes carry logical names; for `dot` it may be `Indexed` or
  `Factorized`.

  What is `Compacted` may be of another shape.
  """
  given = module.get_variable('params', name)
  if isinstance(given, Factorized):
    return Factorized(_left(given.first), _left(given.second))
  if isinstance(given, Compacted | Indexed):
    return _left(given)
  # Flax wants each name once; further small axes are replicated all the same.
  named = tuple(None if a in axes[:i] else a for i, a in enumerate(axes))
  if not module.is_initializing():
    # Flax checks shapes by tracing the initialiser: a simple one traces a model in half the time.
    init = nn.initializers.zeros
  return module.param(name, nn.with_logical_partitioning(init, named), tuple(shape))


def dot(
  x: jax.Array,
  w: jax.Array | Indexed | Factorized,
  dtype: Dtype,
  ranks: jax.Array | None = None,
) -> jax.Array:
  """`x @ w` with operands in `dtype`, accumulated in float32, returned in x's dtype.

  Shapes `[..., in] @ [in, out]`. A few rows and a float32 matrix stay float32 on CPUs, see
  `reads_float32`. The hand-written gradient casts its operands as well:
  left to autodiff, a float32 cotangent would pull both gradient products up to float32, and
  on CPUs that is three times slower than bfloat16 tiles. Between factors what is narrow is
  multiplied by `ranks`, `[1 or B, R]`, their gates.
  """
  if isinstance(w, Factorized):
    return dot(_gated(dot(x, w.first, dtype), ranks), w.second, dtype)
  return _differentiable_dot(x, w.take() if isinstance(w, Indexed) else w, dtype)


def look_up(
  table: jax.Array | Factorized, ids: jax.Array, dtype: Dtype, ranks: jax.Array | None = None
) -> jax.Array:
  """Rows `[..., D]` of a table `[V, D]`, in `dtype`; products of factors as of `dot`."""
  if isinstance(table, Factorized):
    return dot(_gated(table.first[ids].astype(dtype), ranks), table.second, dtype)
  return table[ids].astype(dtype)


def _gated(x_xR: jax.Array, ranks: jax.Array | None) -> jax.Array:
  """Multiplied by gates `[1 or B, R]`."""
  if ranks is None:
    return x_xR
  axes = (*range(1, x_xR.ndim - 1),)
  return x_xR * jnp.expand_dims(ranks, axes).astype(x_xR.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _differentiable_dot(x: jax.Array, w: jax.Array, dtype: Dtype) -> jax.Array:
  return _dot(x, w, dtype, x.dtype)


def reads_float32(rows: int) -> bool:
  """Whether a product of `rows` rows had better find its matrix in float32, whatever its dtype.

  XLA's CPU compiler has no bfloat16 product of a vector and a matrix: it converts the matrix,
  and behind a gate it does so again at every token.
  """
  return rows <= 8 and jax.default_backend() == 'cpu'


def _dot(x: jax.Array, w: jax.Array, dtype: Dtype, out: Dtype) -> jax.Array:
  if w.dtype == jnp.float32 and reads_float32(math.prod(x.shape[:-1])):
    dtype = jnp.float32
  y = jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
  return y.astype(out)


def _dot_grad(dtype: Dtype, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, w, like = saved
  dx = _dot(dy, w.T, dtype, like.dtype)
  rows = lambda a: a.reshape(-1, a.shape[-1])
  return dx, _dot(rows(x).T, rows(dy), dtype, jnp.float32)


_differentiable_dot.defvjp(
  lambda x, w, dtype: (
    _dot(x, w, dtype, x.dtype),
    (x.astype(dtype), w.astype(dtype), jnp.zeros((), x.dtype)),
  ),
  _dot_grad,
)


@jax.jit
def swish(x: jax.Array) -> jax.Array:
  """`x * sigmoid(x)`; a nested jit, so that XLA:CPU does not recompute it in every consumer."""
  return jax.nn.swish(x)


@jax.jit
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, nested like `swish`; by erf, which XLA:CPU computes faster than erfc."""
  return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


ACTIVATIONS = {'swish': swish, 'relu': jax.nn.relu, 'gelu': gelu}


@functools.partial(jax.jit, static_argnames='epsilon')
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """Layer normalisation over the last axis in float32, returned in x's dtype.

  The variance is taken about the mean: with ESPnet's epsilon of 1e-12, E[x^2] - E[x]^2 would
  go negative.
  """
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, -1, keepdims=True)
  y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + epsilon)
  return (y * scale + bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnames='epsilon')
def normalize_rms(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`x / rms(x) * scale` over the last axis in float32, returned in x's dtype."""
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + epsilon)
  return (y * scale).astype(x.dtype)


class Linear(nn.Module):
  """`x @ kernel + bias` over the last axis, `[..., in] -> [..., features]`.

  Attributes:
    features: output width.
    axes: logical names of the kernel's (input, output) axes.
    dtype: of the product's operands; the result has x's dtype, parameters are float32.
    use_bias: False leaves the bias out.
  """

  features: int
  axes: tuple[str, str]
  dtype: Dtype = jnp.float32
  kernel_init: Callable = nn.initializers.xavier_uniform()
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = param(self, 'kernel', self.kernel_init, self.axes, (x.shape[-1], self.features))
    if not self.use_bias:
      return dot(x, kernel, self.dtype)
    last = kernel.second if isinstance(kernel, Factorized) else kernel
    width = self.features if isinstance(last, Indexed) else last.shape[-1]
    bias = param(self, 'bias', nn.initializers.zeros, ('small',), (width,))
    return dot(x, kernel, self.dtype) + bias.astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer normalisation with ESPnet's epsilon, 1e-12 (`transformer/layer_norm.py`)."""

  epsilon: float = 1e-12

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = param(self, 'scale', nn.initializers.ones, ('small',), (x.shape[-1],))
    bias = param(self, 'bias', nn.initializers.zeros, ('small',), (x.shape[-1],))
    return normalize(x, scale, bias, self.epsilon)


class RMSNorm(nn.Module):
  """Root mean square normalisation over the last axis (Zhang and Sennrich, 2019), in float32."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = param(self, 'scale', nn.initializers.ones, ('small',), (x.shape[-1],))
    return normalize_rms(x, scale, self.epsilon)


class FeedForward(nn.Module):
  """`w_2(dropout(activation(w_1 x)))`, `[B, T, D] -> [B, T, D]`.

  Attributes:
    gated: multiplies `w_1 x` by `activation(w_gate x)` in place of activating it (SwiGLU:
      Shazeer, "GLU Variants Improve Transformer", 2020).
    use_bias: whether the products have biases.
  """

  hidden: int
  activation: Callable[[jax.Array], jax.Array]
  dropout: float = 0.0
  dtype: Dtype = jnp.float32
  gated: bool = False
  use_bias: bool = True

  @nn.compact
  def __call__(
    self, x_BxTxD: jax.Array, deterministic: bool = True, channels: jax.Array | None = None
  ) -> jax.Array:
    """With `channels`, gates of the hidden channels, `[1 or B, F]`."""
    linear = functools.partial(Linear, dtype=self.dtype, use_bias=self.use_bias)
    inward = lambda name: linear(self.hidden, ('embed', 'mlp'), name=name)(x_BxTxD)
    h_BxTxF = inward('w_1')
    if self.gated:
      h_BxTxF = h_BxTxF * self.activation(inward('w_gate'))
    else:
      h_BxTxF = self.activation(h_BxTxF)
    if channels is not None:
      h_BxTxF = h_BxTxF * channels[:, None].astype(h_BxTxF.dtype)
    h_BxTxF = nn.Dropout(self.dropout)(h_BxTxF, deterministic)
    return linear(x_BxTxD.shape[-1], ('mlp', 'embed'), name='w_2')(h_BxTxF)


@functools.partial(jax.jit, static_argnames='flip')
def _shift(x_BxTxC: jax.Array, kernel_KxC: jax.Array, flip: bool = False) -> jax.Array:
  k, t = kernel_KxC.shape[0], x_BxTxC.shape[1]
  left = (k - 1) // 2 if flip else k // 2
  padded = jnp.pad(x_BxTxC, ((0, 0), (left, k - 1 - left), (0, 0)))
  taps = kernel_KxC[::-1] if flip else kernel_KxC
  return functools.reduce(jnp.add, (padded[:, i : i + t] * taps[i] for i in range(k)))


@jax.jit
def _shift_kernel_grad(x_BxTxC: jax.Array, dy_BxTxC: jax.Array, like_KxC: jax.Array) -> jax.Array:
  k, t = like_KxC.shape[0], x_BxTxC.shape[1]
  padded = jnp.pad(x_BxTxC, ((0, 0), (k // 2, (k - 1) // 2), (0, 0)))
  return jnp.stack([jnp.sum(padded[:, i : i + t] * dy_BxTxC, (0, 1)) for i in range(k)])


@jax.custom_vjp
def depthwise_shift(x_BxTxC: jax.Array, kernel_KxC: jax.Array) -> jax.Array:
  """Depthwise 'same' convolution over time as K shift-and-adds.

  XLA:CPU lowers a grouped convolution to a scalar loop about 25 times slower than this. The
  nested jit keeps XLA from fusing what produces `x` into every one of the K shifts, and the
  hand-written gradient is again K shifts instead of K padded copies.
  """
  return _shift(x_BxTxC, kernel_KxC)


depthwise_shift.defvjp(
  lambda x, kernel: (_shift(x, kernel), (x, kernel)),
  lambda saved, dy: (
    _shift(dy, saved[1], flip=True),
    _shift_kernel_grad(saved[0], dy, saved[1]),
  ),
)


def depthwise_grouped(x_BxTxC: jax.Array, kernel_KxC: jax.Array) -> jax.Array:
  """Depthwise 'same' convolution over time as one grouped convolution (GPU, TPU)."""
  k = kernel_KxC.shape[0]
  return lax.conv_general_dilated(
    x_BxTxC,
    kernel_KxC[:, None, :],
    window_strides=(1,),
    padding=[(k // 2, (k - 1) // 2)],
    dimension_numbers=('NWC', 'WIO', 'NWC'),
    feature_group_count=x_BxTxC.shape[-1],
  )


def depthwise(x_BxTxC: jax.Array, kernel_KxC: jax.Array) -> jax.Array:
  """Depthwise 'same' convolution in the backend's fast form, without bias, in x's dtype.

  On CPU bfloat16 vector arithmetic is emulated, so taps and sum are float32 there.
  """
  if jax.default_backend() == 'cpu':
    return depthwise_shift(x_BxTxC.astype(jnp.float32), kernel_KxC).astype(x_BxTxC.dtype)
  return depthwise_grouped(x_BxTxC, kernel_KxC.astype(x_BxTxC.dtype))


class DepthwiseConv(nn.Module):
  """Depthwise convolution over time with bias, zero-padded, `[B, T, C] -> [B, T, C]`."""

  kernel_size: int
  kernel_init: Callable = nn.initializers.normal(1e-6)
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
    c = x_BxTxC.shape[-1]
    kernel = param(self, 'kernel', self.kernel_init, ('small', 'small'), (self.kernel_size, c))
    bias = param(self, 'bias', self.bias_init, ('small',), (c,))
    return depthwise(x_BxTxC, kernel) + bias.astype(x_BxTxC.dtype)
