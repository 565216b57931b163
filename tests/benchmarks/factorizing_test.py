"""A table larger than the memory that its factorization takes."""

import pytest

from gatedfm.benchmarks import factorizing
from gatedfm.benchmarks.factorizing import SvdCase
from gatedfm.factorization import svd


@pytest.mark.skipif(not factorizing.own_bytes(), reason='the system does not tell')
def test_memory_is_that_of_blocks_and_factors(monkeypatch):
  monkeypatch.setattr(svd, 'BLOCK', 4096)
  before = factorizing.own_bytes()
  (row,) = factorizing.run(SvdCase(rows=400_000, features=100), lambda line: None)
  assert row['table_bytes'] == 160_000_000
  assert row['rank'] == 9
  # The first factor, blocks in double precision, and what the library takes.
  assert row['own_bytes'] - before < 80_000_000
  assert 0 < row['energy'] < 1
