"""Scanned, unrolled and recomputed stacks are one computation, and the layouts convert."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_speech
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.models import stack as stack_lib
from gatedfm.models.speech_config import GateConfig, SpeechConfig
from gatedfm.nn import gating, layers

LAYERS, WIDTH = 3, 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)
SHIFT = jnp.float32(0.1)
GATES = {'ffn': jnp.array([[1.0, 0.3], [0.0, 1.0], [0.7, 1.0]])}
LAYOUTS = [(scan, remat) for scan in (True, False) for remat in ('none', 'full', 'dots')]


class Toy(nn.Module):
  """A gated layer with a product, dropout and both broadcast arguments."""

  cfg: SpeechConfig

  @nn.compact
  def __call__(self, x, gates, shift, context, deterministic):
    linear = layers.Linear(WIDTH, ('embed', 'mlp'), name='linear')
    y = jnp.tanh(gating.scale('mask', gates.get('ffn'), linear(x)) + shift)
    return x + nn.Dropout(0.5)(y * context['scale'], deterministic), gates


def stack(scan, remat):
  return stack_lib.Stack(Toy, SpeechConfig(scan_layers=scan, remat=remat), LAYERS)


def toy_params():
  init = lambda: stack(True, 'none').init(jax.random.key(0), X, GATES, SHIFT, {'scale': 1.0}, True)
  shapes = jax.eval_shape(lambda: nn.unbox(init()))
  return tiny_speech.random_tree(shapes['params'])


def loss(scan, remat, deterministic, params, x):
  rngs = None if deterministic else {'dropout': tiny_speech.key(7)}
  y, used = stack(scan, remat).apply(
    {'params': params}, x, GATES, SHIFT, {'scale': 2.0}, deterministic, rngs=rngs
  )
  return jnp.sum(y**2), (y, used)


@functools.cache
def results(scan, remat, deterministic=True):
  params = toy_params() if scan else stack_lib.unstack(toy_params())
  run = functools.partial(loss, scan, remat, deterministic)
  (_, aux), grads = tiny_speech.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, X)
  return aux, grads if scan else (stack_lib.restack(grads[0]), grads[1])


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize(('scan', 'remat'), LAYOUTS)
def test_layouts_agree_in_outputs_and_gradients(scan, remat):
  assert_same(results(scan, remat), results(True, 'none'))
  (_, used), _ = results(scan, remat)
  np.testing.assert_array_equal(used['ffn'], GATES['ffn'])


@pytest.mark.parametrize('scan', [True, False])
def test_recomputation_draws_the_same_dropout(scan):
  assert_same(results(scan, 'full', False), results(scan, 'none', False))
  (dropped, _), _ = results(scan, 'none', False)
  (kept, _), _ = results(scan, 'none', True)
  assert np.abs(dropped - kept).max() > 0.1


@pytest.mark.parametrize('scan', [True, False])
def test_full_recomputes_products_and_dots_keeps_them(scan):
  params = toy_params() if scan else stack_lib.unstack(toy_params())

  def count(remat, primitive):
    grad = jax.grad(lambda p: loss(scan, remat, True, p, X)[0])
    jaxpr = jax.make_jaxpr(grad)(params).jaxpr
    return sum(e.primitive.name == primitive for e in tiny_speech.equations(jaxpr))

  each = 1 if scan else LAYERS
  # A product forward and two backward, and its like once more where it is recomputed.
  assert [count(r, 'dot_general') // each for r in ('none', 'full', 'dots')] == [3, 4, 3]
  assert [count(r, 'tanh') // each for r in ('none', 'full', 'dots')] == [1, 2, 2]


def test_each_needs_the_unrolled_layout():
  scanned = stack(True, 'none').bind({'params': toy_params()})
  with pytest.raises(ValueError, match='unroll_decoder'):
    scanned.each(lambda *a: None, GATES)
  unrolled = stack(False, 'none').bind({'params': stack_lib.unstack(toy_params())})
  seen = unrolled.each(lambda layer, g, i: (type(layer), g['ffn'].tolist(), i), GATES)
  assert seen == [(Toy, g, i) for i, g in enumerate(GATES['ffn'].tolist())]


trees = st.deferred(
  lambda: st.dictionaries(
    st.sampled_from(['encoder', 'decoder', 'norm', 'layers', 'kernel']),
    st.one_of(st.just('leaf'), st.tuples(st.just('scan'), st.integers(1, 12)), trees),
    min_size=1,
    max_size=3,
  )
)


@settings(max_examples=12, deadline=None)
@given(trees)
def test_unstack_and_restack_are_inverse(tree):
  """Wherever the stacks stand, and with more layers than one digit counts."""
  rng = np.random.default_rng(0)

  def fill(node):
    if node == 'leaf':
      return jnp.asarray(rng.normal(size=3))
    if isinstance(node, tuple):
      return {'scan': {'w': {'kernel': jnp.asarray(rng.normal(size=(node[1], 2)))}}}
    return {k: fill(v) for k, v in node.items()}

  params = fill(tree)
  back = stack_lib.restack(stack_lib.unstack(params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
  ('encoder', 'scope'), [('e_branchformer', 'layer'), ('transformer', 'global')]
)
def test_converted_parameters_are_what_the_unrolled_model_makes(encoder, scope):
  gates = GateConfig(enabled=True, scope=scope, hidden=(3,), features=2)
  cfg = tiny_speech.config(encoder, gates)
  unrolled = tiny_speech.shapes(tiny_speech.config(encoder, gates, scan_layers=False))
  scanned = tiny_speech.shapes(cfg)
  shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert shapes(jax.eval_shape(stack_lib.unstack, scanned)) == shapes(unrolled)
  assert shapes(jax.eval_shape(stack_lib.restack, unrolled)) == shapes(scanned)
