"""Models with factors compute what the products would, whatever is cut out of them as well."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm
import tiny_speech
from flax import traverse_util

from gatedfm.data import lm_batches
from gatedfm.execution import lm_workdir
from gatedfm.execution.lm_workdir import LmCheckpoint
from gatedfm.factorization import svd
from gatedfm.gates import Gates
from gatedfm.models import lm, lm_costs, lm_losses
from gatedfm.models.lm import for_inference
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import low_rank
from gatedfm.nn.layers import Factorized
from gatedfm.pruning import allocation, calibration, factors, repair, scorers

B, L = 2, 7
TOKENS = np.random.default_rng(0).integers(0, 19, (B, L)).astype(np.int32)
ALL = ('*',)
SOME = ('decoder/embedding', '*ffn/w_*/kernel', '*/query/kernel', '*/key/kernel', '*/out/kernel')


@pytest.fixture(scope='module', params=list(tiny_lm.KINDS))
def kind(request, fast_compilation):
  return request.param


def model(kind, patterns=SOME, **size):
  cfg, params = tiny_lm.KINDS[kind], tiny_lm.params(kind)
  params, rows = factors.factorize(params, patterns, **size)
  return LmCheckpoint(factors.factored(cfg, rows), params, None, {'format': 'test'})


def logits(cfg, params, gates=None):
  net, params = for_inference(cfg, params)
  return np.asarray(net.apply({'params': params}, TOKENS, None, gates))


def multiplied(params):
  """The same with matrices in place of factors."""
  flat = traverse_util.flatten_dict(params, sep='/')
  whole = lambda x: jnp.asarray(np.asarray(x)) if isinstance(x, Factorized) else x
  return traverse_util.unflatten_dict({k: whole(x) for k, x in flat.items()}, sep='/')


def test_full_rank_is_the_dense_model(kind):
  cfg, params = tiny_lm.KINDS[kind], tiny_lm.params(kind)
  flat = traverse_util.flatten_dict(params, sep='/')
  for path in factors.matrices(params, ALL):
    found, _ = factors.factorize({'x': {'kernel': flat[path]}}, ALL, rank=min(flat[path].shape))
    factor = found['x']['kernel']
    assert factor.shape == flat[path].shape
    flat[path] = factor
  whole = logits(cfg, traverse_util.unflatten_dict(flat, sep='/'))
  np.testing.assert_allclose(whole, logits(cfg, params), rtol=1e-3, atol=1e-3)


def test_factors_are_their_products(kind):
  small = model(kind, rank=4)
  want = logits(tiny_lm.KINDS[kind], multiplied(small.params))
  np.testing.assert_allclose(logits(small.cfg, small.params), want, rtol=1e-4, atol=1e-4)
  # By a cache, token by token.
  net, params = for_inference(small.cfg, small.params)
  apply = lambda method, *args: net.apply({'params': params}, *args, method=method)
  caches = apply('start', B, L)
  for i in range(L):
    x, caches = apply('step', TOKENS[:, i : i + 1], i, caches, np.ones((B, L), bool))
    got = apply('logits', x)[:, 0]
    np.testing.assert_allclose(got, want[:, i], rtol=1e-3, atol=1e-3)


def test_saved_and_read_again(kind, tmp_path):
  small = model(kind, rank=3)
  lm_workdir.save(tmp_path / 'small', small)
  read = lm_workdir.load(tmp_path / 'small')
  assert read.cfg == small.cfg
  assert jax.tree.structure(read.params) == jax.tree.structure(small.params)
  jax.tree.map(np.testing.assert_array_equal, read.params, small.params)
  shapes = lm.abstract_params(small.cfg)
  assert {k: x.shape for k, x in shapes.items()} == {
    k: x.shape for k, x in low_rank.flat(small.params).items()
  }


@pytest.mark.parametrize('first', ['factors', 'cut'])
def test_cut_before_or_after(kind, first, tmp_path):
  cfg = tiny_lm.KINDS[kind]
  heads, channels = np.ones((3, cfg.heads), np.float32), np.ones((3, cfg.ffn), np.float32)
  heads[0, -1] = heads[1, :2] = channels[0, :4] = channels[2, 5:] = 0
  gates = Gates(
    {
      'decoder/attention_heads': heads,
      'decoder/ffn_channels': channels,
      'decoder/ffn': np.array([1.0, 0, 1]),
    }
  )
  if first == 'factors':
    small = model(kind, rank=4)
    want = logits(small.cfg, small.params, gates)
    small = lm_workdir.compacted(small, gates, {})
  else:
    dense = LmCheckpoint(cfg, tiny_lm.params(kind), None, {})
    cut = lm_workdir.compacted(dense, gates, {})
    params, rows = factors.factorize(cut.params, ('*/w_1/kernel', '*/out/kernel'), energy=1.0)
    assert {len(row.shape) for row in rows} == {2}
    small = dataclasses.replace(cut, params=params, cfg=factors.factored(cfg, rows))
    want = logits(cfg, tiny_lm.params(kind), gates)
  got = logits(small.cfg, small.params, small.fixed())
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  lm_workdir.save(tmp_path / 'small', small)
  read = lm_workdir.load(tmp_path / 'small')
  np.testing.assert_array_equal(logits(read.cfg, read.params, read.fixed()), got)


def test_costs(kind):
  cfg, small = tiny_lm.KINDS[kind], model(kind, ('*ffn/w_1/kernel', 'decoder/embedding'), rank=2)
  dense = LmCheckpoint(cfg, tiny_lm.params(kind), None, {})
  before, after = (lm_costs.count(m.cfg, m.params, 5) for m in (dense, small))
  width = cfg.embed_width or cfg.d
  table, linear = (19 * width, 2 * (19 + width)), (12 * 10, 2 * 22)
  saved = table[0] - table[1] + 3 * (linear[0] - linear[1])
  assert before['parameters'] - after['parameters'] == saved
  assert before['layer_macs'] - after['layer_macs'] == 5 * 3 * (linear[0] - linear[1])
  # In: a row of the first factor times the second; out, where tied: by both.
  rest = lambda counts: counts['macs'] - counts['layer_macs']
  assert rest(before) - rest(after) == 5 * (cfg.tied * (table[0] - table[1]) - 2 * width)


@pytest.mark.parametrize('weights', ['frequency', 'activation', 'fisher'])
def test_row_weights(weights):
  cfg, params = tiny_lm.KINDS['opt'], tiny_lm.params('opt')
  batches = list(lm_batches.batches(tiny_lm.pairs(5), 40, 32))
  projection = 'decoder/layers/layers_1/ffn/ffn/w_2/kernel'
  patterns = ('decoder/embedding',) + (() if weights == 'frequency' else (projection,))
  found = factors.row_weights(weights, cfg, params, patterns, batches)
  assert set(found) == set(patterns)
  counts, squares = np.zeros(19), dict.fromkeys(patterns, 0.0)
  net, _ = for_inference(cfg, params)
  flat = traverse_util.flatten_dict(params, sep='/')
  for b in batches:
    np.add.at(counts, b.tokens[b.mask], 1)

    def loss(mine, b=b):
      whole = traverse_util.unflatten_dict(flat | mine, sep='/')
      each = lm_losses.losses(net, whole, b.tokens, b.mask, b.at, None)
      return jnp.sum(each * b.weight) / b.weight.sum()

    grads = jax.grad(loss)({path: flat[path] for path in patterns})
    for path, g in grads.items():
      squares[path] = squares[path] + np.square(g).sum(1)
  want = counts if weights != 'fisher' else squares['decoder/embedding']
  np.testing.assert_allclose(
    found['decoder/embedding'], np.maximum(want, 1e-3 * want.mean()), rtol=1e-3
  )
  if weights == 'activation':
    # What the second product reads comes out of a ReLU.
    assert (found[projection] >= 0).all()
    assert found[projection].shape == (10,)
  if weights == 'fisher':
    want = np.maximum(squares[projection], 1e-3 * squares[projection].mean())
    np.testing.assert_allclose(found[projection], want, rtol=1e-3)
  # They are used: the weighted error is the smaller one.
  table = np.asarray(flat['decoder/embedding'])
  made, _ = factors.factorize(params, ('decoder/embedding',), found, rank=3)
  plain = svd.factorize(table, 3).product()
  error = lambda x: np.sum(np.square(x - table) * found['decoder/embedding'][:, None])
  assert error(np.asarray(made['decoder']['embedding'])) < error(plain)


def test_what_cannot_be_is_refused():
  cfg, params = tiny_lm.KINDS['opt'], tiny_lm.params('opt')
  with pytest.raises(ConfigError, match=r"no matrix matches '\*/w_3'; paths end in .*w_1/kernel"):
    factors.factorize(params, ('*/w_3',), rank=2)
  with pytest.raises(ConfigError, match='position'):
    factors.factorize(params, ('decoder/position_embedding',), rank=2)
  with pytest.raises(ConfigError, match=r'decoder/embedding: rank is 13'):
    factors.factorize(params, ('decoder/embedding',), rank=13)
  made, _ = factors.factorize(params, ('decoder/embedding',), rank=3)
  with pytest.raises(ConfigError, match='already'):
    factors.factorize(made, ('decoder/embedding',), rank=2)
  with pytest.raises(ConfigError, match='is no table'):
    factors.row_weights('frequency', cfg, params, ('*/w_1/kernel',), [])
  with pytest.raises(ValueError, match='none of the parameters'):
    lm.abstract_params(dataclasses.replace(cfg, factors=('decoder/none:3',)))


def half_closed(cfg):
  ranks = np.ones((1, cfg.ranks['decoder/embedding']), np.float32)
  ranks[0, [0, 3]] = 0
  heads = np.ones((3, cfg.heads), np.float32)
  heads[1, :2] = 0
  return Gates({'decoder/embedding_ranks': ranks, 'decoder/attention_heads': heads})


def test_ranks_are_gates(kind, tmp_path):
  """mask == compact, by one site more."""
  small = model(kind, ('decoder/embedding',), rank=5)
  assert small.cfg.unit_sites()[2].units == 5
  gates = half_closed(small.cfg)
  want = logits(small.cfg, small.params, gates)
  assert np.abs(want - logits(small.cfg, small.params)).max() > 1e-3
  cut = lm_workdir.compacted(small, gates, {})
  assert cut.params['decoder']['embedding'].rank == 3
  got = logits(cut.cfg, cut.params, cut.fixed())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  # Gates of each example.
  each = jax.tree.map(lambda g: np.stack([g[:, None]] * B, 1)[:, :, 0], dict(gates.values))
  np.testing.assert_allclose(logits(small.cfg, small.params, Gates(each)), want, atol=1e-4)
  lm_workdir.save(tmp_path / 'cut', cut)
  read = lm_workdir.load(tmp_path / 'cut')
  np.testing.assert_array_equal(logits(read.cfg, read.params, read.fixed()), got)
  before, after = (lm_costs.count(m.cfg, m.params, 5) for m in (small, cut))
  only = Gates({'decoder/embedding_ranks': gates['decoder/embedding_ranks']})
  after = lm_costs.count(small.cfg, lm_workdir.compacted(small, only, {}).params, 5)
  price = lm_costs.of_gates(small.cfg, 5)['decoder/embedding_ranks']
  assert before['parameters'] - after['parameters'] == 2 * price.params
  assert before['macs'] - after['macs'] == 2 * price.macs


def test_scores_of_ranks_trade_with_heads(fast_compilation):
  small = model('opt', ('decoder/embedding',), rank=7)
  batches = list(lm_batches.batches(tiny_lm.pairs(5), 40, 32))
  stats = calibration.collect(small.cfg, small.params, batches)
  scored = {
    name: scorers.get(name).score(scorers.Calibrated(small.cfg, small.params, stats))
    for name in ('taylor', 'fisher', 'magnitude', 'random')
  }
  for name, scores in scored.items():
    assert scores[calibration.RANKS].shape == (1, 7), name
  # By example and by hand.
  net, params = for_inference(small.cfg, small.params)
  want = np.zeros(7)

  @tiny_speech.jit
  @jax.grad
  def gradient(ranks, tokens, mask, at, weight):
    gates = Gates({'decoder/embedding_ranks': ranks})
    each = lm_losses.losses(net, params, tokens, mask, at, gates) * weight
    return jnp.sum(each) / weight.sum()

  for b in batches:
    for row in np.flatnonzero(b.weight.sum(-1)):
      some = (x[row, None] for x in (b.tokens, b.mask, b.at, b.weight))
      want += np.square(gradient(jnp.ones((1, 7)), *some)[0])
  np.testing.assert_allclose(scored['fisher'][calibration.RANKS][0], want, rtol=1e-3)
  singular = np.linalg.svd(tiny_lm.params('opt')['decoder']['embedding'])[1][:7]
  np.testing.assert_allclose(scored['magnitude'][calibration.RANKS][0], singular, rtol=1e-4)
  how = allocation.Allocation(over=('heads', 'ranks', 'ffn'))
  gates = allocation.allocate(scored['fisher'], {'bytes': 0.3}, small.cfg, how)
  halved = dataclasses.replace(small.cfg, dtype='bfloat16', activation_dtype='bfloat16')
  again = allocation.allocate(scored['fisher'], {'bytes': 0.3}, halved, how)
  jax.tree.map(np.testing.assert_array_equal, dict(again.values), dict(gates.values))
  left = lm_costs.count(small.cfg, lm_workdir.compacted(small, gates, {}).params, 5)
  before = lm_costs.count(small.cfg, small.params, 5)
  assert 0.5 < left['bytes'] / before['bytes'] <= 0.75
  gates = allocation.allocate(scored['magnitude'], {calibration.RANKS: 0.43}, small.cfg)
  assert gates[calibration.RANKS].tolist() == [[1, 1, 1, 1, 0, 0, 0]]
  plain = {k: v for k, v in scored['magnitude'].items() if k != calibration.RANKS}
  with pytest.raises(ConfigError, match=r'no scores of ranks: .*gatedfm.factorize'):
    allocation.allocate(plain, {calibration.RANKS: 0.5}, tiny_lm.KINDS['opt'])
  with pytest.raises(ConfigError, match='this model has factors'):
    repair.least_squares(small.cfg, small.params, Gates({}), batches)


def test_a_single_rank_is_one_gate():
  small = model('opt', ('decoder/embedding',), rank=1)
  scores = scorers.magnitude(scorers.Calibrated(small.cfg, small.params))
  gates = allocation.allocate(scores, {calibration.RANKS: 0.4}, small.cfg)
  assert gates[calibration.RANKS].shape == (1,)
  cut = lm_workdir.compacted(small, gates, {})
  np.testing.assert_allclose(
    logits(cut.cfg, cut.params), logits(small.cfg, small.params), rtol=1e-5
  )


def test_fresh_factors_differ_by_path_and_key():
  eye = np.eye(4, 5, dtype=np.float32)
  shapes = {'a': {'kernel': eye}, 'b': {'kernel': eye}}
  draw = lambda seed: low_rank.flat(
    low_rank.with_factors(shapes, {'a/kernel': 2, 'b/kernel': 2}, jax.random.key(seed))
  )
  one, again, other = draw(0), draw(0), draw(1)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  direction = lambda x: np.asarray(x / np.linalg.norm(x))
  firsts = [one['a/kernel/first'], one['b/kernel/first'], other['a/kernel/first']]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.abs(direction(firsts[i]) - direction(firsts[j])).max() > 0.1
