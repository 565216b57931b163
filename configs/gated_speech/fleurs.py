"""FLEURS through a manifest: recognition and identification in as many of its 102 languages.

  python -m gatedfm.data.fleurs --root=/data/fleurs --out=/data/fleurs_manifest/manifest.jsonl \
      --languages=fr_fr,es_419,ru_ru
  python -m gatedfm.train --config=configs/gated_speech/fleurs.py --workdir=/storage/fleurs \
      --config.data.sources="('manifest:/data/fleurs_manifest/manifest.jsonl',)"

Not run here: it needs the corpus.
"""

from configs.gated_speech import base
from gatedfm.trainers.config import TrainConfig


def get_config(size: str = 'base') -> TrainConfig:
  """Ten hours a language and less."""
  cfg = base.get_config(size)
  cfg.name, cfg.steps, cfg.vocab = f'fleurs_{size}', 20_000, 5_000
  cfg.data.sources = ('manifest:fleurs_manifest/manifest.jsonl',)
  cfg.data.tasks = ('asr', 'lid')
  cfg.data.batch_frames = 64 * 1_500
  cfg.optimizer.warmup = 4_000
  return cfg
