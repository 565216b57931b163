"""Classifiers are blind to padding, compute what LSTMs and DANs do, and fold their factors."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gatedfm.models import tables, text_classifier
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.tables import TableConfig
from gatedfm.models.text_classifier import KINDS, TextClassifier, TextConfig

IDS = np.array([[3, 5, 2, 7], [4, 4, 0, 0], [0, 0, 0, 0]], np.int32)
LENGTHS = np.array([4, 2, 0])


def config(kind, **options):
  return TextConfig(kind, 20, 6, 3, units=5, hidden=(4, 3), **options)


def made(cfg):
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  params = nn.unbox(TextClassifier(cfg).init(keys, jnp.asarray(IDS), LENGTHS)['params'])
  return jax.tree.map(lambda x: x + 0.3, params)  # some units of every layer are on


def logits(cfg, params, ids=IDS, lengths=LENGTHS, **kwargs):
  return np.asarray(TextClassifier(cfg).apply({'params': params}, ids, lengths, **kwargs))


@pytest.mark.parametrize('kind', KINDS)
def test_padding_is_not_read(kind):
  cfg = config(kind)
  params = made(cfg)
  longer = np.pad(IDS, ((0, 0), (0, 5)), constant_values=9)
  np.testing.assert_allclose(logits(cfg, params, longer), logits(cfg, params), atol=1e-6)
  alone = logits(cfg, params, IDS[1:2, :2], LENGTHS[1:2])
  np.testing.assert_allclose(alone, logits(cfg, params)[1:2], atol=1e-6)
  compat = dataclasses.replace(cfg, reference_compat=True, dropout=0.0)
  params = made(compat)
  assert logits(compat, params).shape == (3, 4)
  read = logits(compat, params, longer, rngs={'dropout': jax.random.key(0)})
  assert np.abs(read - logits(compat, params)).max() > 0.01


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize('peepholes', [True, False])
def test_lstm_by_hand(peepholes):
  cfg = config('lstm', peepholes=peepholes)
  params = made(cfg)
  own = params['lstm']
  w = own.get('peepholes', np.zeros((3, 5)))
  assert ('peepholes' in own) == peepholes
  for row, length, got in zip(IDS, LENGTHS, logits(cfg, params)):
    cell, out, total = np.zeros(5), np.zeros(5), np.zeros(5)
    for word in row[:length]:
      x = params['table']['embedding'][word] @ own['kernel'] + own['bias']
      i, j, f, o = np.split(np.asarray(x + out @ own['recurrent_kernel']), 4)
      before = cell
      cell = sigmoid(f + 1 + w[1] * before) * before + sigmoid(i + w[0] * before) * np.tanh(j)
      out = sigmoid(o + w[2] * cell) * np.tanh(cell)
      total += out
    mean = total / max(length, 1)
    want = mean @ params['out']['kernel'] + params['out']['bias']
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('relu', [False, True])
def test_dan_by_hand(relu):
  """The released ReLU stands behind the average, where factors fold no more."""
  table = TableConfig('factorized', rank=2, project_relu=True) if relu else TableConfig()
  cfg = config('dan', table=table)
  params = made(cfg)
  own = params['table']
  words = own['embedding'] @ own['projection'] if relu else own['embedding']
  dense = lambda name, x: x @ params[name]['kernel'] + params[name]['bias']
  for row, length, got in zip(IDS, LENGTHS, logits(cfg, params)):
    x = words[row[:length]].sum(0) / max(length, 1)
    x = np.maximum(x, 0) if relu else x
    x = np.maximum(dense('hidden_1', np.maximum(dense('hidden_0', x), 0)), 0)
    np.testing.assert_allclose(got, dense('out', x), atol=1e-5)
  if relu:
    with pytest.raises(ConfigError, match='ReLU'):
      text_classifier.fold(cfg, params)


@pytest.mark.parametrize('kind', KINDS)
def test_factors_of_full_rank_change_nothing_and_fold(kind):
  cfg = config(kind)
  params = made(cfg)
  want = logits(cfg, params)
  for rank in (6, 2):
    small = dataclasses.replace(cfg, table=TableConfig('factorized', rank=rank))
    factors = tables.from_dense(small.table, np.asarray(params['table']['embedding']))
    held = params | {'table': factors['params']}
    got = logits(small, held)
    assert (np.abs(got - want).max() < 1e-5) == (rank == 6)
    folded_cfg, folded = text_classifier.fold(small, held)
    assert folded['table']['embedding'].shape == (20, rank)
    np.testing.assert_allclose(logits(folded_cfg, folded), got, atol=1e-5)
  with pytest.raises(ConfigError, match='folds'):
    text_classifier.fold(cfg, params)


def test_dropout_is_of_training_alone_but_in_the_released_code():
  cfg = config('lstm')
  params = made(cfg)
  rngs = lambda seed: {'rngs': {'dropout': jax.random.key(seed)}}
  one, two = (logits(cfg, params, deterministic=False, **rngs(seed)) for seed in (0, 1))
  assert np.abs(one - two).max() > 1e-3
  compat = dataclasses.replace(cfg, reference_compat=True)
  params = made(compat)
  one, two = (logits(compat, params, **rngs(seed)) for seed in (0, 1))
  assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kind': 'gru'}, 'lstm, dan'),
    ({'table': TableConfig('factorized', rank=2, project_relu=True)}, 'is of a dan'),
    ({'units': 0}, 'at least 1'),
    ({'hidden': ()}, 'at least 1'),
    ({'dropout': 1.0}, 'share'),
    ({'classes': -1}, 'not negative'),
    ({'table': TableConfig('factorized')}, 'table.compression'),
  ],
)
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    TextConfig(**options).validate()
