"""Factors are those of the truncated SVD; weights, ranks and blocks do what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedfm.factorization import svd


def table(rows=60, columns=9, seed=0, decay=0.7):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(rows, columns)) * decay ** np.arange(columns)).astype(np.float64)


def truncated(matrix, rank):
  u, s, v = np.linalg.svd(matrix, full_matrices=False)
  return u[:, :rank] * s[:rank] @ v[:rank]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from(svd.SPLITS))
def test_it_is_the_truncated_svd(seed, rank, split):
  matrix = table(seed=seed)
  found = svd.factorize(matrix, rank, split=split, dtype=np.float64)
  np.testing.assert_allclose(found.product(), truncated(matrix, rank), atol=1e-6)
  np.testing.assert_allclose(found.singular, np.linalg.svd(matrix)[1], rtol=1e-6, atol=1e-9)
  assert found.first.shape == (60, rank)
  if split == 'reference':
    np.testing.assert_allclose(found.first.T @ found.first, np.eye(rank), atol=1e-9)
  else:
    of_first, of_second = np.linalg.norm(found.first, axis=0), np.linalg.norm(found.second, axis=1)
    np.testing.assert_allclose(of_first, of_second, rtol=1e-9)


def test_blocks_change_nothing(monkeypatch, tmp_path):
  np.save(tmp_path / 'table.npy', table(1000, 12).astype(np.float32))
  mapped = np.load(tmp_path / 'table.npy', mmap_mode='r')
  weights = np.random.default_rng(1).random(1000)
  whole = svd.factorize(mapped, 5, row_weights=weights)
  monkeypatch.setattr(svd, 'BLOCK', 77)
  parts = svd.factorize(mapped, 5, row_weights=weights)
  np.testing.assert_allclose(parts.product(), whole.product(), atol=1e-5)


def test_weighted_rows_come_out_closer():
  matrix, weights = table(decay=1.0), np.random.default_rng(1).random(60) ** 4
  error = lambda found: (weights[:, None] * np.square(found.product() - matrix)).sum()
  plain, weighted = svd.factorize(matrix, 3), svd.factorize(matrix, 3, row_weights=weights)
  assert error(weighted) < 0.95 * error(plain)
  # By brute force: the SVD of the weighted table, undone.
  root = np.sqrt(weights)[:, None]
  best = truncated(root * matrix, 3) / root
  np.testing.assert_allclose(weighted.product(), best, atol=1e-5)
  # Rows that count for nothing are told as well as the basis can.
  weights[:5] = 0
  found = svd.factorize(matrix, 3, row_weights=weights)
  basis = np.linalg.qr(found.second.T)[0]
  np.testing.assert_allclose(found.product()[:5], matrix[:5] @ basis @ basis.T, atol=1e-5)


@pytest.mark.parametrize(('compression', 'rank'), [(0.1, 264), (0.3, 205), (0.5, 147), (0.9, 29)])
def test_ranks_of_the_published_sizes(compression, rank):
  """Of 15,000 x 300."""
  assert svd.rank_of(15_000, 300, compression) == rank
  assert rank * 15_300 <= (1 - compression) * 15_000 * 300 < (rank + 1) * 15_300


def test_energy():
  matrix = table()
  squares = np.square(np.linalg.svd(matrix)[1])
  for energy in (0.3, 0.9, 0.999, 1.0):
    found = svd.factorize(matrix, energy=energy)
    assert found.energy >= energy - 1e-9
    if found.rank > 1:
      assert squares[: found.rank - 1].sum() < energy * squares.sum()
  found = svd.factorize(matrix, compression=0.5)
  assert found.rank == svd.rank_of(60, 9, 0.5) == 3
  assert found.compression == pytest.approx(1 - 3 * 69 / 540)


def test_a_table_of_less_than_its_rank():
  """Of a table of rank 2 the third direction is empty."""
  flat = table()[:, :2] @ np.ones((2, 9))
  found = svd.factorize(flat, 3)
  assert np.isfinite(found.first).all()
  np.testing.assert_allclose(found.product(), flat, atol=1e-5)
  assert svd.factorize(np.zeros((4, 3)), 2).energy == 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({}, 'give one of rank, compression and energy'),
    ({'rank': 2, 'energy': 0.5}, 'give one of'),
    ({'rank': 10}, 'rank is 10; of 60 x 9 it is between 1 and 9'),
    ({'rank': 0}, 'rank is 0'),
    ({'compression': 0.99}, 'leaves no rank'),
    ({'compression': 1.0}, 'compression is 1.0'),
    ({'energy': 0.0}, 'energy is 0.0'),
    ({'rank': 2, 'split': 'even'}, "split is 'even'"),
    ({'rank': 2, 'row_weights': np.ones(3)}, 'row_weights are 60 numbers'),
    ({'rank': 2, 'row_weights': np.zeros(60)}, 'all zero'),
    ({'rank': 2, 'table': np.ones(3)}, 'is no matrix'),
    ({'rank': 2, 'table': np.full((60, 9), np.nan)}, 'rows 0 to 60 hold'),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ValueError, match=message):
    svd.factorize(**({'table': table()} | changes))


@pytest.mark.parametrize('split', svd.SPLITS)
@pytest.mark.parametrize('weighted', [False, True])
def test_wide_tables(split, weighted, monkeypatch):
  """As the factors of what is turned, and nothing of D by D is made."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(7, 90)) * np.linspace(0.2, 3, 90)
  weights = rng.random(7) if weighted else None
  root = np.ones(7) if weights is None else np.sqrt(weights)
  left, singular, right = np.linalg.svd(root[:, None] * table, full_matrices=False)
  want = (left[:, :3] * singular[:3]) @ right[:3] / root[:, None]
  for block in (svd.BLOCK, 16):
    monkeypatch.setattr(svd, 'BLOCK', block)
    got = svd.factorize(table, 3, row_weights=weights, split=split, dtype=np.float64)
    np.testing.assert_allclose(got.product(), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.singular, singular, rtol=1e-6)
  huge = svd.factorize(np.ones((2, 100_000)), 2)  # of D by D it would be 80 GB
  np.testing.assert_allclose(huge.product()[:, :3], 1, rtol=1e-5)
  broken = table.copy()
  broken[3, 20] = np.nan
  with pytest.raises(ValueError, match='columns 16 to 32 hold numbers that are not finite'):
    svd.factorize(broken, 3)
