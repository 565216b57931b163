"""Learning rates on validation: `texts.py` has what came out.

  python -m gatedfm.sweep --config=configs/factorized_embedding/tuning.py:calr --workdir=runs/tune

`dense` is of the first training; a schedule's name (calr, clr, fixed, cosine) of training on with
90% of the table removed, `offlineus` of vectors that are compressed before any training.
"""

import dataclasses

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TablePoint, TableSweepConfig

PEAKS = (1e-3, 3e-3, 1e-2, 3e-2)


def get_config(stage: str = 'dense') -> TableSweepConfig:
  """TREC, SST-5 and Subj by DAN and LSTM."""
  points = {}
  for kind in ('dan', 'lstm'):
    for name in ('trec', 'sst5', 'subjective'):
      points |= _points(texts.classifier(name, kind), stage)
  return TableSweepConfig(points)


def _points(dense, stage: str) -> dict[str, TablePoint]:
  found = texts.points(dense, (0.9,), (stage,))
  first, tuned = next(iter(found)), list(found)[-1]
  if stage == 'dense':
    keep, tuned = {}, first
  else:
    keep = {first: found[first]}
  for peak in PEAKS:
    point = found[tuned]
    optimizer = dataclasses.replace(point.train.optimizer, peak_lr=peak)
    train = dataclasses.replace(point.train, optimizer=optimizer)
    keep[f'{tuned}_{peak:g}'] = TablePoint(f'{stage}, {peak:g}', train, point.compression)
  return keep
