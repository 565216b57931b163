"""Pieces come closer to a table the more of them there are, and are exact where they can be."""

import numpy as np
import pytest

from gatedfm.factorization import product_quantization


def rebuilt(codes, pieces):
  return np.concatenate([pieces[m][codes[:, m]] for m in range(codes.shape[1])], 1)


def test_few_rows_are_held_exactly():
  table = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
  codes, pieces = product_quantization.fit(table, 3, 40)
  assert codes.shape == (40, 3)
  assert pieces.shape == (3, 40, 2)
  assert codes.dtype == np.uint8
  np.testing.assert_array_equal(rebuilt(codes, pieces), table)
  few = np.repeat(table[:4], 10, 0)  # fewer different ones than pieces
  np.testing.assert_array_equal(rebuilt(*product_quantization.fit(few, 2, 8)), few)


def test_more_pieces_come_closer(monkeypatch):
  table = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
  off = []
  for pieces in (2, 16, 128):
    codes, found = product_quantization.fit(table, 4, pieces)
    off.append(np.square(rebuilt(codes, found) - table).mean())
    # Each part is told by its nearest piece.
    part = table.reshape(3000, 4, 2)[:50, 1]
    nearest = np.square(part[:, None] - found[1][None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(codes[:50, 1], nearest)
  assert off[0] > 2 * off[1] > 4 * off[2]
  monkeypatch.setattr(product_quantization, '_BLOCK', 700)
  again, same = product_quantization.fit(table, 4, 128)
  np.testing.assert_array_equal(again, codes)
  np.testing.assert_array_equal(same, found)


def test_refusals():
  table = np.ones((5, 6), np.float32)
  with pytest.raises(ValueError, match=r'4 parts do not divide 6 features: .* \[1, 2, 3'):
    product_quantization.fit(table, 4, 2)
  with pytest.raises(ValueError, match='pieces is 9; it is between 1 and 5'):
    product_quantization.fit(table, 2, 9)
  with pytest.raises(ValueError, match='not finite'):
    product_quantization.fit(np.full((5, 6), np.inf, np.float32), 2, 2)


def test_every_row_is_looked_at(monkeypatch):
  monkeypatch.setattr(product_quantization, '_SAMPLE', 8)
  table = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
  for row in range(0, 300, 60):
    broken = table.copy()
    broken[row, 1] = np.nan
    with pytest.raises(ValueError, match='numbers that are not finite'):
      product_quantization.fit(broken, 2, 4)
