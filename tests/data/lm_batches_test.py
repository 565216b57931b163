"""Every example once, every target where it stands, few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.data import lm_batches
from gatedfm.data.lm_batches import Pair
from gatedfm.data.types import DataError

tokens = lambda least, most: st.lists(st.integers(1, 99), min_size=least, max_size=most).map(tuple)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Pair, tokens(1, 60), tokens(1, 9)), max_size=12), st.integers(1, 200))
def test_every_example_once(pairs, room):
  seen, shapes = [], set()
  for b in lm_batches.batches(pairs, room, 48):
    shapes.add((*b.tokens.shape, b.at.shape[1]))
    for row, number in enumerate(b.number):
      if number < 0:
        assert not b.weight[row].any()
        continue
      seen.append(number)
      pair = pairs[number]
      kept = b.tokens[row, b.mask[row]].tolist()
      whole = [*pair.context, *pair.target]
      assert kept == whole[-48:]  # the beginning goes where there is no room
      n = len(pair.target)
      assert b.weight[row].sum() == n
      assert (b.weight[row, :n] == 1).all()
      assert tuple(b.tokens[row, b.at[row, :n]]) == pair.target
  assert sorted(seen) == list(range(len(pairs)))
  assert all(b == max(1, room // n) and n in (16, 32, 48) for b, n, _ in shapes)


def test_long_examples_come_first():
  pairs = [Pair((1,) * n, (2,)) for n in (3, 100, 40)]
  assert [b.tokens.shape[1] for b in lm_batches.batches(pairs, 64, 512)] == [128, 48, 16]


@pytest.mark.parametrize('start', [(), (7,)])
def test_windows_predict_every_token_once(start):
  text = list(range(10, 33))
  pairs = lm_batches.windows(text, 6, start)
  targets = [t for pair in pairs for t in pair.target]
  assert targets == (text if start else text[1:])
  assert all(len(pair) <= 6 for pair in pairs)
  if start:
    assert all(pair.context == (7,) for pair in pairs)


def test_what_cannot_be():
  with pytest.raises(DataError, match='a token each'):
    Pair((), (1,))
  with pytest.raises(DataError, match='a target of 8 tokens; the model has positions for 8'):
    list(lm_batches.batches([Pair((1,), (2,) * 8)], 1, 8))
  with pytest.raises(DataError, match='the text is empty'):
    lm_batches.windows([], 8, (1,))
  with pytest.raises(DataError, match='windows of 1 tokens'):
    lm_batches.windows([1, 2], 1, (1,))
  np.testing.assert_equal(lm_batches.windows([5], 4, ()), [])
