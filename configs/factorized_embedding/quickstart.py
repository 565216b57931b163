"""TREC by an LSTM and a DAN: 50, 90 and 95% of the table's parameters removed, six ways.

  python -m gatedfm.sweep --config=configs/factorized_embedding/quickstart.py --workdir=runs/tables

On two cores under eight minutes after the download.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig

METHODS = ('calr', 'banded', 'random', 'posthoc', 'bytes', 'int8bytes', 'offlineus', 'int8')


def get_config() -> TableSweepConfig:
  """Three seeds."""
  points = {}
  for kind in ('lstm', 'dan'):
    dense = texts.classifier('trec', kind)
    dense.seeds = (0, 1, 2)
    points |= texts.points(dense, (0.5, 0.9, 0.95), METHODS)
  return TableSweepConfig(points)
