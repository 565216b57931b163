"""Trains a speech model, or text classifiers.

Example:
  python -m gatedfm.train --config=configs/gated_speech/tiny.py --workdir=runs/tiny \\
      --config.model.d=96 --config.steps=500
  python -m gatedfm.train --config=configs/factorized_embedding/texts.py --workdir=runs/trec

The same command on the same workdir resumes.
"""

from absl import flags
from ml_collections import config_flags

from gatedfm import mains

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Configuration file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, metrics and assets go.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.trainers import loop, text_loop
  from gatedfm.trainers.text_config import TextTrainConfig

  with mains.clear_errors():
    cfg, workdir = mains.loaded(_CONFIG.value), mains.folder(_WORKDIR.value)
    if isinstance(cfg, TextTrainConfig):
      text_loop.train(cfg, workdir)
    else:
      loop.train(cfg, workdir)


if __name__ == '__main__':
  mains.run(main)
