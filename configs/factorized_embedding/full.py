"""Ways to make a table smaller, on TREC, SST-5 and Subj by LSTM and DAN, on AG News by DAN.

  python -m gatedfm.sweep --config=configs/factorized_embedding/full.py --workdir=runs/tables_full

On two cores about three hours; it resumes. `full.py:dan` and `full.py:lstm` are its parts, which
two processes may train side by side into one workdir; the whole then compares them.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig
from gatedfm.models.speech_config import choice

FEW, LEAST = (0.9, 0.95, 0.5), (0.9, 0.95)  # what matters most is trained first
SHORT = ('calr', 'released', 'random', 'banded', 'product', 'posthoc', 'int8factors', 'offlineus')
ASKED = (*SHORT, 'clr', 'fixed', 'weighted', 'int16', 'int8')
ALL = (*ASKED, 'cosine', 'balanced', 'hashed', 'offlineu', 'int4')
# At every compression; bands cannot have more than two fifths of a table.
CURVE = ('calr', 'posthoc', 'int8factors', 'offlineus')
# Fewer where a point takes longer.
ASKED_OF = {
  'dan': (
    ('trec', FEW, ALL),
    ('trec', texts.COMPRESSIONS, CURVE),
    ('sst5', LEAST, (*ASKED, 'cosine')),
    ('sst5', (0.5,), CURVE),
    ('subjective', LEAST, (*ASKED, 'cosine')),
    ('subjective', (0.5,), CURVE),
    ('agnews', LEAST, (*ASKED, 'cosine')),
  ),
  'lstm': (
    ('trec', FEW, ASKED),
    ('sst5', LEAST, (*SHORT, 'int8')),
    ('subjective', (0.9,), (*SHORT, 'int8')),
  ),
}


def get_config(kinds: str = 'dan,lstm') -> TableSweepConfig:
  """Five seeds."""
  points = {}
  for kind in kinds.split(','):
    choice('full.py:KIND', kind, tuple(ASKED_OF))
    for name, compressions, methods in ASKED_OF[kind]:
      points |= texts.points(texts.classifier(name, kind), compressions, methods)
  return TableSweepConfig(points)
