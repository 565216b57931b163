"""TREC: 50, 90 and 95% of a DAN's table removed seven ways, 90% of an LSTM's four ways.

  python -m gatedfm.sweep --config=configs/factorized_embedding/quickstart.py --workdir=runs/tables

On two cores under eight minutes after the download.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig

ASKED = {
  'dan': (
    (0.5, 0.9, 0.95),
    ('calr', 'random', 'banded', 'posthoc', 'int8factors', 'offlineus', 'int8'),
  ),
  'lstm': ((0.9,), ('calr', 'banded', 'posthoc', 'int8')),
}


def get_config() -> TableSweepConfig:
  """Three seeds."""
  points = {}
  for kind, (compressions, methods) in ASKED.items():
    dense = texts.classifier('trec', kind)
    dense.seeds = (0, 1, 2)
    points |= texts.points(dense, compressions, methods)
  return TableSweepConfig(points)
