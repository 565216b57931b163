"""Repaired models come closer to the dense one, by the least squares that they say."""

import functools

import flax.linen as nn
import numpy as np
import pytest
import tiny_lm
import tiny_speech

from gatedfm.data import lm_batches
from gatedfm.gates import Gates
from gatedfm.models.lm import for_inference
from gatedfm.models.speech_config import ConfigError
from gatedfm.nn import layers
from gatedfm.pruning import repair
from gatedfm.pruning.calibration import ATTENTION, CHANNELS, FFN, HEADS


@pytest.fixture(scope='module', params=['opt', 'llama'])
def kind(request, fast_compilation):
  return request.param


def repaired(kind, gates, ridge=1e-6, room=64):
  batches = lm_batches.batches(tiny_lm.pairs(12), room, 32)
  args = tiny_lm.KINDS[kind], tiny_lm.params(kind), Gates(gates), batches
  lines = []
  return repair.least_squares(*args, ridge, lines.append), lines


@functools.cache
def streams(kind):
  @tiny_speech.jit
  def last(params, ids, gates):
    model, params = for_inference(tiny_lm.KINDS[kind], params)
    state = model.apply(
      {'params': params}, ids, None, gates, capture_intermediates=True, mutable=['intermediates']
    )[1]
    return state['intermediates']['decoder']['layers']['layers_2']['__call__'][0][0][0]

  return last


def stream(kind, params, gates, pair):
  """The last hidden states before the closing norm, of one example."""
  ids = np.zeros((1, 16), np.int32)  # one length: what follows is not read
  ids[0, : len(pair)] = pair.context + pair.target
  return np.asarray(streams(kind)(params, ids, gates))[: len(pair)]


def test_nothing_closed_changes_nothing(kind):
  new, _ = repaired(kind, {HEADS: np.ones((3, tiny_lm.KINDS[kind].heads))}, ridge=0.01)
  old = tiny_lm.params(kind)['decoder']['layers']
  for name, layer in new['decoder']['layers'].items():
    for module, projection in (('attention', 'out'), ('ffn', 'w_2')):
      kernel = layer[module][module][projection]['kernel']
      before = old[name][module][module][projection]['kernel']
      np.testing.assert_allclose(kernel, before, rtol=2e-2, atol=2e-3)


def test_the_stream_comes_closer(kind):
  cfg = tiny_lm.KINDS[kind]
  gates = {
    HEADS: np.ones((3, cfg.heads), np.float32),
    CHANNELS: np.ones((3, cfg.ffn), np.float32),
    FFN: np.array([1.0, 0.0, 1.0], np.float32),
    ATTENTION: np.array([1.0, 1.0, 0.0], np.float32),
  }
  gates[HEADS][0, 0] = gates[HEADS][1, 1] = 0
  gates[CHANNELS][2, :4] = 0
  new, lines = repaired(kind, gates)
  assert len(lines) == 3
  off = dict.fromkeys(('before', 'after'), 0.0)
  for pair in tiny_lm.pairs(12):
    dense = stream(kind, tiny_lm.params(kind), None, pair)
    off['before'] += np.sum((dense - stream(kind, tiny_lm.params(kind), Gates(gates), pair)) ** 2)
    off['after'] += np.sum((dense - stream(kind, new, Gates(gates), pair)) ** 2)
  assert off['after'] < 0.5 * off['before']
  # What the last line says is what the model does.
  total = sum(
    np.sum(stream(kind, tiny_lm.params(kind), None, pair) ** 2) for pair in tiny_lm.pairs(12)
  )
  said = float(lines[-1].split(' layers, ')[1].split()[0])
  assert said == pytest.approx((off['after'] / total) ** 0.5, abs=2e-3)


def test_the_first_projection_is_the_least_squares(kind):
  """Solved from all tokens at once, without moments."""
  cfg, ridge = tiny_lm.KINDS[kind], 0.05
  gates = {HEADS: np.ones((3, cfg.heads), np.float32)}
  gates[HEADS][0, 1] = 0
  new, _ = repaired(kind, gates, ridge)
  model, params = for_inference(cfg, tiny_lm.params(kind))
  read, wanted = [], []
  for pair in tiny_lm.pairs(12):
    ids = np.array([pair.context + pair.target])
    _, state = model.apply(
      {'params': params}, ids, capture_intermediates=True, mutable=['intermediates']
    )
    found = state['intermediates']['decoder']['layers']['layers_0']['attention']
    wanted.append(np.asarray(found['__call__'][0])[0] if '__call__' in found else None)
  kernel = np.asarray(
    params['decoder']['layers']['layers_0']['attention']['attention']['out']['kernel']
  )
  bias = params['decoder']['layers']['layers_0']['attention']['attention']['out'].get('bias', 0.0)
  for pair in tiny_lm.pairs(12):
    ids = np.array([pair.context + pair.target])
    read.append(_heads(model, params, ids))
  x, y = np.concatenate(read), np.concatenate(wanted) - bias
  x[:, cfg.width : 2 * cfg.width] = 0
  kept = np.abs(x).sum(0) > 0
  weight = ridge * np.square(x[:, kept]).sum() / kept.sum()
  stacked = np.concatenate([x[:, kept], np.sqrt(weight) * np.eye(kept.sum())])
  right = np.concatenate([y, np.sqrt(weight) * kernel[kept]])
  want = np.linalg.lstsq(stacked, right, rcond=None)[0]
  got = new['decoder']['layers']['layers_0']['attention']['attention']['out']['kernel']
  np.testing.assert_allclose(np.asarray(got)[kept], want, rtol=1e-2, atol=1e-3)


def _heads(model, params, ids):
  """What the first layer's output projection reads, `[L, F]`."""
  read = []

  def listen(call, args, kwargs, context):
    if isinstance(context.module, layers.Linear) and context.module.name == 'out':
      read.append(np.asarray(args[0])[0])
    return call(*args, **kwargs)

  with nn.intercept_methods(listen):
    model.apply({'params': params}, ids)
  return read[0]


def test_rows_of_padding_count_for_nothing(kind):
  """Five examples at a time of twelve: the last batch is not full."""
  gates = {HEADS: np.ones((3, tiny_lm.KINDS[kind].heads))}
  gates[HEADS][1, 0] = 0
  whole, partial = repaired(kind, gates, 0.05, 16), repaired(kind, gates, 0.05, 16 * 5)
  assert whole[1] == partial[1]
  for name in ('layers_0', 'layers_2'):
    a, b = (
      x[0]['decoder']['layers'][name]['ffn']['ffn']['w_2']['kernel'] for x in (whole, partial)
    )
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_norms_after_the_sums():
  with pytest.raises(ConfigError, match='norms before the modules'):
    repaired('opt_350m', {})
