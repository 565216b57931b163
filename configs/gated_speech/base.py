"""OWSM v3.1's shapes for accelerators: `base`, `small` or `medium`, as `base.py:medium`.

  python -m gatedfm.train --config=configs/gated_speech/base.py:small --workdir=/storage/small \
      --config.data.sources="('manifest:/data/europarl_st/manifest.jsonl',)" \
      --config.mesh.fsdp=4

From OWSM v3.1: the sizes, CTC/attention 0.3/0.7, label smoothing 0.1, SpecAugment with 2
frequency and 10 time masks, dropout 0.1, and AdamW (0.9, 0.98; eps 1e-6) whose rate reaches 2e-4
after 60,000 steps. What differs from its recipe:

- weight decay is 1e-2 on kernels and embeddings; there 0;
- the warm-up is one line; there it reaches 5e-5 after 30,000 steps and is steeper from there on;
- six buckets by length, longer utterances left out, padding masked in attention; there all audio
  is padded or cut to 30 s, without a mask;
- neither timestamps nor previous text: pieces take the place of 1,501 times in the vocabulary;
- steps, batch and the other values are this project's.

Parameters of a released checkpoint come in through `gatedfm.convert.espnet`. Not run here: it
needs accelerators and public data.
"""

from gatedfm.models.speech_config import owsm
from gatedfm.trainers.config import DataConfig, OptimizerConfig, TrainConfig


def get_config(size: str = 'base') -> TrainConfig:
  """An OWSM-sized dense model."""
  model = owsm(size)
  model.dtype, model.activation_dtype, model.remat = 'bfloat16', 'bfloat16', 'full'
  return TrainConfig(
    name=f'owsm_{size}',
    steps=200_000,
    vocab=50_002,
    log_every=100,
    eval_every=5_000,
    checkpoint_every=5_000,
    model=model,
    data=DataConfig(
      tasks=('asr', 'st_eng', 'lid'),
      batch_frames=256 * 3_000,
      num_buckets=6,
      max_frames=3_001,
      notimestamps=True,
      workers=8,
    ),
    optimizer=OptimizerConfig(
      name='adamw', peak_lr=2e-4, warmup=60_000, schedule='rsqrt', eps=1e-6
    ),
  )
