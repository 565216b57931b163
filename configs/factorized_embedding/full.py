"""Ways to make a table smaller, on TREC, SST-5 and Subj by LSTM and DAN, on AG News by DAN.

  python -m gatedfm.sweep --config=configs/factorized_embedding/full.py --workdir=runs/tables_full

On two cores about three hours; it resumes. `full.py:dan` and `full.py:lstm` are its parts, which
two processes may train side by side into one workdir; the whole then compares them.
"""

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TableSweepConfig

FEW, LEAST = (0.9, 0.95, 0.5), (0.9, 0.95)  # what matters most is trained first
# Of an LSTM on longer texts, with 16 bits less.
SHORT = ('calr', 'released', 'random', 'banded', 'product', 'posthoc', 'int8factors', 'offlineus')
# Of an LSTM on TREC, of longer texts by a DAN.
ASKED = (*SHORT, 'clr', 'fixed', 'weighted', 'int16', 'int8')
ALL = (*ASKED, 'cosine', 'balanced', 'hashed', 'offlineu', 'int4')  # of TREC by a DAN
# At every compression; bands cannot have more than two fifths of a table.
CURVE = ('calr', 'posthoc', 'int8factors', 'offlineus')


def get_config(kinds: str = 'dan,lstm') -> TableSweepConfig:
  """Five seeds."""
  points = {}

  def add(kind: str, name: str, *asked: tuple[tuple[float, ...], tuple[str, ...]]) -> None:
    for compressions, methods in asked:
      points.update(texts.points(texts.classifier(name, kind), compressions, methods))

  for kind in kinds.split(','):
    if kind == 'dan':
      add(kind, 'trec', (FEW, ALL), (texts.COMPRESSIONS, CURVE))
      for name in ('sst5', 'subjective'):
        add(kind, name, (LEAST, (*ASKED, 'cosine')), ((0.5,), CURVE))
      add(kind, 'agnews', (LEAST, (*ASKED, 'cosine')))
    else:
      add(kind, 'trec', (FEW, ASKED))
      add(kind, 'sst5', (LEAST, (*SHORT, 'int8')))
      add(kind, 'subjective', ((0.9,), (*SHORT, 'int8')))
  return TableSweepConfig(points)
