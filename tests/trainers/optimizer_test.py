"""Schedules at their ends, and which parameters decay, turn and belong to gates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_speech

from gatedfm.models.speech_config import ConfigError
from gatedfm.trainers import optimizer, schedules
from gatedfm.trainers.config import OptimizerConfig, SparsityConfig

SPARSITY = SparsityConfig(target=0.6, ramp=0.4, freeze=0.25, tau_start=2.0, tau_end=0.5)


def now(step, steps=100, cfg=SPARSITY):
  return optimizer.sparsity_schedule(cfg, steps, step)


def test_target_rises_over_the_ramp():
  assert now(0)['target'] == 0
  np.testing.assert_allclose(now(20)['target'], 0.3, rtol=1e-6)
  for step in (40, 70, 99):
    np.testing.assert_allclose(now(step)['target'], 0.6, rtol=1e-6)
  at_once = dataclasses.replace(SPARSITY, ramp=0.0)
  assert now(0, cfg=at_once)['target'] == 0
  np.testing.assert_allclose(now(1, cfg=at_once)['target'], 0.6, rtol=1e-6)


def test_temperature_falls_geometrically_until_the_freeze():
  np.testing.assert_allclose(now(0)['temperature'], 2.0, rtol=1e-6)
  middle = now(37, 99)['temperature']  # close to half of the search
  np.testing.assert_allclose(middle, 1.0, rtol=0.02)
  for step in (75, 99):
    np.testing.assert_allclose(now(step)['temperature'], 0.5, rtol=1e-5)


def test_search_ends_with_the_freeze():
  assert [bool(now(step)['search']) for step in (0, 74, 75, 99)] == [True, True, False, False]
  never = dataclasses.replace(SPARSITY, freeze=0.0)
  assert now(99, cfg=never)['search']
  assert now(5)['weight'] == SPARSITY.weight


@pytest.mark.parametrize('schedule', ['cosine', 'rsqrt', 'constant'])
def test_learning_rate_warms_up_to_its_peak(schedule):
  cfg = OptimizerConfig(warmup=10, schedule=schedule, final_fraction=0.1)
  rate = optimizer.learning_rate(cfg, 0.5, 100)
  rates = np.array([rate(i) for i in range(101)])
  assert rates.argmax() in (9, 10)
  np.testing.assert_allclose(rates.max(), 0.5, rtol=1e-6)
  assert (np.diff(rates[:10]) > 0).all()
  assert (np.diff(rates[10:]) <= 1e-9).all()
  last = {'cosine': 0.05, 'rsqrt': 0.5 * np.sqrt(10 / 101), 'constant': 0.5}[schedule]
  np.testing.assert_allclose(rates[-1], last, rtol=1e-5)


@pytest.mark.parametrize(
  ('schedule', 'want'),
  [
    ('calr', lambda: schedules.calr_schedule(0.5, 0.02, 6, 0.2, 9)),
    ('released_calr', lambda: schedules.released_calr_schedule(0.5, 9, 6, 0.2, 2)),
    ('clr', lambda: schedules.clr_schedule(0.5, 0.02, 6)),
    ('triangular2', lambda: schedules.clr_schedule(0.5, 0.02, 6, 'triangular2')),
    ('exp_range', lambda: schedules.clr_schedule(0.5, 0.02, 6, 'exp_range')),
    ('sgdr', lambda: schedules.sgdr_schedule(0.5, 0.02, 12, 60)),
  ],
)
@pytest.mark.parametrize(('half', 'every'), [(6, 9), (0.1, 0.15)])
def test_cycles(schedule, want, half, every):
  options = {'half_cycle': half, 'decay': 0.2, 'decay_every': every, 'final_fraction': 0.04}
  cfg = OptimizerConfig(schedule=schedule, **options)
  cfg.validate()
  got, want = optimizer.learning_rate(cfg, 0.5, 60), want()
  np.testing.assert_allclose([got(i) for i in range(60)], [want(i) for i in range(60)], rtol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'half_cycle': 0}, 'half_cycle is above 0'),
    ({'half_cycle': 1.5}, r'half_cycle is 1\.5; it is whole steps, or a share'),
    ({'decay_every': 1.5}, r'decay_every is 1\.5; it is whole steps, or a share'),
    ({'schedule': 'released_calr'}, 'set decay_every to the steps of an epoch'),
    (
      {'schedule': 'released_calr', 'decay_every': 9, 'final_fraction': 0.02},
      r'final_fraction is 0\.02; of released_calr it is a power of the decay, such as 0\.001',
    ),
    ({'schedule': 'released_calr', 'decay_every': 9, 'final_fraction': 0.0}, 'power of the decay'),
    ({'schedule': 'calr', 'final_fraction': 0.0}, 'calr must be able to come down to'),
    (
      {'schedule': 'released_calr', 'decay_every': 9, 'final_fraction': -1.0},
      r'final_fraction is -1\.0',
    ),
    ({'name': 'tf1_adam'}, 'weight_decay=0'),
  ],
)
def test_cycles_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    OptimizerConfig(**changes).validate()


def test_tf1_adam_is_its_loop():
  """As TensorFlow 1 documents it, whose eps outweighs small gradients."""
  cfg = OptimizerConfig(
    'tf1_adam', 0.1, schedule='constant', warmup=1, weight_decay=0.0, eps=1e-2, b2=0.999, clip=1e9
  )
  tx = optimizer.make(cfg, 9)
  params = {'a': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
  state, rng = tx.init(params), np.random.default_rng(0)
  m = v = 0.0
  want = np.ones((2, 2))
  for t in range(1, 6):
    g = 1e-3 * rng.standard_normal((2, 2))
    grads = {'a': {'kernel': jnp.asarray(g, jnp.float32), 'bias': jnp.zeros(2)}}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    rate = 0.1 if t > 1 else float(optimizer.learning_rate(cfg, 0.1, 9)(0))
    want = want - rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-2)
  np.testing.assert_allclose(params['a']['kernel'], want, rtol=1e-5)
  assert np.abs(want - 1).max() > 1e-4


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_learning_rate_of_runs_shorter_than_the_warm_up(steps):
  rate = optimizer.learning_rate(OptimizerConfig(warmup=500), 0.5, steps)
  assert np.isfinite([rate(i) for i in range(steps + 1)]).all()


def params():
  rng = np.random.default_rng(0)
  block = lambda: {
    'kernel': jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
    'bias': jnp.ones(6),
  }
  return {'ffn': block(), 'encoder_gates': {'mlp': block()}}


def update(name, gradient, **changes):
  cfg = OptimizerConfig(name=name, warmup=1, schedule='constant', **changes)
  tx = optimizer.make(cfg, 100)
  tree = params()
  state = tx.init(tree)
  step = tiny_speech.jit(tx.update)
  for _ in range(2):  # the first step of the warm-up has rate 0
    updates, state = step(jax.tree.map(gradient, tree), state, tree)
  return updates


@pytest.mark.parametrize('name', ['muon', 'adamw'])
def test_kernels_of_the_model_alone_decay(name):
  updates = update(name, jnp.zeros_like, peak_lr=0.1, weight_decay=0.5)
  np.testing.assert_allclose(updates['ffn']['kernel'], -0.05 * params()['ffn']['kernel'], rtol=1e-5)
  assert not updates['ffn']['bias'].any()
  assert not any(u.any() for u in jax.tree.leaves(updates['encoder_gates']))


@pytest.mark.parametrize('name', ['muon', 'adamw'])
def test_gates_have_their_own_rate(name):
  updates = update(name, jnp.ones_like, peak_lr=1e-3, gate_lr=0.2, weight_decay=0.0)
  np.testing.assert_allclose(updates['ffn']['bias'], -1e-3, rtol=0.2)  # Muon looks ahead
  np.testing.assert_allclose(updates['encoder_gates']['mlp']['kernel'], -0.2, rtol=1e-3)


def test_muon_turns_matrices_one_by_one():
  rng = np.random.default_rng(1)
  single = jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)
  stacked = jnp.asarray(rng.normal(size=(3, 5, 5)), jnp.float32)
  tree = {'a': {'kernel': single}, 'scan': {'kernel': stacked}}
  cfg = OptimizerConfig(warmup=1, schedule='constant', peak_lr=1.0, weight_decay=0.0, clip=1e9)
  tx = optimizer.make(cfg, 100)
  state = tx.init(tree)
  step = tiny_speech.jit(tx.update)
  for _ in range(2):
    updates, state = step(tree, state, tree)
  for matrix in (updates['a']['kernel'], *updates['scan']['kernel']):
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.max() / values.min() < 3  # gradients: 10 and more
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(matrix))), 0.2, rtol=0.3)


@pytest.mark.parametrize('shape', [(6, 6), (4, 9), (9, 4), (2, 5, 3)])
def test_orthogonalizing_agrees_with_optax(shape):
  x = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
  like = optax.contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1)
  tx = optax.contrib.muon(
    -1.0,
    preconditioning='aol',
    ns_steps=3,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda _: like,
  )
  expected, _ = tx.update(x, tx.init(x), x)
  np.testing.assert_allclose(optimizer.orthogonalize(x, 'float32'), expected, rtol=1e-4, atol=1e-5)
  rough = optimizer.orthogonalize(x, 'bfloat16')
  np.testing.assert_allclose(rough, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_gradients_are_clipped_together():
  tx = optimizer.make(OptimizerConfig(clip=1.0), 10)
  tree = params()
  state = tx.init(tree)
  big = jax.tree.map(lambda x: 1e6 * x, tree)
  bigger = jax.tree.map(lambda x: 1e9 * x, tree)
  step = tiny_speech.jit(tx.update)
  a, b = (step(g, state, tree)[1] for g in (big, bigger))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(a))
  assert float(optax.tree.norm(tree)) > 1


def test_gate_parameters_are_known_by_their_module():
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params())]
  assert sorted(map(optimizer.is_gate, paths)) == [False, False, True, True]
