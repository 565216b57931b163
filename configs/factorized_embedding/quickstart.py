"""TREC: 50, 90 and 95% of a DAN's table removed, 90% of an LSTM's, eight ways.

  python -m gatedfm.sweep --config=configs/factorized_embedding/quickstart.py --workdir=runs/tables

On two cores under eight minutes after the download.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig

METHODS = ('calr', 'weighted', 'random', 'banded', 'posthoc', 'int8factors', 'offlineus', 'int8')
COMPRESSIONS = {'dan': (0.5, 0.9, 0.95), 'lstm': (0.9,)}


def get_config() -> TableSweepConfig:
  """Three seeds."""
  points = {}
  for kind, compressions in COMPRESSIONS.items():
    dense = texts.classifier('trec', kind)
    dense.seeds = (0, 1, 2)
    points |= texts.points(dense, compressions, METHODS)
  return TableSweepConfig(points)
