"""Two factors answer as `nn.Embed` does with their product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from gatedfm import partitioning
from gatedfm.nn.embedding import FactorizedEmbed

V, D = 11, 6
IDS = jnp.array([[0, 3, 10], [7, 7, 1]])


def factors(rank, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {'params': {'embedding': draw(V, rank), 'projection': draw(rank, D)}}


def product(variables):
  return {
    'params': {'embedding': variables['params']['embedding'] @ variables['params']['projection']}
  }


@pytest.mark.parametrize('one_hot', [False, True])
@pytest.mark.parametrize('rank', [1, 3, 6])
def test_it_answers_as_the_product_would(rank, one_hot):
  variables, dense = factors(rank), nn.Embed(V, D)
  small = FactorizedEmbed(V, D, rank, one_hot=one_hot)
  np.testing.assert_allclose(
    small.apply(variables, IDS), dense.apply(product(variables), IDS), rtol=1e-5, atol=1e-6
  )
  query = jax.random.normal(jax.random.key(0), (2, 4, D))
  np.testing.assert_allclose(
    small.apply(variables, query, method='attend'),
    dense.apply(product(variables), query, method='attend'), rtol=1e-4, atol=1e-5,
  )  # fmt: skip


@pytest.mark.parametrize('one_hot', [False, True])
def test_negative_numbers_count_from_the_end(one_hot):
  small, ids = FactorizedEmbed(V, D, 3, one_hot=one_hot), jnp.array([-1, -V, 2])
  dense = nn.Embed(V, D).apply(product(factors(3)), ids)
  np.testing.assert_allclose(small.apply(factors(3), ids), dense, rtol=1e-5, atol=1e-6)


def test_at_full_rank_with_the_identity_it_is_nn_embed():
  table = factors(D)['params']['embedding']
  small = {'params': {'embedding': table, 'projection': jnp.eye(D)}}
  dense = {'params': {'embedding': table}}
  np.testing.assert_array_equal(
    FactorizedEmbed(V, D, D).apply(small, IDS), nn.Embed(V, D).apply(dense, IDS)
  )


def test_types_are_those_of_nn_embed():
  variables = factors(3)
  for dtype in (None, jnp.bfloat16, jnp.float16):
    small, dense = FactorizedEmbed(V, D, 3, dtype=dtype), nn.Embed(V, D, dtype=dtype)
    got, want = small.apply(variables, IDS), dense.apply(product(variables), IDS)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    query = jnp.ones((2, D), jnp.float32)
    got = small.apply(variables, query, method='attend')
    assert got.dtype == dense.apply(product(variables), query, method='attend').dtype
  with pytest.raises(ValueError, match='float32; they must be integers'):
    FactorizedEmbed(V, D, 3).apply(variables, jnp.ones(3))


def test_a_new_one_varies_as_nn_embed():
  variables = FactorizedEmbed(4000, 64, 8).init(jax.random.key(0), IDS)['params']
  unboxed = nn.unbox(variables)
  table = np.asarray(unboxed['embedding'] @ unboxed['projection'])
  assert table.var() == pytest.approx(1 / 64, rel=0.15)
  assert variables['embedding'].names == ('vocab', 'rank')
  assert variables['projection'].names == ('rank', 'embed')


@pytest.mark.parametrize('number', [-12, 11])
def test_numbers_out_of_range(number):
  ids = jnp.array([1, number])
  plain = FactorizedEmbed(V, D, 3).apply(factors(3), ids)
  assert np.isnan(plain).any(1).tolist() == [False, True]  # as of nn.Embed
  checked = FactorizedEmbed(V, D, 3, checked=True)
  call = checkify.checkify(jax.jit(lambda ids: checked.apply(factors(3), ids)))
  with pytest.raises(checkify.JaxRuntimeError, match='the table has 11 rows'):
    call(ids)[0].throw()
  call(jnp.array([0, 10]))[0].throw()
  with pytest.raises(checkify.JaxRuntimeError, match='out of range'):
    checked.apply(factors(3), ids)


def test_neither_program_makes_the_table():
  """Of 5,000 rows no array of 5,000 x 64 is there."""
  small = FactorizedEmbed(5000, 64, 4)
  variables = jax.eval_shape(lambda: nn.unbox(small.init(jax.random.key(0), IDS)))
  for args, method in (((IDS,), '__call__'), ((jnp.ones((2, 64)),), 'attend')):
    loss = lambda v, method=method, args=args: small.apply(v, *args, method=method).sum()
    assert '5000,64' not in str(jax.make_jaxpr(jax.grad(loss))(variables))


@pytest.mark.parametrize('one_hot', [False, True])
def test_sharded_over_devices_it_answers_the_same(one_hot):
  small = FactorizedEmbed(16, 8, 3, one_hot=one_hot)
  init = lambda: small.init(jax.random.key(0), IDS)
  mesh = partitioning.make_mesh(1, 2, 4)
  where = partitioning.shardings(init, mesh)
  alone = nn.unbox(init())
  shared = jax.device_put(alone, where)
  assert shared['params']['embedding'].sharding.spec == jax.P('model', None)
  assert shared['params']['projection'].sharding.spec == jax.P(None, 'fsdp')
  ids = jnp.arange(16)
  query = jax.random.normal(jax.random.key(1), (4, 8))
  with partitioning.activate(mesh):
    rows = jax.jit(small.apply)(shared, ids)
    products = jax.jit(lambda v, q: small.apply(v, q, method='attend'))(shared, query)
  np.testing.assert_allclose(rows, small.apply(alone, ids), rtol=1e-6, atol=1e-6)
  want = small.apply(alone, query, method='attend')
  np.testing.assert_allclose(products, want, rtol=1e-5, atol=1e-6)
