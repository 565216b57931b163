"""Other small tables answer as the table that they stand for, and are trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.factorization import product_quantization
from gatedfm.nn.compressed import BandedEmbed, HashedEmbed, ProductQuantizedEmbed

V, D = 23, 6
KINDS = {
  'pieces': ProductQuantizedEmbed(V, D, 3, 5),
  'bands': BandedEmbed(V, D, (4, 10, V), (6, 3, 1)),
  'hashed': HashedEmbed(V, D, 5),
}


@pytest.fixture(params=KINDS)
def made(request):
  """A module, its variables, and the table that it stands for."""
  rng, module = np.random.default_rng(0), KINDS[request.param]
  new = nn.unbox(module.init(jax.random.key(0), jnp.arange(2)))
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  variables = {'params': jax.tree.map(draw, new['params'])}
  p = variables['params']
  if request.param == 'pieces':
    codes = rng.integers(0, 5, (V, 3)).astype(np.uint8)
    variables['quantized'] = {'codes': jnp.asarray(codes)}
    table = np.concatenate([np.asarray(p['pieces'])[m][codes[:, m]] for m in range(3)], 1)
  elif request.param == 'bands':
    table = np.concatenate(
      [p[f'band_{i}']['embedding'] @ p[f'band_{i}']['projection'] for i in range(3)]
    )
  else:
    table = np.stack([p['remainder'][i % 5] * p['quotient'][i // 5] for i in range(V)])
  return module, variables, table


def test_they_answer_as_the_table_would(made):
  module, variables, table = made
  ids = jnp.array([[0, 3, 22], [4, 9, 10]])
  np.testing.assert_allclose(module.apply(variables, ids), table[ids], rtol=1e-5, atol=1e-6)
  query = np.random.default_rng(1).normal(size=(2, 3, D)).astype(np.float32)
  got = module.apply(variables, jnp.asarray(query), method='attend')
  np.testing.assert_allclose(got, query @ table.T, rtol=1e-4, atol=1e-5)


def test_numbers_out_of_range(made):
  module, variables, _ = made
  got = module.apply(variables, jnp.array([0, V, -1, V - 1, -V - 1]))
  assert np.isnan(got).any(1).tolist() == [False, True, False, False, True]
  np.testing.assert_array_equal(got[2], got[3])  # from the end, as of nn.Embed
  with pytest.raises(ValueError, match='must be integers'):
    module.apply(variables, jnp.ones(2))


def test_only_what_is_looked_up_is_trained(made):
  module, variables, table = made
  rest = {k: v for k, v in variables.items() if k != 'params'}
  loss = lambda p: jnp.sum(jnp.square(module.apply({'params': p} | rest, jnp.array([5]))))
  slopes = jax.grad(loss)(variables['params'])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
  assert any((x != 0).any() for x in jax.tree.leaves(slopes))
  changed = jax.tree.map(lambda p, g: p - 1e-3 * g, variables['params'], slopes)
  assert loss(changed) < loss(variables['params']) == pytest.approx(np.square(table[5]).sum())


def test_pieces_of_a_table():
  table = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
  codes, pieces = product_quantization.fit(table, 2, V)
  held = {'params': {'pieces': pieces}, 'quantized': {'codes': codes}}
  got = ProductQuantizedEmbed(V, D, 2, V).apply(held, jnp.arange(V))
  np.testing.assert_array_equal(got, table)


@pytest.mark.parametrize(
  ('module', 'message'),
  [
    (BandedEmbed(V, D, (4, 4, V), (1, 1, 1)), 'ends rise to 23'),
    (BandedEmbed(V, D, (4, 20), (1, 1)), 'ends rise to 23'),
    (BandedEmbed(V, D, (4, V), (1,)), 'each has a rank'),
    (HashedEmbed(V, D, 0), 'buckets is 0'),
  ],
)
def test_refusals(module, message):
  with pytest.raises(ValueError, match=message):
    module.init(jax.random.key(0), jnp.arange(2))
