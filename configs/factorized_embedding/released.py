"""What the published code does, as a whole, on our texts and vectors; errors included.

  python -m gatedfm.sweep --config=configs/factorized_embedding/released.py --workdir=runs/released

Beside its factors: right ones, random ones, and the dense table trained on as long. Not as
released: which epoch is kept (validation says it, what a training starts from counts, too; test is
looked at once), an order of the texts that is new in each epoch, a last batch that is filled up,
and words without a vector that go before a text is cut to 40 words.
"""

import copy

from configs.factorized_embedding import texts
from gatedfm.evaluation.table_config import TablePoint, TableSweepConfig
from gatedfm.models.tables import TableConfig
from gatedfm.trainers.text_config import TextTrainConfig

COMPRESSIONS = (0.5, 0.7, 0.9)
EPOCHS, EPOCHS_ON = 3, 5
INITS = {
  'released_svd': 'as released',
  'svd': 'with the right SVD',
  'random': 'with random factors',
}


def get_config(kinds: str = 'dan,lstm') -> TableSweepConfig:
  """TREC, SST-5 and Subj, five seeds."""
  points = {}
  for kind in kinds.split(','):
    for name in ('trec', 'sst5', 'subjective'):
      points |= _points(name, kind)
  return TableSweepConfig(points)


def _points(name: str, kind: str) -> dict[str, TablePoint]:
  dense = texts.classifier(name, kind)
  dense.classifier.reference_compat = True
  dense.epochs = EPOCHS
  _rates(dense, 1e-5)
  first = f'{name}_{kind}_dense'

  def on(table: TableConfig) -> TextTrainConfig:
    cfg = copy.deepcopy(dense)
    cfg.init_from, cfg.epochs, cfg.classifier.table = first, EPOCHS_ON, table
    _rates(cfg, 1e-3)
    return cfg

  out = {
    first: TablePoint('dense', dense),
    f'{name}_{kind}_longer': TablePoint('dense, trained on', on(TableConfig()), 0.0, first),
  }
  for c in COMPRESSIONS:
    for init, label in INITS.items():
      cfg = on(TableConfig('factorized', c, init=init, project_relu=kind == 'dan'))
      cfg.fresh_lstm = kind == 'lstm'
      out[f'{name}_{kind}_{init}_{100 * c:g}'] = TablePoint(label, cfg, c, first)
    cfg = copy.deepcopy(dense)
    cfg.data.offline, cfg.data.offline_compression = 'u', c
    out[f'{name}_{kind}_offline_{100 * c:g}'] = TablePoint('offline, U', cfg, c, first)
  return out


def _rates(cfg: TextTrainConfig, lowest: float) -> None:
  """CALR as released, whose maximum falls with every epoch."""
  cfg.optimizer.schedule, cfg.optimizer.half_cycle = 'released_calr', 1000
  cfg.optimizer.decay_every, cfg.optimizer.final_fraction = 1 / cfg.epochs, lowest
  cfg.optimizer.name, cfg.optimizer.peak_lr, cfg.optimizer.eps = 'tf1_adam', 1e-3, 1e-2
