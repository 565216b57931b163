"""Ways to make a table smaller, on TREC, SST-5 and Subj by LSTM and DAN, on AG News by DAN.

  python -m gatedfm.sweep --config=configs/factorized_embedding/full.py --workdir=runs/tables_full

On two cores some hours; it resumes. `full.py:dan` and `full.py:lstm` are its parts, which two
processes may train side by side into one workdir; the whole then compares them.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig

FEW = (0.9, 0.95, 0.5)
# Of the LSTM and of AG News, which take longest.
ASKED = (
  'calr', 'clr', 'fixed', 'released', 'random', 'banded', 'product', 'posthoc', 'int8factors',
  'bytes', 'int8bytes', 'offlineus', 'int16', 'int8',
)  # fmt: skip
DAN = (*ASKED, 'cosine', 'offlineu')
ASIDE = ('balanced', 'weighted', 'hashed', 'int4')  # not at every compression
CURVE = ('calr', 'banded', 'posthoc', 'int8factors', 'offlineus')  # of an LSTM at every one


def get_config(kinds: str = 'dan,lstm') -> TableSweepConfig:
  """Five seeds."""
  points = {}
  for kind in kinds.split(','):
    for name in ('trec', 'sst5', 'subjective'):
      dense = texts.classifier(name, kind)
      points |= texts.points(dense, FEW, (*DAN, *ASIDE) if kind == 'dan' else ASKED)
      if kind == 'dan':
        points |= texts.points(dense, methods=DAN)
    if kind == 'dan':
      points |= texts.points(texts.classifier('agnews', kind), FEW, ASKED)
    else:
      points |= texts.points(texts.classifier('trec', kind), methods=CURVE)
  return TableSweepConfig(points)
