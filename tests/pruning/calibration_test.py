"""What calibration collects, against one example at a time and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm

from gatedfm.data import lm_batches
from gatedfm.gates import Gates
from gatedfm.models.lm import for_inference
from gatedfm.pruning import calibration
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS


def collect(kind, rows, needs=calibration.NEEDS):
  batches = lm_batches.batches(tiny_lm.pairs(), rows, 32)
  return calibration.collect(tiny_lm.KINDS[kind], tiny_lm.params(kind), batches, needs)


@pytest.fixture(scope='module', params=tiny_lm.KINDS)
def kind(request, fast_compilation):
  return request.param


def loss(kind, pair, gates):
  """Mean over the targets of one example, by plain log-softmax."""
  model, params = for_inference(tiny_lm.KINDS[kind], tiny_lm.params(kind))
  ids = np.array([pair.context + pair.target])
  logits = model.apply({'params': params}, ids, None, gates)[0]
  log = jax.nn.log_softmax(logits)
  at = np.arange(len(pair.context), ids.shape[1])
  return -jnp.mean(log[at - 1, ids[0, at]])


def test_batching_and_padding_change_nothing(kind):
  alone, together = collect(kind, 1), collect(kind, 4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), alone, together)
  pairs = tiny_lm.pairs()
  assert alone.examples == len(pairs)
  assert alone.tokens == sum(len(p) - 1 for p in pairs)
  assert alone.targets == sum(len(p.target) for p in pairs)


def test_gradients_are_those_of_each_gate(kind):
  """One module or unit scaled at a time."""
  stats, cfg = collect(kind, 2), tiny_lm.KINDS[kind]
  shapes = {ATTENTION: (3,), FFN: (3,), HEADS: (3, cfg.heads), CHANNELS: (3, cfg.ffn)}
  eps = 1e-2
  for site, at in ((ATTENTION, (1,)), (FFN, (0,)), (HEADS, (2, 1)), (CHANNELS, (1, 3))):
    total = 0.0
    for pair in tiny_lm.pairs():
      ends = []
      for sign in (1, -1):
        gate = np.ones(shapes[site], np.float32)
        gate[at] += sign * eps
        ends.append(float(loss(kind, pair, Gates({site: jnp.asarray(gate)}))))
      total += ((ends[0] - ends[1]) / (2 * eps)) ** 2
    np.testing.assert_allclose(stats.by_example[site][at], total, rtol=0.05, atol=1e-5)


def test_tokens_count_one_by_one(kind):
  """`|dL/dg[t]|` summed over tokens: no less than the derivative by a gate of all tokens."""
  stats = collect(kind, 1, ['gradients'])
  assert not stats.square
  cfg, pairs = tiny_lm.KINDS[kind], tiny_lm.pairs()
  want = np.zeros((3, cfg.heads))
  for pair in pairs:
    slope = jax.grad(lambda g, pair=pair: loss(kind, pair, Gates({HEADS: g})))
    want += np.abs(slope(jnp.ones((3, 1, len(pair), cfg.heads)))[:, 0]).sum(1)
  np.testing.assert_allclose(stats.by_token[HEADS], want, rtol=1e-3, atol=1e-6)
  # The last layer's heads matter where something is predicted alone.
  pair = pairs[0]
  slope = jax.grad(lambda g: loss(kind, pair, Gates({HEADS: g})))
  last = np.asarray(slope(jnp.ones((3, 1, len(pair), cfg.heads)))[-1, 0])
  used = np.flatnonzero(np.abs(last).sum(1))
  np.testing.assert_array_equal(used, np.arange(len(pair) - len(pair.target), len(pair)) - 1)


def test_losses_are_log_likelihoods(kind):
  model, params = for_inference(tiny_lm.KINDS[kind], tiny_lm.params(kind))
  pairs = tiny_lm.pairs()
  for b in lm_batches.batches(pairs, 3, 32):
    got = calibration.losses(model, params, b.tokens, b.mask, b.at)
    for row, number in enumerate(b.number):
      if number >= 0:
        mean = float((got[row] * b.weight[row]).sum() / b.weight[row].sum())
        assert mean == pytest.approx(float(loss(kind, pairs[number], None)), rel=1e-4)


def test_no_texts():
  with pytest.raises(ValueError, match='no calibration texts'):
    calibration.collect(tiny_lm.KINDS['opt'], tiny_lm.params('opt'), [])
