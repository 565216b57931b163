"""The quickstart: dense model, two gated ones, evaluation, timing, report.

  python -m gatedfm.sweep --config=configs/gated_speech/quickstart.py --workdir=runs/quickstart

On two cores about ten minutes after the download; `bash launch/local.sh` calls it.
"""

import copy

from configs.gated_speech import tiny
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.trainers.config import TrainConfig


def gated(dense: TrainConfig, target: float, steps: int) -> TrainConfig:
  """The dense model fine-tuned with a gate predictor to a sparsity target."""
  cfg = copy.deepcopy(dense)
  cfg.init_from, cfg.steps = 'dense', steps
  cfg.model.gates.enabled = True
  cfg.sparsity.target = target
  cfg.optimizer.peak_lr, cfg.optimizer.warmup = 5e-4, 20
  cfg.eval_every = cfg.checkpoint_every = steps
  return cfg


def get_config() -> SweepConfig:
  """Dense, 30% and 50% of the modules closed."""
  dense = tiny.get_config()
  return SweepConfig(
    points={
      'dense': dense,
      'gated_0.3': gated(dense, 0.3, 150),
      'gated_0.5': gated(dense, 0.5, 150),
    },
    other='asterisk?languages=fra,rus,spa&max_items=60',
    timed=20,
    rounds=3,
    longest=192,
  )
