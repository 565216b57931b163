"""Ways to make a table smaller, on TREC, SST-5 and Subj by LSTM and DAN, on AG News by DAN.

  python -m gatedfm.sweep --config=configs/factorized_embedding/full.py --workdir=runs/tables_full

On two cores some hours; it resumes.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig


def get_config() -> TableSweepConfig:
  """Five seeds."""
  points = {}
  for name in ('trec', 'sst5', 'subjective', 'agnews'):  # what is quickly done first
    points |= texts.points(texts.classifier(name, 'dan'))
  for name in ('trec', 'subjective', 'sst5'):
    points |= texts.points(texts.classifier(name, 'lstm'))
  return TableSweepConfig(points)
