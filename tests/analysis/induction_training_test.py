"""A small model that learns to look for what came before: induction heads form."""

import json

import numpy as np
import pytest

from gatedfm.analysis import induction_training
from gatedfm.analysis.induction_training import Training

SMALL = Training(
  vocab_size=32, d=64, heads=2, tokens=32, batch=64, steps=400, learning_rate=1e-2, log_every=400
)


def test_texts_repeat_their_blocks():
  tokens, repeated = induction_training.texts(SMALL, np.random.default_rng(0))
  assert tokens.shape == repeated.shape == (64, 32)
  blocks = np.argmax(repeated, 1) - 1
  assert set(blocks) == set(range(8, 17))
  for row, block in zip(tokens, blocks):
    np.testing.assert_array_equal(row[block:], row[:-block])


@pytest.fixture(scope='module')
def curve():
  return list(induction_training.train(SMALL))


def test_an_induction_head_forms(curve):
  first, last = curve
  assert (first['step'], last['step']) == (1, 400)
  assert np.max(first['prefix_matching']) < 0.15
  matching = np.array(last['prefix_matching'])
  # In the second layer alone: it builds on what the first tells it.
  assert matching[1].max() > 0.5
  assert matching[0].max() < 0.1
  head = (1, matching[1].argmax())
  assert np.array(last['copying'])[head] > 0.4 > 2 * np.array(first['copying'])[head]


def test_loss_falls_where_texts_repeat_alone(curve):
  first, last = curve
  chance = np.log(32)
  assert first['repeated_loss'] == pytest.approx(chance, abs=0.1)
  assert last['repeated_loss'] < 0.5 * chance
  assert last['new_loss'] > chance


def test_the_picture_has_a_line_for_each_head(curve):
  loss, heads = induction_training.picture(json.loads(json.dumps(curve))).axes
  assert len(loss.lines) == 2
  assert len(heads.lines) == 4
  np.testing.assert_array_equal(heads.lines[0].get_xdata(), [1, 400])
