"""Scorers against their definitions, and how scores of tasks are joined."""

import jax
import numpy as np
import pytest
import tiny_lm

from gatedfm.data import lm_batches
from gatedfm.models.lm import for_inference
from gatedfm.models.speech_config import ConfigError
from gatedfm.pruning import calibration, scorers
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS, LAYER
from gatedfm.pruning.scorers import Calibrated


@pytest.fixture(scope='module', params=tiny_lm.KINDS)
def calibrated(request, fast_compilation):
  cfg, params = tiny_lm.KINDS[request.param], tiny_lm.params(request.param)
  batches = lm_batches.batches(tiny_lm.pairs(), 32, 32)
  return Calibrated(cfg, params, calibration.collect(cfg, params, batches, calibration.NEEDS))


def read_by(x, projection):
  """What those projections of all layers read of each example, unpadded: `[N, L, F]`."""
  model, params = for_inference(x.cfg, x.params)
  out = []
  for pair in tiny_lm.pairs():
    read = []

    def listen(call, args, kwargs, context, read=read):
      if context.module.name == projection:
        read.append(np.float64(args[0][0]))
      return call(*args, **kwargs)

    with calibration.nn.intercept_methods(listen):
      ids = np.array([pair.context + pair.target])
      model.apply({'params': params}, ids, method='hidden')
    out.append(np.stack(read))
  return out


@pytest.mark.parametrize('name', scorers.SCORERS)
def test_scores_have_a_number_for_each_gate(calibrated, name):
  scores = scorers.get(name).score(calibrated)
  cfg = calibrated.cfg
  shapes = {ATTENTION: (3,), FFN: (3,), HEADS: (3, cfg.heads), CHANNELS: (3, cfg.ffn)}
  shapes |= {LAYER: (3,)}
  if name in ('influence', 'oracle'):
    assert set(scores) == {ATTENTION, FFN, LAYER}
  else:
    assert set(scores) - {LAYER} == set(shapes) - {LAYER}
    assert (LAYER in scores) == (name in ('taylor', 'taylor_layer_norm', 'fisher', 'random'))
  for site, score in scores.items():
    assert score.shape == shapes[site]
    assert np.isfinite(score).all()
    assert (score >= 0).all() or name == 'oracle'
    assert len(np.unique(score)) > 1


def test_taylor_weighs_tokens(calibrated):
  stats = calibrated.stats
  score = scorers.taylor(calibrated)[HEADS]
  np.testing.assert_allclose(score[:-1], stats.by_token[HEADS][:-1] / stats.tokens)
  np.testing.assert_allclose(score[-1], stats.by_token[HEADS][-1] / stats.targets)
  normed = scorers.taylor(calibrated, layer_norm=True)[HEADS]
  np.testing.assert_allclose(np.linalg.norm(normed, axis=1), 1)


def test_magnitude_and_wanda_of_the_output_projection(calibrated):
  layer = calibrated.params['decoder']['layers']['layers_1']
  kernel = np.asarray(layer['attention']['attention']['out']['kernel'])
  k = calibrated.cfg.width
  head = kernel[2 * k : 3 * k]
  assert scorers.magnitude(calibrated)[HEADS][1, 2] == pytest.approx(np.linalg.norm(head))
  square = calibrated.stats.square[HEADS][1, 2 * k : 3 * k]
  want = np.sum(np.abs(head).sum(1) * np.sqrt(square))
  assert scorers.wanda(calibrated)[HEADS][1, 2] == pytest.approx(want)
  channels = scorers.wanda(calibrated)[CHANNELS]
  np.testing.assert_allclose(scorers.wanda(calibrated)[FFN], channels.sum(1))


def test_activations_are_of_what_projections_read(calibrated):
  cfg = calibrated.cfg
  mean_square, square = {}, {}
  for site, projection in ((HEADS, 'out'), (CHANNELS, 'w_2')):
    read = read_by(calibrated, projection)
    mean_square[site] = sum(np.abs(x_NxLxF).mean(1) ** 2 for x_NxLxF in read)
    square[site] = sum((x_NxLxF**2).sum(1) for x_NxLxF in read)
  scores = scorers.activation(calibrated)
  np.testing.assert_allclose(scores[CHANNELS], np.sqrt(mean_square[CHANNELS]), rtol=1e-4)
  heads = mean_square[HEADS].reshape(3, cfg.heads, cfg.width).sum(-1)
  np.testing.assert_allclose(scores[HEADS], np.sqrt(heads), rtol=1e-4)
  np.testing.assert_allclose(scores[ATTENTION], np.sqrt(heads.sum(1)), rtol=1e-4)
  own = calibrated.params['decoder']['layers']
  weight = np.stack(
    [np.abs(own[f'layers_{i}']['ffn']['ffn']['w_2']['kernel']).sum(1) for i in range(3)]
  )
  wanda = scorers.wanda(calibrated)
  np.testing.assert_allclose(wanda[CHANNELS], weight * np.sqrt(square[CHANNELS]), rtol=1e-4)


def test_influence_is_of_what_a_module_adds(calibrated):
  total = np.zeros(3)
  for pair in tiny_lm.pairs():
    model, params = for_inference(calibrated.cfg, calibrated.params)
    ids = np.array([pair.context + pair.target])
    seen = []

    def listen(call, args, kwargs, context, seen=seen):
      out = call(*args, **kwargs)
      if type(context.module).__name__ == 'LmFfn':
        seen.append((args[0], args[0] + out))
      return out

    with calibration.nn.intercept_methods(listen):
      model.apply({'params': params}, ids, method='hidden')
    for i, (a, b) in enumerate(seen):
      a, b = np.float64(a[0]), np.float64(b[0])
      cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
      total[i] += (1 - cosine).sum()
  score = scorers.influence(calibrated)[FFN]
  tokens = sum(len(pair) for pair in tiny_lm.pairs())
  np.testing.assert_allclose(score, total / tokens, rtol=1e-3)


def test_random_repeats_by_seed(calibrated):
  one = scorers.random(calibrated)
  jax.tree.map(np.testing.assert_array_equal, one, scorers.random(calibrated))
  other = scorers.random(Calibrated(calibrated.cfg, calibrated.params, seed=1))
  assert (one[HEADS] != other[HEADS]).all()


def test_unknown_scorers_are_named():
  with pytest.raises(ConfigError, match='taylor, taylor_layer_norm'):
    scorers.get('tailor')


def test_aggregation():
  small, large = np.array([[1.0, 2, 3, 4]]), np.array([[4000.0, 3000, 1000, 2000]])
  a, b = {HEADS: small}, {HEADS: large}
  mean = scorers.aggregate([a, b])[HEADS]
  np.testing.assert_array_equal(mean, (small + large) / 2)
  rank = scorers.aggregate([a, b], 'rank')[HEADS]
  np.testing.assert_allclose(rank * 4, [[1.5, 1.5, 1, 2]])
  standard = scorers.aggregate([a, b], 'zscore')[HEADS]
  z = lambda v: (v - v.mean()) / v.std()
  np.testing.assert_allclose(standard, (z(small) + z(large)) / 2)
  with pytest.raises(ConfigError, match='aggregation'):
    scorers.aggregate([a], 'sum')
  with pytest.raises(ValueError, match='same sites'):
    scorers.aggregate([a, {FFN: np.ones(2)}])
