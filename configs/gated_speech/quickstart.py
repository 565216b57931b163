"""The quickstart: dense model, gated model, evaluation, timing, report.

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
  # As good here as Muon, and a step takes two thirds of the time.
  cfg.optimizer.name, cfg.optimizer.peak_lr, cfg.optimizer.warmup = 'adamw', 5e-4, 20
  cfg.eval_every = cfg.checkpoint_every = steps
  # All tasks alike often, and each about what it is worth to the search: by nats alone, a language
  # (one token) and a translation (short texts) are given up for a few letters of a transcript.
  cfg.data.task_weights, cfg.data.loss_weights = (1.0, 1.0, 1.0), (1.0, 30.0, 3.0)
  return cfg


def get_config() -> SweepConfig:
  """Dense, and about half of the modules closed."""
  dense = tiny.get_config()
  cfg = gated(dense, 0.5, 500)
  # Two shapes less to compile.
  cfg.data.num_buckets, cfg.data.max_frames, cfg.data.max_tokens = 2, 256, 64
  return SweepConfig(
    points={'dense': dense, 'gated': cfg},
    other='asterisk?languages=fra,rus,spa&max_items=60',
    timed=20,
    rounds=3,
    longest=192,
  )
