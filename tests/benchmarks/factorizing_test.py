"""A table larger than the memory that its factorization takes."""

from pathlib import Path

import pytest

from gatedfm.benchmarks import factorizing
from gatedfm.benchmarks.factorizing import SvdCase
from gatedfm.factorization import svd


def run(monkeypatch, block):
  monkeypatch.setattr(svd, 'BLOCK', block)
  (row,) = factorizing.run(SvdCase(rows=400_000, features=100), lambda line: None)
  return row


def test_a_row(monkeypatch):
  row = run(monkeypatch, 65_536)
  assert row['table_bytes'] == 160_000_000
  assert row['rank'] == 9
  assert 0 < row['energy'] < 1


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux tells it there')
def test_memory_is_that_of_blocks_and_factors(monkeypatch):
  """The first factor, blocks in double precision, and what the library takes."""
  before = factorizing.own_bytes()
  assert before > 10_000_000
  assert 14_000_000 < run(monkeypatch, 4096)['own_bytes'] - before < 80_000_000
  # In one block it is the whole table, twice as wide.
  assert run(monkeypatch, 400_000)['own_bytes'] - before > 300_000_000
