"""Running under a gate; sampling and thresholding; what a predictor's input depends on."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import build, normal
from tiny_speech import jit
from tiny_speech import key as random_key

from gatedfm.nn import gating, layers

KINDS = ('speech', 'language', 'task')
sample = jit(gating.straight_through_gumbel)
SUBSETS = [c for n in range(4) for c in itertools.combinations(KINDS, n)]


class Gated(nn.Module):
  """A linear layer under a gate, added to its input."""

  execution: str

  @nn.compact
  def __call__(self, x, gate):
    return gating.add_gated(self.execution, gate, layers.Linear(5, ('embed', 'mlp')), x, x)


@pytest.mark.parametrize('execution', gating.EXECUTIONS)
def test_gated(execution):
  x = normal(2, 3, 5)
  run, p = build(Gated(execution), x, None)
  y = run(p, x, None)
  np.testing.assert_array_equal(run(p, x, jnp.float32(1)), y)
  np.testing.assert_array_equal(run(p, x, jnp.ones(1)), y)
  np.testing.assert_array_equal(run(p, x, jnp.float32(0)), x)
  hlo = run.lower(p, x, jnp.float32(1)).as_text()
  assert hlo.count('stablehlo.case') == (execution != 'mask')


def test_fractions_scale_under_mask_and_are_open_under_skip():
  x = normal(2, 3, 5)
  (mask, p), (skip, _) = (build(Gated(e), x, None) for e in ('mask', 'skip'))
  y = mask(p, x, None)
  np.testing.assert_allclose(mask(p, x, jnp.float32(0.25)), x + (y - x) / 4, rtol=1e-5)
  np.testing.assert_array_equal(skip(p, x, jnp.float32(0.25)), y)


@pytest.mark.parametrize('execution', ['mask', 'bucketed'])
@pytest.mark.parametrize('length', [1, 3])
def test_each_example_has_its_gate(execution, length):
  x = normal(6, length, 5)
  run, p = build(Gated(execution), x, None)
  y = run(p, x, None)
  for gates in ([0] * 6, [0, 0, 0, 0.25, 0, 0], [1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0.5], [1] * 6):
    want = x + (y - x) * np.array(gates)[:, None, None]
    np.testing.assert_allclose(run(p, x, jnp.array(gates, float)), want, rtol=1e-5, atol=1e-6)


def test_bucketed_runs_the_open_examples_alone():
  x = normal(6, 3, 5)
  run, p = build(Gated('bucketed'), x, None)
  hlo = run.lower(p, x, jnp.ones(6)).as_text()
  assert hlo.count('stablehlo.case') == 1
  # Six examples in four steps: 2, 3, 5 or 6 of them.
  for rows in range(1, 7):
    product = f'(tensor<{rows}x3x5xf32>, tensor<5x5xf32>) -> tensor<{rows}x3x5xf32>'
    assert hlo.count(product) == (rows in (2, 3, 5, 6)), rows


def test_bucketed_looks_at_the_whole_batch_where_an_example_has_one_row():
  x = normal(6, 1, 5)
  run, p = build(Gated('bucketed'), x, None)
  hlo = run.lower(p, x, jnp.ones(6)).as_text()
  assert hlo.count('stablehlo.case') == 1
  assert hlo.count('dot_general') == 1


def test_skip_refuses_gates_that_differ_by_example():
  x = normal(2, 3, 5)
  run, p = build(Gated('skip'), x, None)
  with pytest.raises(ValueError, match=r'skip needs one gate .* shape \(2,\)'):
    run(p, x, jnp.ones(2))


def test_bucketed_refuses_vmap_over_gates():
  x = normal(2, 3, 3, 5)
  _, p = build(Gated('bucketed'), x[0], None)
  call = lambda x, gate: Gated('bucketed').apply({'params': p}, x, gate)
  with pytest.raises(ValueError, match='vmap over gates would run'):
    jax.vmap(call)(x, jnp.ones((2, 3)))


def test_skip_refuses_vmap_over_gates_and_keeps_its_branch_under_others():
  x = normal(2, 3, 5)
  _, p = build(Gated('skip'), x, None)
  call = lambda x, gate: Gated('skip').apply({'params': p}, x, gate)
  with pytest.raises(ValueError, match='vmap over gates would run both branches.*lax.map'):
    jax.vmap(call)(x, jnp.ones(2))
  shared = jit(jax.vmap(call, (0, None)))
  np.testing.assert_array_equal(shared(x, jnp.float32(0)), x)
  assert shared.lower(x, jnp.float32(0)).as_text().count('stablehlo.case') == 1
  each = jax.lax.map(lambda row: call(*row), (x, jnp.array([0.0, 1.0])))
  np.testing.assert_allclose(each[0], x[0])
  np.testing.assert_allclose(each[1], call(x, jnp.float32(1))[1], rtol=1e-5)


def test_unknown_execution_is_named():
  with pytest.raises(ValueError, match='compact'):
    build(Gated('compact'), normal(2, 3, 5), None)


def test_a_closed_mask_has_no_gradient():
  x = normal(2, 3, 5)
  _, p = build(Gated('mask'), x, None)
  loss = lambda p, gate: jnp.sum(Gated('mask').apply({'params': p}, x, gate) ** 2)
  grad = jit(jax.grad(loss))
  assert not any(np.any(g) for g in jax.tree.leaves(grad(p, jnp.float32(0))))
  assert all(np.any(g) for g in jax.tree.leaves(grad(p, jnp.float32(1))))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([0.1, 1.0, 5.0]))
def test_straight_through_is_hard_going_forward(seed, temperature):
  key = random_key(seed)
  logits = normal(64, 2, seed=seed)
  assert set(np.unique(sample(logits, temperature, key))) == {0.0, 1.0}


def test_straight_through_has_the_soft_gradient():
  key, temperature = random_key(1), 0.7
  logits, weight = normal(20, 2), normal(20, seed=1)
  noise = jax.random.gumbel(key, logits.shape, logits.dtype)
  soft = lambda z: jnp.sum(weight * jax.nn.softmax((z + noise) / temperature)[:, 1])
  hard = lambda z: jnp.sum(weight * gating.straight_through_gumbel(z, temperature, key))
  want = jit(jax.grad(soft))(logits)
  assert np.abs(want).min() > 0
  np.testing.assert_allclose(jit(jax.grad(hard))(logits), want, rtol=1e-5, atol=1e-7)


def test_samples_follow_the_logits():
  logits = jnp.broadcast_to(jnp.array([0.0, 1.0]), (20_000, 2))
  for temperature in (0.3, 3.0):
    kept = np.mean(sample(logits, temperature, random_key(0)))
    assert kept == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


CONTEXT = gating.Context(jnp.zeros(1, int), jnp.zeros(1, int))


def test_threshold_opens_above_it():
  probability = np.array([0.0001, 0.3, 0.49, 0.5, 0.51, 0.7, 0.9999])
  logits = jnp.asarray(np.stack([np.zeros(7), np.log(probability / (1 - probability))], -1))
  decide = jit(lambda threshold: gating.decide(logits, threshold, CONTEXT, None))
  assert decide(0.5).tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert decide(0.2).tolist() == [0, 1, 1, 1, 1, 1, 1]
  assert decide(0.8).tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_with_a_key_gates_are_sampled_unless_the_search_is_over():
  logits, key = normal(50, 2), random_key(3)
  decide = jit(
    lambda search: gating.decide(logits, 0.6, CONTEXT.replace(search=search, temperature=2.0), key)
  )
  np.testing.assert_array_equal(decide(True), sample(logits, 2.0, key))
  np.testing.assert_array_equal(decide(False), jax.nn.softmax(logits)[:, 1] > 0.6)
  assert np.any(decide(True) != decide(False))


@pytest.mark.parametrize('combine', ['concat', 'add'])
@pytest.mark.parametrize('context', SUBSETS, ids='+'.join)
def test_embedding_reads_what_it_claims_and_nothing_else(context, combine):
  speech, width = normal(2, 6), 3
  module = gating.ContextEmbedding(context, combine, 5, 4, width)
  ids = gating.Context(jnp.array([1, 2]), jnp.array([0, 3]))
  run, params = build(module, speech, ids)
  before = run(params, speech, ids)
  if not context:
    assert before.shape == (2, 1)
  elif combine == 'add':
    assert before.shape == (2, 6)
  else:
    assert before.shape == (2, sum(6 if c == 'speech' else width for c in context))
  changed = {
    'speech': (speech.at[0].add(normal(6, seed=5)), ids),
    'language': (speech, ids.replace(language=jnp.array([4, 2]))),
    'task': (speech, ids.replace(task=jnp.array([1, 3]))),
  }
  for kind, arguments in changed.items():
    after = run(params, *arguments)
    assert np.any(after[0] != before[0]) == (kind in context), kind
    np.testing.assert_array_equal(after[1], before[1])


def test_predictor_starts_open():
  module = gating.GateMlp(7, (4, 3), open_bias=2.0)
  x = normal(2, 6)
  logits = jit(lambda: module.apply(module.init(random_key(0), x), x))()
  assert logits.shape == (2, 7, 2)
  np.testing.assert_allclose(logits[..., 1] - logits[..., 0], 2.0, atol=0.3)
  assert (gating.decide(logits, 0.5, 1.0, None) == 1).all()


def test_masked_mean():
  x = normal(3, 5, 2)
  mask = np.arange(5) < np.array([[5], [2], [0]])
  mean = jit(gating.masked_mean)
  got = mean(x, mask)
  np.testing.assert_allclose(got[0], x[0].mean(0), rtol=1e-5)
  np.testing.assert_allclose(got[1], x[1, :2].mean(0), rtol=1e-5)
  np.testing.assert_array_equal(got[2], [0, 0])
  assert mean(x.astype(jnp.bfloat16), mask).dtype == jnp.float32
