"""Peaks of learning rates on validation, of a `dan` or an `lstm`: `texts.py` has what came out.

  python -m gatedfm.sweep --config=configs/factorized_embedding/tuning.py:dan --workdir=runs/tune

Of the first training, of training on, and with 50 and 90% of the table removed of each way that is
trained, of an LSTM with 90% of three.
"""

import dataclasses

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TablePoint, TableSweepConfig
from gatedfm.models.speech_config import choice

PEAKS = {'dan': (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 'lstm': (1e-3, 3e-3, 1e-2, 3e-2)}
COMPRESSIONS = {'dan': (0.5, 0.9), 'lstm': (0.9,)}
METHODS = {
  'dan': (*texts.SCHEDULES, *texts.TABLES, 'offlineus'),
  'lstm': ('calr', 'random', 'offlineus'),
}


def get_config(kind: str = 'dan') -> TableSweepConfig:
  """TREC, SST-5 and Subj by a DAN, TREC by an LSTM; five seeds."""
  choice('tuning.py:KIND', kind, tuple(PEAKS))
  points = {}
  for name in ('trec', 'sst5', 'subjective') if kind == 'dan' else ('trec',):
    found = texts.points(texts.classifier(name, kind), COMPRESSIONS[kind], METHODS[kind])
    first = next(iter(found))
    for at, point in found.items():
      for peak in PEAKS[kind]:
        optimizer = dataclasses.replace(point.train.optimizer, peak_lr=peak)
        train = dataclasses.replace(point.train, optimizer=optimizer, final=False)
        points[f'{at}_{peak:g}'] = TablePoint(f'{point.method}, {peak:g}', train, point.compression)
      if at == first:
        points[first] = point
  return TableSweepConfig(points)
