"""Text classifiers with word vectors, and the ways to make their tables smaller that are compared.

  python -m gatedfm.train --config=configs/factorized_embedding/texts.py:dan,sst5 --workdir=runs/a
  python -m gatedfm.train --config=configs/factorized_embedding/texts.py:dan,sst5 \\
      --workdir=runs/b --config.init_from=runs/a --config.optimizer.schedule=calr \\
      --config.classifier.table.kind=factorized --config.classifier.table.compression=0.9 \\
      --config.optimizer.peak_lr=1e-3

Of one's own: texts.py:dan,FILE (.csv or .jsonl). Learning rates were chosen on validation.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

from gatedfm.evaluation.table_config import TablePoint
from gatedfm.models.tables import TableConfig
from gatedfm.trainers.text_config import TextTrainConfig

COMPRESSIONS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
# Peaks of the learning rate, from `tuning.py`; texts that are not named have the last of each. An
# LSTM's were chosen on TREC alone, those of AG News not at all.
PEAKS = {'trec': 1e-2, 'sst5': 1e-3, 'subjective': 3e-3, '': 3e-3}  # of the first training
PEAKS_ON = {'trec': 3e-3, 'sst5': 1e-3, 'subjective': 1e-3, '': 1e-3}  # of training on
NEAR = 0.1  # times that, where more than a quarter of the singular values stays
BALANCED = 10  # times that: the first factor's numbers are larger by about as much
PEAK_FRESH = 3e-2  # of tables with little of the trained one
PEAK_BANDED = 1e-3
PEAK_OFFLINE = {'dan': 3e-2, 'lstm': 1e-2}  # of vectors that no training has seen
# How factors of a trained table are trained on.
SCHEDULES = {'calr': 'calr', 'clr': 'clr', 'fixed': 'constant', 'cosine': 'cosine'}
# What tables are made of otherwise, trained on with CALR.
TABLES = {
  'balanced': {'split': 'balanced'},
  'weighted': {'init': 'weighted_svd'},
  'released': {'init': 'released_svd'},
  'random': {'init': 'random'},
  'banded': {'kind': 'banded'},
  'hashed': {'kind': 'hashed'},
  'product': {'kind': 'product_quantized'},
}


def get_config(what: str = 'lstm,trec') -> TextTrainConfig:
  """Texts by an `lstm` or a `dan`, five seeds side by side; TREC where none are named."""
  kind, _, texts = what.partition(',')
  return classifier(texts or 'trec', kind)


def classifier(texts: str, kind: str) -> TextTrainConfig:
  """A dense training with plain vectors."""
  cfg = TextTrainConfig()
  cfg.classifier.kind = kind
  cfg.data.texts = texts
  cfg.data.vectors = 'glove-50'
  cfg.epochs = 12 if kind == 'dan' else 4
  if texts == 'agnews':
    cfg.data.vectors, cfg.data.longest, cfg.data.batch, cfg.epochs = 'sg-100', 80, 256, 4
  # CALR's maximum falls twice before it comes back: twice in a training.
  cfg.optimizer.schedule, cfg.optimizer.half_cycle = 'clr', 1 / 12
  cfg.optimizer.peak_lr, cfg.optimizer.final_fraction = PEAKS.get(texts, PEAKS['']), 1e-3
  return cfg


def _peak(texts: str, table: TableConfig) -> float:
  """Of the learning rate of training on with a table, whatever the schedule."""
  if table.kind == 'hashed' or table.init == 'random':
    return PEAK_FRESH
  if table.kind == 'banded':
    return PEAK_BANDED
  peak = PEAKS_ON.get(texts, PEAKS_ON[''])
  if table.kind == 'factorized' and table.init != 'released_svd' and table.compression < 0.75:
    peak *= NEAR
  return peak * (BALANCED if table.split == 'balanced' else 1)


def points(
  dense: TextTrainConfig,
  compressions: Iterable[float] = COMPRESSIONS,
  methods: Iterable[str] | None = None,
) -> dict[str, TablePoint]:
  """Points of one set of texts and kind of classifier, by name.

  Every smaller table is trained as long as the baseline: `dense`, and then as long again, where
  validation chooses among all epochs and what they start from. Vectors that are compressed offline
  are trained so long at once.

  Args:
    dense: the first training.
    compressions: shares to remove.
    methods: which, by the first part of their points' names; None means all.
  """
  texts, kind = dense.data.texts, dense.classifier.kind
  name = lambda *parts: '_'.join([Path(texts).stem, kind, *map(str, parts)])
  named = lambda method, c: name(method, f'{100 * c:g}') if c else name(method)
  first, baseline = name('dense'), name('longer')

  def on(parent: str, table: TableConfig, schedule: str = 'calr', epochs: int | None = None):
    cfg = copy.deepcopy(dense)
    cfg.init_from, cfg.classifier.table = parent, table
    cfg.epochs = dense.epochs if epochs is None else epochs
    cfg.optimizer.schedule, cfg.optimizer.warmup = schedule, 1
    cfg.optimizer.peak_lr = _peak(texts, table)
    return cfg

  out = {
    first: TablePoint('dense', dense),
    baseline: TablePoint('dense, as long', on(first, TableConfig())),
  }

  def add(method: str, label: str, cfg: TextTrainConfig, c: float = 0.0) -> None:
    if methods is None or method in methods:
      out[named(method, c)] = TablePoint(label, cfg, c, baseline)

  for bits in (16, 8, 4):
    add(f'int{bits}', f'int{bits}', on(baseline, TableConfig('quantized', bits=bits), epochs=0))
  for c in compressions:
    for method, schedule in SCHEDULES.items():
      add(method, f'SVD, {method}', on(first, TableConfig('factorized', c), schedule), c)
    for method, table in TABLES.items():
      cfg = on(first, TableConfig(**{'kind': 'factorized', 'compression': c} | table))
      label = f'SVD, {method}' if {'split', 'init'} & set(table) and method != 'random' else method
      add(method, f'{label}, calr', cfg, c)
    add('posthoc', 'SVD, not trained on', on(baseline, TableConfig('factorized', c), epochs=0), c)
    codes = on(named('calr', c), TableConfig('quantized_factors'), epochs=0)
    add('int8factors', 'SVD, calr, int8', codes, c)
    for split in ('u', 'us'):
      cfg = copy.deepcopy(dense)
      cfg.data.offline, cfg.data.offline_compression = split, c
      cfg.epochs, cfg.optimizer.peak_lr = 2 * dense.epochs, PEAK_OFFLINE[kind]
      add(f'offline{split}', f'offline, {split.upper()}', cfg, c)
  return out
