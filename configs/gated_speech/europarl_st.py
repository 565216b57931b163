"""Europarl-ST (de, fr, it), the set of the published work: recognition and translation.

  python -m gatedfm.data.europarl_st --root=/data/europarl-st/v1.1 \
      --out=/data/europarl_st/manifest.jsonl
  python -m gatedfm.train --config=configs/gated_speech/europarl_st.py \
      --workdir=/storage/europarl_dense \
      --config.data.sources="('manifest:/data/europarl_st/manifest.jsonl',)"

Then gate it: `--config.init_from=/storage/europarl_dense --config.model.gates.enabled=True`.
Not run here: it needs the corpus.
"""

from configs.gated_speech import base
from gatedfm.trainers.config import TrainConfig


def get_config(size: str = 'small') -> TrainConfig:
  """About 20 h per language; shorter training than OWSM's."""
  cfg = base.get_config(size)
  cfg.name, cfg.steps, cfg.vocab = f'europarl_st_{size}', 30_000, 5_000
  cfg.data.sources = ('manifest:europarl_st/manifest.jsonl',)
  cfg.data.tasks = ('asr', 'st_deu', 'st_fra', 'st_ita')
  cfg.data.batch_frames = 64 * 1_500
  cfg.optimizer.warmup = 6_000
  return cfg
