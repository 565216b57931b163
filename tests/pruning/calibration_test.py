"""What calibration collects, against one example at a time and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm
import tiny_speech

from gatedfm.data import lm_batches
from gatedfm.gates import Gates
from gatedfm.models import lm_losses
from gatedfm.models.lm import for_inference
from gatedfm.pruning import calibration
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS, LAYER


def collect(kind, rows, needs=('gradients', 'activations')):
  batches = lm_batches.batches(tiny_lm.pairs(), 16 * rows, 32)
  return calibration.collect(tiny_lm.KINDS[kind], tiny_lm.params(kind), batches, needs)


@pytest.fixture(scope='module', params=tiny_lm.KINDS)
def kind(request, fast_compilation):
  return request.param


ROOM = 16


@functools.cache
def losses(kind):
  """Of one example, the mean over its targets, by plain log-softmax; and its gradient by gates."""
  model, params = for_inference(tiny_lm.KINDS[kind], tiny_lm.params(kind))

  def loss(gates, ids, mask, target):
    logits = model.apply({'params': params}, ids[None], mask[None], Gates(gates))[0]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], 1)[:, 0]
    return -jnp.sum(picked * target[1:]) / jnp.sum(target)

  return tiny_speech.jit(loss), tiny_speech.jit(jax.grad(loss))


def arrays(pair):
  """Tokens, which are there, which are targets; padded to one length."""
  ids, at = np.zeros(ROOM, np.int32), np.arange(ROOM)
  ids[: len(pair)] = pair.context + pair.target
  return ids, at < len(pair), (at >= len(pair.context)) & (at < len(pair))


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
        gates = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        gates[site][at] += sign * eps
        ends.append(float(losses(kind)[0](gates, *arrays(pair))))
      total += ((ends[0] - ends[1]) / (2 * eps)) ** 2
    np.testing.assert_allclose(stats.by_example[site][at], total, rtol=0.05, atol=1e-5)


def test_tokens_count_one_by_one(kind):
  """`|dL/dg[t]|` summed over tokens: no less than the derivative by a gate of all tokens."""
  stats = collect(kind, 1, ['gradients'])
  assert not stats.square
  cfg, pairs = tiny_lm.KINDS[kind], tiny_lm.pairs()
  gates = {HEADS: np.ones((3, 1, ROOM, cfg.heads), np.float32)}
  slopes = [losses(kind)[1](gates, *arrays(pair))[HEADS][:, 0] for pair in pairs]
  want = sum(np.abs(s).sum(1) for s in slopes)
  np.testing.assert_allclose(stats.by_token[HEADS], want, rtol=1e-3, atol=1e-6)
  # The last layer's heads matter where something is predicted alone.
  for pair, slope in zip(pairs, slopes):
    used = np.flatnonzero(np.abs(slope[-1]).sum(1))
    np.testing.assert_array_equal(used, np.arange(len(pair) - len(pair.target), len(pair)) - 1)


def test_losses_are_log_likelihoods(kind):
  model, params = for_inference(tiny_lm.KINDS[kind], tiny_lm.params(kind))
  pairs, compute = tiny_lm.pairs(), tiny_speech.jit(functools.partial(lm_losses.losses, model))
  for b in lm_batches.batches(pairs, 48, 32):
    got = compute(params, b.tokens, b.mask, b.at)
    for row, number in enumerate(b.number):
      if number >= 0:
        mean = float((got[row] * b.weight[row]).sum() / b.weight[row].sum())
        assert mean == pytest.approx(float(losses(kind)[0]({}, *arrays(pairs[number]))), rel=1e-4)


def test_removals_are_the_loss_without_each_module(kind):
  cfg, stats = tiny_lm.KINDS[kind], collect(kind, 2, ['removals'])
  assert not stats.by_token
  loss = lambda gates: sum(float(losses(kind)[0](gates, *arrays(p))) for p in tiny_lm.pairs())
  for site, names in ((ATTENTION, [ATTENTION]), (FFN, [FFN]), (LAYER, [ATTENTION, FFN])):
    for i in range(cfg.layers):
      without = {name: (np.arange(cfg.layers) != i).astype(np.float32) for name in names}
      np.testing.assert_allclose(
        stats.removal[site][i], loss(without) - loss({}), rtol=1e-3, atol=1e-4
      )


def test_scores_of_a_pruned_model(kind):
  """What is closed counts nothing; the rest is scored without it."""
  cfg = tiny_lm.KINDS[kind]
  heads = np.ones((3, cfg.heads), np.float32)
  heads[1, 0] = heads[2, 1] = 0
  base = {HEADS: heads, FFN: np.array([1.0, 0.0, 1.0], np.float32)}
  batches = list(lm_batches.batches(tiny_lm.pairs(), 32, 32))
  args = cfg, tiny_lm.params(kind), batches
  stats = calibration.collect(*args, calibration.NEEDS, gates=Gates(base))
  slopes = [losses(kind)[1](base, *arrays(pair)) for pair in tiny_lm.pairs()]
  want = sum(np.square(s[HEADS]) for s in slopes) * heads
  np.testing.assert_allclose(stats.by_example[HEADS], want, rtol=2e-3, atol=1e-6)
  assert stats.by_token[FFN][1] == 0
  assert stats.removal[FFN][1] == pytest.approx(0, abs=1e-5)
  dense = collect(kind, 2).square[CHANNELS]
  np.testing.assert_allclose(stats.square[CHANNELS][0], dense[0], rtol=1e-4)
  assert not np.allclose(stats.square[CHANNELS][2], dense[2], rtol=1e-2)


def test_no_texts():
  with pytest.raises(ValueError, match='no calibration texts'):
    calibration.collect(tiny_lm.KINDS['opt'], tiny_lm.params('opt'), [])
