"""Every kind of table has the size that it says, and stands for the table it is made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.models import tables
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig

V, D = 900, 12
SMALLER = ('factorized', 'quantized_factors', 'product_quantized', 'banded', 'hashed')


def table(decay=0.6):
  rng = np.random.default_rng(0)
  return (rng.normal(size=(V, D)) * decay ** np.arange(D)).astype(np.float32)


def config(kind, **options):
  if kind not in ('dense', 'quantized'):
    options = {'compression': 0.5} | options
  return tables.resolved(TableConfig(kind, pieces=16, **options), V, D)


@pytest.mark.parametrize('kind', tables.KINDS)
def test_what_it_is_made_of_has_the_modules_shapes(kind):
  cfg = config(kind)
  made = tables.from_dense(cfg, table())
  module = tables.make(cfg, V, D)
  new = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1, int)))
  like = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert like(made) == like(new)
  size = tables.size(cfg, V, D)
  leaves = jax.tree.leaves(made)
  assert size == tables.Size(sum(x.size for x in leaves), sum(x.nbytes for x in leaves))
  whole = tables.to_dense(cfg, made, V, D)
  assert whole.shape == (V, D)
  off = np.linalg.norm(whole - table()) / np.linalg.norm(table())
  bound = {'dense': 0, 'quantized': 0.01, 'hashed': 1.0, 'product_quantized': 0.6}.get(kind, 0.3)
  assert off <= bound
  query = np.random.default_rng(1).normal(size=(2, D)).astype(np.float32)
  got = module.apply(made, jnp.asarray(query), method='attend')
  np.testing.assert_allclose(got, query @ whole.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', SMALLER)
@pytest.mark.parametrize('compression', [0.3, 0.8])
def test_it_is_as_small_as_asked_and_hardly_smaller(kind, compression):
  cfg = config(kind, compression=compression)
  left = tables.size(cfg, V, D).bytes / (4 * V * D)
  assert left <= 1 - compression
  if kind in ('factorized', 'banded', 'hashed'):
    assert left > 0.6 * (1 - compression)


def test_published_rank():
  cfg = tables.resolved(TableConfig('factorized', 0.9), 10_000, 300)
  assert cfg.rank == 29
  assert tables.size(cfg, 10_000, 300).parameters == 29 * 10_300


def test_inits():
  dense, counts = table(), np.arange(V)[::-1]
  error = lambda init, weights=1.0: np.sum(
    np.square(tables.to_dense(c := config('factorized', init=init, compression=0.7),
              tables.from_dense(c, dense, counts), V, D) - dense) * weights
  )  # fmt: skip
  assert error('svd') < error('weighted_svd')
  weights = np.maximum(counts, 1)[:, None]
  assert error('weighted_svd', weights) < error('svd', weights)
  # Worse than a table of zeros: rows of the wrong matrix.
  assert error('released_svd') > np.sum(np.square(dense)) / 2 > 3 * error('svd')
  assert error('random') > 3 * error('svd')


def test_factors_can_be_quantized_later():
  cfg = config('factorized')
  held = tables.from_dense(cfg, table())
  small = config('quantized_factors', rank=cfg.rank)
  made = tables.quantize_factors(small, held['params'])
  whole, rough = tables.to_dense(cfg, held, V, D), tables.to_dense(small, made, V, D)
  assert 0 < np.abs(whole - rough).max() < 0.02 * np.abs(whole).max()
  assert tables.size(small, V, D).bytes < tables.size(cfg, V, D).bytes / 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kind': 'factorised'}, 'factorized'),
    ({'kind': 'factorized'}, 'needs table.compression or table.rank'),
    ({'kind': 'quantized_factors'}, 'needs table.compression or table.rank'),
    ({'kind': 'dense', 'compression': 0.5}, 'choose another table.kind'),
    ({'kind': 'quantized', 'compression': 0.5}, 'its table.bits'),
    ({'kind': 'factorized', 'compression': 0.999}, 'leaves no rank'),
    ({'kind': 'banded', 'compression': 0.999}, 'remove less'),
    ({'kind': 'factorized', 'rank': 13}, 'at most 12'),
    ({'kind': 'quantized', 'bits': 5}, 'one of'),
    ({'kind': 'product_quantized', 'parts': 7}, 'parts is 7, which does not divide 12'),
    ({'kind': 'hashed', 'buckets': 5000}, 'buckets is 5000, of'),
    ({'kind': 'factorized', 'rank': 2, 'init': 'released_svd', 'split': 'balanced'}, 'reference'),
    ({'kind': 'hashed', 'buckets': 5, 'project_relu': True}, 'project_relu'),
  ],
)
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    tables.resolved(TableConfig(**options), V, D)


def test_weights_need_frequencies():
  with pytest.raises(ConfigError, match='frequencies'):
    tables.from_dense(config('factorized', init='weighted_svd'), table())
