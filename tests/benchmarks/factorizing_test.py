"""A table larger than the memory that its factorization takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from gatedfm.benchmarks import factorizing
from gatedfm.benchmarks.factorizing import SvdCase

CASE = SvdCase(rows=400_000, features=100)
# Bytes above what the process had before. It is one of its own: one that has run other tests reuses
# memory that they freed, and does not grow.
GROWN = f"""
import sys
from gatedfm.benchmarks import factorizing
from gatedfm.factorization import svd
svd.BLOCK = int(sys.argv[1])
before = factorizing.own_bytes()
assert before > 10_000_000
(row,) = factorizing.run(factorizing.{CASE!r})
print(row['own_bytes'] - before)
"""


def test_a_row():
  (row,) = factorizing.run(CASE)
  assert row['table_bytes'] == 160_000_000
  assert row['rank'] == 9
  assert 0 < row['energy'] < 1


def grown(block):
  command = [sys.executable, '-c', GROWN, str(block)]
  return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux tells it there')
def test_memory_is_that_of_blocks_and_factors():
  """The first factor, blocks in double precision, and what the library takes."""
  assert 14_000_000 < grown(4096) < 80_000_000
  assert grown(400_000) > 300_000_000  # in one block the whole table, twice as wide
