"""Products, norms and convolutions against plain references, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import build, depthwise, normal
from tiny_speech import jit, key

from gatedfm.nn import layers


@pytest.mark.parametrize('shape', [(5,), (3, 5), (2, 3, 5)])
def test_dot_in_float32_is_the_plain_product(shape):
  x, w = normal(*shape), normal(5, 4, seed=1)
  weight = normal(*shape[:-1], 4, seed=2)
  ours = jit(
    jax.value_and_grad(lambda x, w: jnp.sum(weight * layers.dot(x, w, jnp.float32)), (0, 1))
  )
  plain = jit(jax.value_and_grad(lambda x, w: jnp.sum(weight * jnp.dot(x, w)), (0, 1)))
  for a, b in zip(jax.tree.leaves(ours(x, w)), jax.tree.leaves(plain(x, w))):
    np.testing.assert_array_equal(a, b)


def test_dot_in_bfloat16_keeps_types_and_nearly_the_gradient():
  x, w, weight = normal(2, 30, 40), normal(40, 20, seed=1), normal(2, 30, 20, seed=2)
  loss = lambda dtype: lambda x, w: jnp.sum(weight * layers.dot(x, w, dtype))
  grads = {d: jit(jax.grad(loss(d), (0, 1)))(x, w) for d in (jnp.bfloat16, jnp.float32)}
  for got, want in zip(grads[jnp.bfloat16], grads[jnp.float32]):
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # Seen, or the operands were not cast; small, or something else is wrong.
    assert 1e-5 < error < 5e-3
  half = x.astype(jnp.bfloat16)
  grad = jax.value_and_grad(lambda x, w: jnp.sum(layers.dot(x, w, jnp.bfloat16)), (0, 1))
  y, (dx, dw) = jax.eval_shape(grad, half, w)
  assert y.dtype == jnp.bfloat16
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_dot_accumulates_in_float32():
  """256 + 1 is 256 in bfloat16: a bfloat16 accumulator would lose the ones."""
  x = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((1, 64))], 1)
  y = layers.dot(x, jnp.ones((65, 1)), jnp.bfloat16)
  assert float(y[0, 0]) == 320


def test_linear():
  x = normal(2, 3, 5)
  run, p = build(layers.Linear(4, ('embed', 'mlp')), x)
  assert p['kernel'].shape == (5, 4)
  np.testing.assert_allclose(run(p, x), x @ p['kernel'] + p['bias'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('scale', 'shift'), [(1.0, 0.0), (1e-4, 0.0), (1.0, 1000.0)])
def test_layer_norm(scale, shift):
  """Also where the variance is tiny (epsilon) and where the mean is large (cancellation)."""
  x = scale * normal(2, 3, 16) + shift
  run, p = build(layers.LayerNorm(), x)
  z = np.asarray(x, np.float64)
  z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-12)
  np.testing.assert_allclose(run(p, x), z * p['scale'] + p['bias'], rtol=2e-4, atol=2e-4)


def test_dot_of_few_rows_reads_a_float32_matrix_as_it_is():
  x, w = normal(1, 1, 64), normal(64, 7, seed=1)
  dot = jit(lambda x, w: layers.dot(x, w, jnp.bfloat16))
  np.testing.assert_allclose(dot(x, w), x @ w, rtol=1e-5, atol=1e-5)
  # A bfloat16 matrix has the products of many rows.
  many = dot(jnp.tile(x, (1, 9, 1)), w)[:, :1]
  np.testing.assert_allclose(dot(x, w.astype(jnp.bfloat16)), many, rtol=1e-5, atol=1e-5)
  assert np.abs(many - x @ w).max() > 1e-3
  assert 'bf16' not in dot.lower(x, w).as_text()


def test_layer_norm_of_bfloat16_is_computed_in_float32():
  x = normal(4, 64, dtype=jnp.bfloat16)
  run, p = build(layers.LayerNorm(), x)
  y, exact = run(p, x), run(p, x.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_feed_forward_and_its_dropout():
  x = normal(2, 3, 8)
  module = layers.FeedForward(12, jax.nn.relu, 0.5)
  run, p = build(module, x)
  hidden = np.maximum(x @ p['w_1']['kernel'] + p['w_1']['bias'], 0)
  want = hidden @ p['w_2']['kernel'] + p['w_2']['bias']
  np.testing.assert_allclose(run(p, x), want, rtol=1e-4, atol=1e-4)
  rngs = {'dropout': key(0)}
  dropped = jit(lambda p: module.apply({'params': p}, x, deterministic=False, rngs=rngs))(p)
  assert np.abs(dropped - want).max() > 0.1


def test_activations():
  x = jnp.linspace(-4, 4, 33)
  np.testing.assert_allclose(layers.swish(x), x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
  # Exact, not the tanh approximation: Phi(1) = 0.841345.
  assert float(layers.gelu(jnp.float32(1.0))) == pytest.approx(0.8413447, abs=1e-6)


@pytest.mark.parametrize(('taps', 'length'), [(1, 4), (2, 5), (3, 7), (4, 6), (5, 2), (6, 3)])
def test_depthwise_forms_agree_with_gradients(taps, length):
  """Odd and even kernels, also longer than the input."""
  x, kernel = normal(2, length, 3), normal(taps, 3, seed=1)
  weight = normal(2, length, 3, seed=2)
  results = []
  for form in (layers.depthwise_shift, layers.depthwise_grouped):

    def run(x, kernel, form=form):
      y = form(x, kernel)
      return jnp.sum(weight * y * y), y

    (_, y), grads = jit(jax.value_and_grad(run, (0, 1), has_aux=True))(x, kernel)
    np.testing.assert_allclose(y, depthwise(x, kernel), rtol=1e-5, atol=1e-5)
    results.append(grads)
  for shift, grouped in zip(*results):
    np.testing.assert_allclose(shift, grouped, rtol=1e-4, atol=1e-5)


def test_depthwise_keeps_bfloat16():
  x, kernel = normal(2, 9, 4, dtype=jnp.bfloat16), normal(3, 4, seed=1)
  y = layers.depthwise(x, kernel)
  assert y.dtype == jnp.bfloat16
  want = depthwise(x.astype(jnp.float32), kernel)
  np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_depthwise_conv_adds_its_bias():
  x = normal(2, 5, 3)
  run, p = build(layers.DepthwiseConv(3), x)
  want = depthwise(x, p['kernel']) + p['bias']
  np.testing.assert_allclose(run(p, x), want, rtol=1e-5, atol=1e-5)


def test_parameters_carry_logical_names():
  module = layers.FeedForward(12, jax.nn.relu)
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.ones((1, 2, 8))))['params']
  assert boxed['w_1']['kernel'].names == ('embed', 'mlp')
  assert boxed['w_2']['kernel'].names == ('mlp', 'embed')
  assert boxed['w_1']['bias'].names == ('small',)
